"""The Jacobian of a model's outputs, beside `torch.func.jacrev`."""

import pytest
import torch
from conformance import check_adjoint, check_dense, check_linear, check_shape, close
from torch import nn
from torch.func import functional_call, jacrev

from curvops import JacobianLinearOperator, TransposedJacobianLinearOperator
from curvops.products import jacobian, rules

MODELS = {
    "mlp": lambda: (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3,)),
    "wide outputs": lambda: (nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 9, bias=False)), (2,)),
    "convolution": lambda: (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)), (1, 4, 4)),
    "positions": lambda: (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), (5, 3)),
    "batch norm": lambda: (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), (3,)),
}


def problem(name, sizes=(3, 2)):
    torch.manual_seed(0)
    model, shape = MODELS[name]()
    model = model.double()
    data = [(torch.randn(n, *shape, dtype=torch.float64), None) for n in sizes]
    return model, dict(model.named_parameters()), data


def expected(model, params, data):
    def one(X):
        found = jacrev(lambda p: functional_call(model, p, (X,)))({n: p.detach() for n, p in params.items()})
        return torch.cat([t.flatten(-params[n].ndim).reshape(-1, params[n].numel()) for n, t in found.items()], 1)

    return torch.cat([one(X) for X, _ in data])


@pytest.mark.filterwarnings("ignore:.*batch norm in train mode")
@pytest.mark.parametrize("forward", [False, True], ids=["reverse", "forward"])
@pytest.mark.parametrize("name", MODELS)
def test_jacobian_is_that_of_dense_autograd(name, forward, monkeypatch):
    monkeypatch.setattr("curvops.products.rules.forward_mode_pays", lambda record: forward and record.size > 4)
    model, params, data = problem(name, (6, 5))
    matrix = expected(model, params, data) if name != "batch norm" else None
    op = JacobianLinearOperator(model, params, data)
    dense = check_dense(op)
    if matrix is not None:
        close(dense, matrix)
    check_shape(op)
    check_linear(op, dense)
    check_adjoint(op, dense)
    close(TransposedJacobianLinearOperator(model, params, data).to_dense(), dense.T)
    rest = dense.view(11, -1, dense.shape[1])
    for n in (0, 5, 6, 10):
        one = op.datum(n)
        close(one.to_dense(), rest[n])
        close(one @ dense[0], rest[n] @ dense[0])
        close(one.T @ rest[n].sum(1), rest[n].T @ rest[n].sum(1))


def test_outputs_come_in_their_shape():
    model, params, data = problem("positions")
    op = JacobianLinearOperator(model, params, data)
    (z,) = op @ [torch.ones_like(p) for p in params.values()]
    assert z.shape == (5, 5, 2)
    back = op.T @ {"output": z}
    assert {name: t.shape for name, t in back.items()} == {name: p.shape for name, p in params.items()}
    (columns,) = op @ [torch.ones(*p.shape, 4, dtype=p.dtype) for p in params.values()]
    assert columns.shape == (5, 5, 2, 4)


def test_outputs_of_several_lengths():
    model, params, _ = problem("positions")
    data = [(torch.randn(2, length, 3, dtype=torch.float64), None) for length in (3, 5)]
    op = JacobianLinearOperator(model, params, data)
    assert op.codomain.shapes == {"0": (2, 3, 2), "1": (2, 5, 2)}
    close(op.to_dense(), expected(model, params, data))


def test_a_subset_of_the_parameters_and_a_function():
    model, params, data = problem("mlp")
    some = {"2.weight": params["2.weight"]}
    whole = expected(model, params, data)[:, 16:24]
    close(JacobianLinearOperator(model, some, data).to_dense(), whole)
    function = lambda p, X: functional_call(model, p, (X,))  # noqa: E731
    close(JacobianLinearOperator(function, some, data).to_dense(), whole)


