"""What a pass over a batch takes down of its operations, however these are called."""

import pytest
import torch
import torch.nn.functional as F
from conformance import close, draws
from kronecker.cases import Net
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvops import EFLinearOperator, EKFACLinearOperator, GGNLinearOperator, HessianLinearOperator

PLACED = {
    "convolution": lambda n, X: n.head(F.conv1d(X.unsqueeze(1), n.c.weight, n.c.bias).tanh().mean(2)),
    "linear": lambda n, X: n.head(F.linear(X, n.a.weight, n.a.bias).tanh()),
    "product": lambda n, X: n.head(torch.matmul(X, n.w).tanh()),
    "attention": lambda n, X: n.head(
        F.scaled_dot_product_attention(*[n.a(X).view(-1, 1, 1, 3).expand(-1, 1, 2, 3)] * 3)[:, 0, 0]
    ),
}
NAMED = {
    "convolution": lambda n, X: n.head(F.conv1d(bias=n.c.bias, weight=n.c.weight, input=X.unsqueeze(1)).tanh().mean(2)),
    "linear": lambda n, X: n.head(F.linear(weight=n.a.weight, input=X, bias=n.a.bias).tanh()),
    "product": lambda n, X: n.head(torch.matmul(input=X, other=n.w).tanh()),
}


def flash(n, X):
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        return PLACED["attention"](n, X)


@pytest.mark.parametrize("way", [*NAMED, "attention"])
@pytest.mark.parametrize("kind", [HessianLinearOperator, GGNLinearOperator, EFLinearOperator, EKFACLinearOperator])
def test_calls_by_keyword_and_kernels_of_the_models_own(way, kind):
    own = {"convolution": {"c": nn.Conv1d(1, 3, 2)}, "product": {"w": nn.Parameter(draws(4, 3))}}.get(
        way, {"a": nn.Linear(4, 3)}
    )
    model = Net(PLACED[way], head=nn.Linear(3, 3), **own).double()
    other = Net(NAMED.get(way, flash), **own, head=model.head).double()
    data = [(draws(5, 4), torch.tensor([0, 1, 2, 1, 0]))]
    expected, found = (
        kind(net, nn.CrossEntropyLoss(), dict(model.named_parameters()), data).to_dense() for net in (model, other)
    )
    close(found, expected)
