"""Losses of one's own, whose output factors take as many products with their Hessian as there are classes."""

import pytest
import torch
from conformance import close, draws
from torch import nn

from curvops import GGNLinearOperator
from curvops.losses import autodiff
from curvops.losses.autodiff import AutodiffCurvature


@pytest.mark.parametrize("columns", [1, 3])
def test_products_make_no_factor_of_a_loss_of_ones_own(columns, monkeypatch):
    """It has as many columns as there are classes, each of which takes a product with the loss's Hessian."""
    monkeypatch.setattr(AutodiffCurvature, "_root", property(lambda _: pytest.fail("the factor is not asked for")))
    model, X, y = nn.Linear(4, 50).double(), draws(6, 4), torch.arange(6)

    def loss(z, y):
        return nn.functional.cross_entropy(z, y, reduction="sum")

    V, given = draws(250, columns), (dict(model.named_parameters()), [(X, y)])
    expected = GGNLinearOperator(model, nn.CrossEntropyLoss(reduction="sum"), *given) @ V
    close(GGNLinearOperator(model, loss, *given, reduction="sum") @ V, expected)


def test_factors_beyond_memory_are_refused(monkeypatch):
    monkeypatch.setattr(autodiff, "free_memory", lambda _: 2**24)
    model, loss = nn.Linear(2, 200).double(), lambda z, y: (z - y).cosh().sum()
    op = GGNLinearOperator(
        model, loss, dict(model.named_parameters()), [(draws(60, 2), draws(60, 200))], reduction="sum", mc_samples=1
    )
    with pytest.raises(
        MemoryError, match=r"the output Hessian of each of 60 terms with 200 entries, 19.2 MB\. Pass one of"
    ):
        op @ draws(op.shape[1])
