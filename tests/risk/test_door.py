"""What is told at the door: noise, inputs, targets and parameters that do not fit."""

import pytest
import torch
from conformance import draws
from kronecker.cases import Net
from torch import nn

from curvops import HessianLinearOperator, KFACLinearOperator

X, Y = draws(6, 3), torch.tensor([0, 1, 1, 0, 1, 0])
LOSS = nn.CrossEntropyLoss()


def make(cls, model, params=None, data=((X, Y),), loss=LOSS, **options):
    if cls is KFACLinearOperator:
        options = {"fisher_type": "type-2", **options}
    return cls(model, loss, dict(model.named_parameters()) if params is None else params, list(data), **options)


def test_noise_varies_with_the_random_generators():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 2)).double()
    with pytest.raises(
        RuntimeError, match=r"check_deterministic=False to accept products that vary with the state of the"
    ):
        make(HessianLinearOperator, model)
    op, v = make(HessianLinearOperator, model, check_deterministic=False), draws(20)
    first = op @ v
    assert torch.equal(first, op @ v)
    torch.manual_seed(1)
    assert not torch.allclose(first, op @ v)


def test_noise_of_a_seed_in_forward_is_the_same_for_each_batch(model):
    def forward(net, x, generator):
        return net.inner(x + torch.randn(x.shape, dtype=x.dtype, generator=generator))

    with pytest.raises(RuntimeError, match=r"be part of X\. Drawn with a seed .* the matrix depends on the batches"):
        make(HessianLinearOperator, Net(lambda net, x: forward(net, x, None), inner=model))
    net = Net(lambda net, x: forward(net, x, torch.Generator().manual_seed(1)), inner=model)
    whole, halves = (
        make(HessianLinearOperator, net, data=data) for data in ([(X, Y)], [(X[:3], Y[:3]), (X[3:], Y[3:])])
    )
    assert not torch.allclose(whole.to_dense(), halves.to_dense())


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: lambda params, X: model(X)])
def test_inputs_of_another_precision(model, cls, wrap):
    params = dict(model.named_parameters())
    with pytest.raises(RuntimeError, match=r"same dtype.*X has float32, the parameters float64: .* convert X yourself"):
        make(cls, wrap(model), params, data=[(X.float(), Y)])

    def failing(params, X):
        raise RuntimeError("own")

    with pytest.raises(RuntimeError, match=r"^own$"):
        make(cls, failing, params, data=[(X.float(), Y)])


@pytest.mark.parametrize(
    ("loss", "targets", "error", "message"),
    [
        (LOSS, None, TypeError, "'CrossEntropyLoss' takes targets, and y is None"),
        (nn.MSELoss(), None, TypeError, "'MSELoss' takes targets, and y is None"),
        (nn.BCEWithLogitsLoss(), torch.stack([Y, Y], 1), ValueError, r"floating-point targets, got torch\.int64"),
    ],
)
def test_targets_that_a_loss_does_not_take(model, cls, loss, targets, error, message):
    with pytest.raises(error, match=message):
        make(cls, model, data=[(X, targets)], loss=loss)


def test_parameters_without_values(cls):
    model = nn.Linear(3, 2, device="meta")
    with pytest.raises(
        ValueError, match=r"'weight', 'bias' are on the meta device and have no values\. Load the model"
    ):
        make(cls, model)
    if cls is KFACLinearOperator:
        with pytest.raises(ValueError, match=r"meta device .* plan\(\), too, runs the model"):
            cls.plan(model, LOSS, dict(model.named_parameters()), [(X, Y)])
