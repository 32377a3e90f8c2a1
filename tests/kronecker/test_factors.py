"""When factors and blocks become diagonals, and what the arguments of an operator may be."""

import itertools

import pytest
import torch
from torch import nn

from curvops import BlockRule, KFACLinearOperator
from kronecker.cases import build, close, dense_ggn, mlp, plan, real, seeded, tokens


def test_a_large_factor_is_its_diagonal():
    dense, diagonal = (build("kfac", mlp(), rule=BlockRule(largest_factor=size)) for size in (4, 3))
    for a, b in zip(dense.blocks, diagonal.blocks, strict=True):
        for full, kept in ((a.block.left, b.block.left), (a.block.right, b.block.right)):
            if full.shape[-1] > 3:
                assert kept.ndim == 2
                close(kept, full.diagonal(dim1=1, dim2=2))
            else:
                assert torch.equal(kept, full)
    rows = {row.names[0]: row.block for row in diagonal.explain().rows}
    assert rows == {
        "0.weight": "Kronecker diag 4 ⊗ 3",
        "0.bias": "diagonal 4",
        "2.weight": "Kronecker 3 ⊗ diag 4",
        "2.bias": "dense 3",
    }


def test_a_large_block_is_its_diagonal():
    ggn = dense_ggn(tokens())
    for size, ndim in ((3, 3), (2, 2)):
        op = build("kfac", tokens(), rule=BlockRule(largest_block=size))
        (placed,) = [p for p in op.blocks if p.names == ("norm.weight",)]
        assert placed.block.left.ndim == ndim
        where = placed.positions
        expected = ggn[where[:, None], where]
        close(placed.block.dense(), expected if ndim == 3 else torch.diag(expected.diagonal()))


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "kfoc"])
@pytest.mark.parametrize("planned", [True, False])
def test_diagonals_can_be_forbidden(kind, planned):
    factor = r"'hidden\.weight': a Kronecker factor of side 4 is beyond largest_factor=3, and diagonals are not"
    block = r"'norm\.weight': a block of side 3 is beyond largest_block=2, .* rule=BlockRule\(largest_block=3\)"
    for limit, message in (({"largest_factor": 3}, factor), ({"largest_block": 2}, block)):
        rule = BlockRule(**limit, allow_diagonal=False)
        with pytest.raises(ValueError, match=message):
            (plan if planned else build)(kind, tokens(), rule=rule, check_deterministic=False)


def test_the_inputs_of_an_embedding_are_diagonal_by_nature():
    op = build("kfac", tokens(), rule=BlockRule(allow_diagonal=False))
    rows = {row.names[0]: row for row in op.explain().rows}
    assert rows["embedding.weight"].block == "Kronecker diag 5 ⊗ 3"


class Bags(nn.Module):
    def __init__(self, mode, padding):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(6, 3, mode=mode, padding_idx=padding), nn.Linear(3, 2)

    def forward(self, X):
        return self.head(self.bag(X["ids"], X["offsets"]))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("padding", [None, 1])
def test_bags_of_different_lengths(mode, approximation, padding):
    """Each id is looked up once, and what fills up shorter bags is no row: whatever batch a bag is in."""
    model, ids = seeded(lambda: Bags(mode, padding)), torch.tensor([0, 1, 2, 3, 1, 1, 5])
    ends, y = [0, 1, 4, 4, 7], seeded(lambda: real(4, 2))  # of which the third is empty

    def cut(a, b):
        offsets = torch.tensor(ends[a:b]) - ends[a]
        return {"ids": ids[ends[a] : ends[b]], "offsets": offsets}, y[a:b]

    found = [
        KFACLinearOperator(
            model,
            nn.MSELoss(),
            dict(model.named_parameters()),
            [cut(a, b) for a, b in itertools.pairwise(cuts)],
            fisher_type="type-2",
            kfac_approx=approximation,
            batch_size_fn=lambda X: len(X["offsets"]),
        )
        for cuts in ([0, 4], [0, 1, 4], [0, 2, 3, 4], [0, 1, 2, 3, 4])
    ]
    for op in found[1:]:
        close(op.to_dense(), found[0].to_dense())
    (block,) = [placed.block for placed in found[0].blocks if placed.names == ("bag.weight",)]
    counts = torch.tensor([[1.0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 2, 0, 0, 0, 1]]).double()  # of ids in bags
    counts[:, [] if padding is None else [padding]] = 0
    shares = (counts / counts.sum(1, keepdim=True)).square().sum(0) / 4  # of four bags
    close(block.left[0], counts.sum(0) / counts.sum() if approximation == "expand" else shares)


@pytest.mark.parametrize("terms", [2, None])
def test_the_number_of_loss_terms_is_compared(terms):
    op = build("kfac", tokens(), num_per_example_loss_terms=terms)
    close(op.to_dense(), build("kfac", tokens()).to_dense())
    for make in (build, plan):
        message = r"num_per_example_loss_terms: expected 3, the model's output has 2\. Leave"
        with pytest.raises(ValueError, match=message):
            make("kfac", tokens(), num_per_example_loss_terms=3)


def test_wrong_arguments():
    for option, value, expected in (
        ("fisher_type", "exact", "one of 'type-2', 'mc', 'empirical', 'forward-only', got 'exact'"),
        ("kfac_approx", "sum", "one of 'expand', 'reduce', got 'sum'"),
        ("mc_samples", 0, "a number ≥ 1, got 0"),
    ):
        with pytest.raises(ValueError, match=f"{option}: expected {expected}"):
            build("kfac", mlp(), **{option: value})


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_forward_only_is_the_inputs_moment(approximation):
    """B is the identity, and the constant of the loss does not enter."""
    model = seeded(lambda: nn.Linear(3, 2))
    X = real(6, 4, 3)
    for reduction in ("mean", "sum"):
        problem = model, nn.MSELoss(reduction=reduction), X, real(6, 4, 2)
        op = build("kfac", problem, 4, 2, fisher_type="forward-only", kfac_approx=approximation)
        rows = X.flatten(0, 1) if approximation == "expand" else X.mean(1)
        expected = torch.kron(torch.eye(2, dtype=torch.float64), rows.T @ rows / len(rows))
        where = op.domain.slice("weight")
        close(op.to_dense()[where, where], expected)
        close(op.to_dense()[op.domain.slice("bias"), op.domain.slice("bias")], torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("wrong", [-1, None, "a", 0.5])
def test_a_number_of_passes_is_one(wrong):
    with pytest.raises(ValueError, match=r"most_passes: expected a number of backward passes, at least 0, got"):
        BlockRule(most_passes=wrong)
