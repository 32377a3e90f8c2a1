"""Blocks of operators by the names of parameters and by numbers, against slices of the dense matrix."""

import pytest
import torch
from conformance import close, draws
from problems import PROBLEMS

from curvops import (
    DiagonalOperator,
    EFLinearOperator,
    EKFACLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    LinearOperator,
    OuterProductOperator,
    SubmatrixLinearOperator,
    TensorSpace,
)
from curvops.operators.block_diagonal import BlockDiagonalOperator

KINDS = {
    "hessian": HessianLinearOperator,
    "kfac": KFACLinearOperator,
    "joint kfac": lambda *a, **k: KFACLinearOperator(*a, separate_weight_and_bias=False, **k),
    "joint ekfac": lambda *a, **k: EKFACLinearOperator(*a, separate_weight_and_bias=False, **k),
    "sum": lambda *a, **k: EFLinearOperator(*a, **k) - 2 * KFACLinearOperator(*a, **k),
    "product": lambda *a, **k: GGNLinearOperator(*a, **k) @ HessianLinearOperator(*a, **k),
    "adjoint": lambda *a, **k: (KFACLinearOperator(*a, **k) @ HessianLinearOperator(*a, **k)).T,
    "damped": lambda *a, **k: HessianLinearOperator(*a, **k).damped(0.5),
    "square": lambda *a, **k: (lambda h: h @ h)(HessianLinearOperator(*a, **k)),
}
KEYS = [
    "0.*",
    "*.bias",
    "2.weight",
    ["2.bias", "0.weight"],
    "*",
    "0.b*",
    ("0.*", "2.*"),
    ("*.bias", ["0.*"]),
    ("*", "2.bias"),
]


def test_rows_and_columns_with_other_names():
    p = PROBLEMS["mlp"]()
    J = JacobianLinearOperator(p.model, p.params, p.data(6))
    with pytest.raises(KeyError, match=r"there are 'output'\. Its rows .* other names: op\['output', '0\.\*'\]\."):
        J["0.*"]
    with pytest.raises(KeyError, match=r"op\['0\.\*', 'output'\]"):
        J.T["0.*"]
    with pytest.raises(KeyError, match=r"matches '9\.\*'") as error:
        J["output", "9.*"]
    assert "other names" not in str(error.value)
    close(J["output", "0.*"].to_dense(), J.to_dense()[:, J.domain.positions(J.domain.match("0.*"))])


@pytest.mark.parametrize("key", [7, slice(0, 10), (0, 1)])
def test_numbers_in_brackets(key):
    with pytest.raises(TypeError, match=r"use SubmatrixLinearOperator\(op, rows, columns\)"):
        HessianLinearOperator(*PROBLEMS["mlp"]().args())[key]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("problem", ["mlp", "cnn"])
def test_blocks_by_name(kind, problem):
    p = PROBLEMS[problem]()
    op = KINDS[kind](*p.args())
    dense = op.to_dense()
    for key in KEYS:
        pair = key if isinstance(key, tuple) else (key, key)
        rows, columns = (op.domain.match(each) for each in pair)
        block = op[key]
        expected = dense[op.domain.positions(rows)][:, op.domain.positions(columns)]
        assert block.codomain.names == rows and block.domain.names == columns
        close(block.to_dense(), expected)
        v, u = draws(expected.shape[1], 2), draws(expected.shape[0], 2, seed=1)
        close(block @ v, expected @ v)
        close(block.T @ u, expected.T @ u)
        assert block.symmetric == (op.symmetric and rows == columns)
        assert block.psd == (op.psd and rows == columns)


@pytest.mark.parametrize("kind", ["transformer", "lstm", "odd"])
def test_blocks_of_other_problems(kind):
    p = PROBLEMS[kind]()
    op = KFACLinearOperator(*p.args(), separate_weight_and_bias=False)
    dense, names = op.to_dense(), op.domain.names
    for rows, columns in ((names[::2], names[::2]), (names[1::3], names[::2]), (names[:1], names[:1])):
        expected = dense[op.domain.positions(rows)][:, op.domain.positions(columns)]
        close(op[rows, columns].to_dense(), expected)


def test_whole_blocks_stay_blocks():
    op = KFACLinearOperator(*PROBLEMS["mlp"]().args(), fisher_type="type-2", separate_weight_and_bias=False)
    layer = op["2.*"]
    assert (
        isinstance(layer, BlockDiagonalOperator)
        and len(layer.blocks) == 1
        and layer.name == (f"{op.name}['2.weight', '2.bias']")
    )
    dense = op.to_dense()[16:, 16:] + 0.1 * torch.eye(15, dtype=op.dtype)
    close(layer.logdet(0.1), torch.logdet(dense))
    close(layer.damped(0.1).inverse().to_dense(), torch.linalg.inv(dense))
    assert not isinstance(op["2.bias"], BlockDiagonalOperator)
    assert isinstance((2 * op).damped(0.1)["2.*"], BlockDiagonalOperator)


def test_only_the_blocks_that_are_asked_for_are_multiplied(monkeypatch):
    op = KFACLinearOperator(*PROBLEMS["mlp"]().args(), separate_weight_and_bias=False)
    used = []
    for placed in op.blocks:
        matmul = placed.block.matmul
        monkeypatch.setattr(placed.block, "matmul", lambda c, n=placed.names, m=matmul: used.append(n) or m(c))
    op["0.weight"] @ draws(12)
    op["0.weight", "2.weight"] @ draws(12)
    assert used == [("0.weight", "0.bias")]


