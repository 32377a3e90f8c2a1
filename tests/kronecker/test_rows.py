"""The rows of `layers()` rebuild the gradients that autograd gives, in the caller's own context."""

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from kronecker.cases import Net, build, close, cnn, dense_ggn, integers, layers, mlp, real, seeded, tied, tokens


def weight_gradients(row, shapes):
    """Per-datum gradients of each parameter of one use, ``{name: [data, *shape]}``."""
    g, a = row.output_gradients, row.inputs
    if row.transposed and a.dtype == torch.int64:  # ids of an embedding
        rows = torch.zeros(*a.shape, shapes[row.names[0]][0], dtype=g.dtype)
        a = rows.scatter_(-1, a.clamp(min=0).unsqueeze(-1), (a >= 0).to(g.dtype).unsqueeze(-1))
    left, right = (a, g) if row.transposed else (g, a)
    whole = torch.einsum("npgl,npgr->nglr", left, right)
    if len(row.names) == 1:
        return {row.names[0]: whole.reshape(len(whole), *shapes[row.names[0]])}
    weight, bias = whole[..., :-1], whole[..., -1]
    return {
        row.names[0]: weight.reshape(len(whole), *shapes[row.names[0]]),
        row.names[1]: bias.reshape(len(whole), *shapes[row.names[1]]),
    }


def collected(op):
    """Sums over uses: gradients by (batch, column) and parameter."""
    found = {}
    for row in op.layers():
        own = found.setdefault((row.batch, row.datum, row.column), {})
        for name, gradient in weight_gradients(row, op.domain.shapes).items():
            own[name] = own.get(name, 0) + gradient
    return found


PROBLEMS = {
    "mlp": mlp,
    "cnn": cnn,
    "layers": layers,
    "one term": lambda: (*tied()[:2], tied()[2][:, :1], integers(5, 6, 1, seed=2)),
}


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_of_each_datum(name, separate):
    model, loss, X, y = problem = PROBLEMS[name]()
    op = build(
        "kfac", problem, 4, 2, fisher_type="empirical", separate_weight_and_bias=separate, check_deterministic=False
    )
    found = collected(op)
    assert sorted(found) == [(0, 0, 0), (1, 0, 0)]
    shapes = op.domain.shapes
    for n in range(6):
        single = type(loss)(reduction="sum")(model(X[n : n + 1]), y[n : n + 1])
        expected = torch.autograd.grad(single, list(model.parameters()))
        batch, place = (0, n) if n < 4 else (1, n - 4)
        for own, gradient in zip(shapes, expected, strict=True):
            close(found[batch, 0, 0][own][place], gradient)


@pytest.mark.parametrize("problem", [mlp, cnn, tied])
def test_squares_of_all_passes_are_the_ggn_blocks(problem):
    op = build("kfac", problem(), 4, 2)
    total = {}
    for gradients in collected(op).values():
        for name, gradient in gradients.items():
            flat = gradient.flatten(1)
            total[name] = total.get(name, 0) + flat.T @ flat
    ggn, c = dense_ggn(problem()), op.state.constant
    for name, matrix in total.items():
        where = op.domain.slice(name)
        close(c * matrix, ggn[where, where])


def test_data_that_are_seen_alone_are_told_apart():
    """Rows that are sorted by value belong to no datum by their place."""

    def forward(net, x):
        order = x[:, 0].argsort()
        return net.head(torch.tanh(net.layer(x[order]))[order.argsort()])

    model = seeded(lambda: Net(forward, layer=nn.Linear(2, 3), head=nn.Linear(3, 2)))
    problem = model, nn.MSELoss(), real(5, 2), real(5, 2)
    op = build("kfac", problem, fisher_type="empirical")
    rows = [row for row in op.layers() if row.names == ("layer.weight",)]
    assert [row.datum for row in rows] == list(range(5)) and all(len(row.inputs) == 1 for row in rows)
    for row in rows:
        close(row.inputs.flatten(), problem[2][row.datum])


def test_the_caller_runs_in_the_caller_s_context():
    op = build("kfac", tokens(), 3, 3)
    modes, seen = _get_current_function_mode_stack(), 0
    state = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", enabled=True):
        for row in op.layers():
            assert _get_current_function_mode_stack() == modes
            assert not torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
            assert not row.inputs.requires_grad and not row.output_gradients.requires_grad
            seen += 1
    assert seen > 10 and torch.equal(torch.get_rng_state(), state)


def test_the_generator_can_be_left():
    op = build("kfac", mlp(), 3, 3)
    rows = op.layers()
    next(rows)
    rows.close()
    assert torch.isfinite(op.to_dense()).all()
    assert len(list(op.layers())) == 2 * 3 * 4  # batches, columns, parameters
