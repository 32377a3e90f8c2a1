"""Merging halves is computing the whole; a moving average mixes what enters the blocks; the nearest product to a sum."""

import pytest
import torch
from torch import nn

from curvops import BlockRule, GGNDiagonalLinearOperator, KFACLinearOperator
from curvops.kronecker.state import nearest_product
from kronecker.cases import APPROXIMATIONS, PROBLEMS, Net, build, close, integers, mlp, nearest_kronecker, real, seeded


def half(problem, part):
    model, loss, X, y = problem
    return model, loss, X[part], y[part]


def routed():
    """Two experts and a tied pair; the first half of the data reaches one expert only."""

    def forward(net, X):
        h = net.embedding(X)
        out = torch.zeros_like(h)
        for k, expert in enumerate(net.experts):
            chosen = ((X >= 4) if k else (X < 4)).nonzero().squeeze(1)
            if len(chosen):
                out = out.index_add(0, chosen, torch.tanh(expert(h[chosen])))
        return net.head(net.norm(out))

    def make():
        return Net(
            forward,
            embedding=nn.Embedding(8, 3),
            experts=nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]),
            norm=nn.LayerNorm(3),
            head=nn.Linear(3, 2),
        )

    return seeded(make), nn.MSELoss(), torch.cat([integers(4, 3), integers(8, 3, seed=1) % 4 + 4]), real(6, 2)


@pytest.mark.parametrize(
    ("kind", "fisher_type"),
    [("kfac", "type-2"), ("kfac", "empirical"), ("kfac", "forward-only"), ("diagonal", "type-2")],
)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("name", [*PROBLEMS, "routed"])
def test_two_halves_are_the_whole(kind, name, approximation, fisher_type):
    problem = (PROBLEMS | {"routed": routed})[name]()
    options = {"fisher_type": fisher_type, "kfac_approx": approximation, "check_deterministic": False}
    for reduction in ("mean", "sum"):
        problem[1].reduction = reduction
        whole = build(kind, problem, **options)
        first, second = (build(kind, half(problem, part), **options) for part in (slice(0, 3), slice(3, 6)))
        close(first.merge(second).to_dense(), whole.to_dense())
        close(second.merge(first).to_dense(), whole.to_dense())
        assert first.merge(second).name == whole.name


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_a_moving_average(approximation):
    problem = routed()
    options = {"kfac_approx": approximation, "separate_weight_and_bias": False}
    old, new = (build("kfac", half(problem, part), **options) for part in (slice(0, 3), slice(3, 6)))
    mixed = old.moving_average(new, 0.9)
    a, b, found = ({p.names: p.block for p in op.blocks} for op in (old, new, mixed))
    for name in (("head.weight", "head.bias"), ("norm.weight",)):
        close(found[name].left, 0.9 * a[name].left + 0.1 * b[name].left)
        close(found[name].right, 0.9 * a[name].right + 0.1 * b[name].right)
    chain = mixed.moving_average(new, 0.5)
    name = ("head.weight", "head.bias")
    close({p.names: p.block for p in chain.blocks}[name].left, 0.5 * found[name].left + 0.5 * b[name].left)
    for op in (mixed, chain):
        assert torch.isfinite(op.inverse(0.1).to_dense()).all()
    close(old.moving_average(new, 1.0).to_dense(), old.to_dense())