def test_many_columns_take_the_rows_and_few_do_not(monkeypatch):
    model, params, data = problem("mlp")
    whole, taken, plain = expected(model, params, data), [], jacobian.pulled_rows
    monkeypatch.setattr(jacobian, "pulled_rows", lambda *args: taken.append(1) or plain(*args))
    op = JacobianLinearOperator(model, params, data)
    batches = len(data)
    for columns in (1, rules.TOGETHER - 1, rules.TOGETHER, 26):
        V = torch.randn(26, columns, dtype=torch.float64)
        close(op @ V, whole @ V)
        assert len(taken) == (batches if columns >= rules.TOGETHER else 0)
        taken.clear()
        U = torch.randn(10, columns, dtype=torch.float64)
        close(op.T @ U, whole.T @ U)
        assert len(taken) == (batches if columns >= 2 * rules.TOGETHER else 0)
        taken.clear()
    assert (op @ torch.zeros(26, 0, dtype=torch.float64)).shape == (10, 0)
    assert rules.jacobian_pays(4, 64, 10) and not rules.jacobian_pays(4, 65, 10)
    assert rules.jacobian_pays(400, 800, 20_000) and not rules.jacobian_pays(400, 801, 20_000)
    assert not rules.jacobian_pays(10**6, 10**6, 100)


def test_what_does_not_fit_is_refused():
    model, params, data = problem("mlp")
    op = JacobianLinearOperator(model, params, data, check_deterministic=False)
    with pytest.raises(IndexError, match="datum: expected a place among 5 data, got 5"):
        op.datum(5)
    with pytest.raises(IndexError, match="got -1"):
        op.datum(-1)
    with pytest.raises(TypeError, match="datum: expected the number of a datum, got True"):
        op.datum(True)
    with pytest.raises(ValueError, match=r"one row for each of 3 data, got shape \(\)"):
        JacobianLinearOperator(
            lambda p, X: (p["w"] * X).sum(), {"w": params["0.weight"][0].detach()}, data, check_deterministic=False
        )
    with pytest.raises(RuntimeError, match="deterministic"):
        JacobianLinearOperator(nn.Sequential(model, nn.Dropout()), params, data)


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_about_a_loss():
    model, params, data = problem("mlp")
    JacobianLinearOperator(model, params, data)


def test_what_was_chosen_is_said(monkeypatch):
    model, params, data = problem("mlp")
    op = JacobianLinearOperator(model, params, data)
    assert "nothing has been computed yet" in op.explain()
    op.to_dense()
    assert "rows: by vmap over the data (a random combination equals the reference's" in op.explain()
    op @ torch.ones(26, dtype=torch.float64)
    assert "J v: reverse over reverse" in op.explain()
    mixing, params, data = problem("batch norm")
    op = JacobianLinearOperator(mixing, params, data, check_deterministic=False)
    op.to_dense()
    assert "rows: one by one" in op.explain()
    assert "nothing has been computed yet" in op.datum(0).explain()


def test_a_wrong_vmap_is_refused(monkeypatch):
    model, params, data = problem("mlp")
    original = jacobian.pulled_rows
    tried = []
    monkeypatch.setattr(jacobian, "pulled_rows", lambda *a: tried.append(1) or (1.01 * rows for rows in original(*a)))
    whole, V, U = expected(model, params, data), *(torch.randn(k, 20, dtype=torch.float64) for k in (26, 10))
    for work, right in (
        (lambda op: op.to_dense(), whole),
        (lambda op: op @ V, whole @ V),
        (lambda op: op.T @ U, whole.T @ U),
    ):
        op = JacobianLinearOperator(model, params, data)
        close(work(op), right)
        assert "vmap differs from the reference by" in op.explain() and len(tried) == 1 < len(data)
        tried.clear()


def test_no_batch_after_the_wanted_datum_is_run():
    model, params, data = problem("mlp", (3, 2, 4))
    op, sizes = JacobianLinearOperator(model, params, data), []
    hook = model.register_forward_hook(lambda module, inputs, out: sizes.append(len(out)))
    op.datum(3) @ torch.ones(26, dtype=torch.float64)
    hook.remove()
    assert sizes == [2, 2]  # its shape, and the product


def test_messages_name_the_class_that_was_called():
    model, params, data = problem("mlp")
    with pytest.raises(ValueError, match="'TransposedJacobianLinearOperator @ v': expected 10 rows"):
        TransposedJacobianLinearOperator(model, params, data) @ torch.ones(3, dtype=torch.float64)