class Recording(LinearOperator):
    """Asks for the blocks' own way."""

    def __init__(self, space):
        super().__init__(space, symmetric=True)
        self.asked = []

    def _apply(self, columns):
        raise AssertionError("the whole is not to be computed")

    def _restricted(self, rows, columns):
        self.asked.append((rows.names, columns.names))
        u, v = (torch.ones(each.dim, dtype=torch.float64) for each in (rows, columns))
        return OuterProductOperator(u, v, rows, columns)


def test_sums_and_products_pass_the_restriction_on():
    space = TensorSpace({name: torch.zeros(2, dtype=torch.float64) for name in "abc"})
    op = Recording(space)
    (2 * op + op.damped(1.0))["b"] @ draws(2)
    assert op.asked == [(["b"], ["b"])] * 2
    op.asked.clear()
    (op @ (2 * op))["a", "c"]
    assert op.asked == [(["a"], ["a", "b", "c"]), (["a", "b", "c"], ["c"])]


def test_formats_of_a_block():
    op = HessianLinearOperator(*PROBLEMS["mlp"]().args())
    dense, v = op.to_dense(), draws(4)
    found = op["2.*", "0.bias"] @ {"0.bias": v}
    assert list(found) == ["2.weight", "2.bias"] and found["2.weight"].shape == (3, 4)
    close(found["2.bias"], dense[28:, 12:16] @ v)


@pytest.mark.parametrize(
    "key,error,message",
    [
        ("1.weight", KeyError, r"no parameter's name matches '1\.weight'; near: .*'0\.weight'"),
        (["0.*", "head.*"], KeyError, r"matches 'head\.\*'"),
        (("0.*", "zzz"), KeyError, "matches 'zzz'; there are '0.weight', '0.bias', '2.weight', '2.bias'"),
        (0, TypeError, "got 0. For entries by number use SubmatrixLinearOperator"),
        (slice(2), TypeError, "SubmatrixLinearOperator"),
        (("0.*", "2.*", "0.*"), TypeError, "a pair for rows and columns"),
    ],
)
def test_what_is_no_key(key, error, message):
    with pytest.raises(error, match=message):
        HessianLinearOperator(*PROBLEMS["mlp"]().args())[key]


def test_an_operator_is_no_sequence():
    with pytest.raises(TypeError, match="not iterable"):
        list(DiagonalOperator(draws(3)))


INDICES = [
    [3, 1],
    slice(2, 9, 3),
    torch.tensor([0, -1]),
    range(4),
    torch.arange(31) % 4 == 0,
    [5, 5, 2],
    [],
    slice(0, 0),
]


@pytest.mark.parametrize("rows", INDICES, ids=str)
@pytest.mark.parametrize("kind", ["hessian", "product"])
def test_entries_by_number(kind, rows):
    op = KINDS[kind](*PROBLEMS["mlp"]().args())
    dense = op.to_dense()
    for columns in (*INDICES, None):
        i, j = (
            list(each) if isinstance(each, range) else each for each in (rows, rows if columns is None else columns)
        )
        i, j = (torch.tensor(each, dtype=torch.long) if each == [] else each for each in (i, j))
        expected = dense[i][:, j]
        part = SubmatrixLinearOperator(op, rows, columns)
        assert part.shape == tuple(expected.shape)
        close(part.to_dense(), expected)
        close(part.T @ draws(part.shape[0]), expected.T @ draws(part.shape[0]))
        numbers = torch.arange(31)
        assert part.symmetric == (op.symmetric and torch.equal(numbers[i], numbers[j]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_numbers_of_narrow_types(dtype):
    """Which cannot hold the dimension."""
    op = DiagonalOperator(torch.arange(300.0).double())
    close(
        SubmatrixLinearOperator(op, torch.tensor([100, 1], dtype=dtype)).to_dense(),
        torch.diag(draws(2) * 0 + torch.tensor([100.0, 1.0])),
    )
    if dtype != torch.uint8:
        close(
            SubmatrixLinearOperator(op, torch.tensor([-100], dtype=dtype)).to_dense(), torch.tensor([[200.0]]).double()
        )


@pytest.mark.parametrize(
    "rows,error,message",
    [
        ([31], IndexError, "rows: expected numbers below 31, got 31 to 31"),
        ([-32], IndexError, "rows: expected numbers below 31"),
        ([0.5], TypeError, r"got torch\.float32"),
        ([[1]], TypeError, r"shape \(1, 1\)"),
        (torch.ones(3, dtype=torch.bool), TypeError, "a mask of 31 entries"),
    ],
)
def test_what_is_no_index(rows, error, message):
    with pytest.raises(error, match=message):
        SubmatrixLinearOperator(HessianLinearOperator(*PROBLEMS["mlp"]().args()), rows)


def test_slices_backwards_and_names():
    op = DiagonalOperator(draws(5))
    for rows in (slice(None, None, -1), slice(4, 0, -2), slice(-2, None), slice(3, 1)):
        expected = op.to_dense().numpy()[rows][:, rows]
        close(SubmatrixLinearOperator(op, rows).to_dense(), torch.from_numpy(expected.copy()))
    for names in ("0.*", ["0.*", "b"]):
        with pytest.raises(TypeError, match=r"expected numbers, got .* For parameters by name take op\["):
            SubmatrixLinearOperator(op, names)