def test_a_moving_average_of_diagonals_is_exact():
    problem = mlp()
    old, new = (build("diagonal", half(problem, part)) for part in (slice(0, 3), slice(3, 6)))
    close(old.moving_average(new, 0.7).diagonal(), 0.7 * old.diagonal() + 0.3 * new.diagonal())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("kfac", mlp(), fisher_type="mc"), "merge: expected the same settings"),
        (lambda: build("diagonal", mlp()), "merge: expected the same kind, got KFACLinearOperator and GGNDiagonal"),
        (lambda: build("kfac", routed()), "merge: expected the same space"),
        (lambda: build("kfac", (mlp()[0], nn.CrossEntropyLoss(reduction="sum"), *mlp()[2:])), "the same reduction"),
        (lambda: build("kfac", mlp(), rule=BlockRule(largest_factor=3)), r"Use the same rule=BlockRule"),
        (lambda: build("kfac", mlp()).moving_average(build("kfac", mlp()), 0.5), "moving average no longer knows"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        build("kfac", mlp()).merge(make())


@pytest.mark.parametrize("kind", ["kfac", "diagonal"])
def test_blocks_that_overlap_do_not_merge(kind):
    """The second half uses a part of a weight once more."""

    def forward(net, X):
        z = net.head(net.layer(X))
        return z @ net.head.weight[:, :2] if X[0, 0] < 0 else z

    model = seeded(lambda: Net(forward, layer=nn.Linear(3, 4), head=nn.Linear(4, 2)))
    X, y = real(3, 3).abs(), integers(2, 3)
    halves = [build(kind, (model, nn.CrossEntropyLoss(), sign * X, y)) for sign in (1, -1)]
    for first, second in (halves, halves[::-1]):
        with pytest.raises(ValueError, match=r"merge: 'head.weight' has blocks that overlap, here \w+ \("):
            first.merge(second)


@pytest.mark.parametrize("first,second", [((0, 2), (0, 3)), ((0, 3), (0, 2)), ((0, 3), (1, 4)), ((3, 4), (0, 4))])
@pytest.mark.parametrize("kind", ["kfac", "diagonal"])
def test_parts_of_a_table_that_overlap_add(kind, first, second):
    """As of positions, where batches differ in length."""
    shapes = {"layer": nn.Linear(2, 3), "table": nn.Parameter(real(4, 2))}

    def forward(net, X):
        begin, end = X[0, 0].int().tolist()
        return net.layer(torch.tanh(X[:, 1:] + net.table[begin:end])).sum(1)

    def inputs(begin, end, seed):
        ends = torch.tensor([begin, end], dtype=torch.float64).expand(3, 1, 2)
        return torch.cat([ends, real(3, end - begin, 2, seed=seed)], 1)

    model, loss = seeded(lambda: Net(forward, **shapes)), nn.CrossEntropyLoss()
    data = [(inputs(*ends, seed), integers(3, 3)) for seed, ends in enumerate((first, second))]
    make = {"kfac": KFACLinearOperator, "diagonal": GGNDiagonalLinearOperator}[kind]
    one, other, both = (
        make(model, loss, dict(model.named_parameters()), some, fisher_type="type-2")
        for some in ([data[0]], [data[1]], data)
    )
    close(one.merge(other).to_dense(), both.to_dense())
    average = one.moving_average(other, 0.3)["table"]
    close(average.to_dense(), 0.3 * one["table"].to_dense() + 0.7 * other["table"].to_dense())
    close(one.refresh([data[1]], decay=0.3)["table"].to_dense(), average.to_dense())
    close(
        one.merge(other).merge(one).to_dense(),
        make(model, loss, dict(model.named_parameters()), data + data[:1], fisher_type="type-2").to_dense(),
    )


@pytest.mark.parametrize("kind", ["ekfac", "kfoc"])
def test_what_does_not_add_is_refused(kind):
    op = build(kind, mlp())
    for combine in (lambda: op.merge(op), lambda: op.moving_average(op, 0.5)):
        with pytest.raises(ValueError, match="Merge or average a KFACLinearOperator"):
            combine()
    with pytest.raises(ValueError, match="decay: expected a number from 0 to 1, got 2"):
        op.moving_average(op, 2)


def psd(groups, size, seed):
    root = real(groups, size, size, seed=seed)
    return root @ root.mT


@pytest.mark.parametrize("seed", range(5))
def test_two_dense_terms(seed):
    terms = [(psd(2, 3, 4 * seed), psd(2, 4, 4 * seed + 1)), (psd(2, 3, 4 * seed + 2), psd(2, 4, 4 * seed + 3))]
    left, right = nearest_product(terms)
    for g in range(2):
        whole = sum(torch.kron(a[g], b[g]) for a, b in terms)
        close(torch.kron(left[g], right[g]), nearest_kronecker(whole, 3, 4))


def test_a_factor_that_is_diagonal_in_one_term_is_diagonal_in_both():
    diagonal, other = real(1, 3).square(), psd(1, 2, 1)
    dense, second = psd(1, 3, 2), psd(1, 2, 3)
    left, right = nearest_product([(diagonal, other), (dense, second)])
    assert left.shape == (1, 3) and right.shape == (1, 2, 2)
    kept = [(torch.diag(diagonal[0]), other[0]), (torch.diag(dense[0].diagonal()), second[0])]
    close(torch.kron(torch.diag(left[0]), right[0]), nearest_kronecker(sum(torch.kron(a, b) for a, b in kept), 3, 2))


def test_a_term_of_zeros_changes_nothing():
    a, b = psd(1, 3, 0), psd(1, 2, 1)
    left, right = nearest_product([(a, b), (torch.zeros_like(a), psd(1, 2, 2))])
    close(torch.kron(left[0], right[0]), torch.kron(a[0], b[0]))
    left, right = nearest_product([(torch.zeros_like(a), b), (torch.zeros_like(a), b)])
    assert not torch.kron(left[0], right[0]).any() and torch.isfinite(right).all()
