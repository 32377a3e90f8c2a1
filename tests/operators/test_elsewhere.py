"""Methods that an operator lacks: the error says who has them."""

import copy

import pytest
import torch
from problems import PROBLEMS

from curvops import GGNLinearOperator, KFACLinearOperator, LinearOperator, block_diagonal, load
from curvops.kronecker.operator import StateOperator
from curvops.operators.block_diagonal import BlockDiagonalOperator
from curvops.operators.elsewhere import OWNERS


def test_who_lacks_what(tmp_path):
    ggn, kfac = (kind(*PROBLEMS["mlp"]().args()) for kind in (GGNLinearOperator, KFACLinearOperator))
    kfac.save(tmp_path / "kfac")
    saved, blocks = ("save", "merge", "moving_average"), ("power", "det", "sample", "eigenvalues")
    made = tuple(OWNERS.keys() - {*saved, *blocks})
    for op, lacks, message in (
        (load(tmp_path / "kfac"), made, r"KFACLinearOperator \(StateOperator\): it has no .* made of a model and data"),
        (
            600 * kfac,
            saved + made,
            r"600 · KFACLinearOperator \(StructuredOperator\): it has no .*Kronecker operators have it",
        ),
        (kfac["0.*"], saved + made, "it has no .*Kronecker operators have it"),
        (ggn, saved + made, "GGNLinearOperator: it has no .*Kronecker operators have it"),
        (ggn, blocks, "GGNLinearOperator: it has no .*Operators of blocks have it"),
        (LinearOperator, tuple(OWNERS), r"LinearOperator: it has no \w+\(\)"),
    ):
        assert [name for name in lacks if hasattr(op, name)] == []
        for name in lacks:
            with pytest.raises(AttributeError, match=message):
                getattr(op, name)
        copy.copy(op)


def test_who_has_it():
    assert all(hasattr(KFACLinearOperator, name) for name in OWNERS)
    assert all(hasattr(StateOperator, name) for name in ("save", "merge", "moving_average"))
    assert all(hasattr(BlockDiagonalOperator, name) for name in ("power", "det", "sample", "eigenvalues"))
    with pytest.raises(AttributeError, match="object has no attribute 'nothing'"):
        _ = block_diagonal({"a": torch.eye(1)}).nothing
