"""What a pass over a batch takes down of its operations, however these are called."""

import pytest
import torch
import torch.nn.functional as F
from conformance import close, draws
from kronecker.cases import Net
from oracles import Case, real
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvops import EFLinearOperator, EKFACLinearOperator, GGNLinearOperator, HessianLinearOperator
from curvops.sharding import LEAST

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


def ragged(rows, layout):
    """Rows of several lengths, from 1 to 3."""
    return torch.nested.as_nested_tensor([row[: k % 3 + 1] for k, row in enumerate(rows)], layout=layout)


def padded(parts):
    return torch.stack([F.pad(part, (0, 0, 0, 3 - len(part))) for part in parts])


NESTED = {
    "strided": lambda n, X: torch.nested.to_padded_tensor(ragged(n.first(X).sin(), torch.strided), 0.0, (len(X), 3, 3)),
    "strided, in parts": lambda n, X: padded(ragged(n.first(X), torch.strided).unbind()).sin(),
    "jagged": lambda n, X: padded(
        n.first(ragged(X, torch.jagged)).tanh().values().split([k % 3 + 1 for k in range(len(X))])
    ),
    "jagged, other axes": lambda n, X: padded(
        torch.sin(n.first(ragged(X, torch.jagged)).transpose(1, 2))
        .transpose(1, 2)
        .values()
        .split([k % 3 + 1 for k in range(len(X))])
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("way", NESTED)
def test_nested_tensors_that_a_model_makes(way):
    net = Net(lambda n, X: n.head(NESTED[way](n, X).tanh().sum(1)), first=nn.Linear(2, 3), head=nn.Linear(3, 2))
    data = [(real(5, 3, 2), torch.tensor([0, 1, 1, 0, 1])), (real(2, 3, 2, seed=1), torch.tensor([1, 0]))]
    case = Case(net.double(), nn.CrossEntropyLoss(), data)
    try:
        case.truth("Hessian")
    except RuntimeError as error:  # of a PyTorch without second derivatives of these, which says so
        assert torch.__version__ < LEAST and "is not differentiable" in str(error)
        with pytest.raises(RuntimeError, match="is not differentiable"):
            case.make("Hessian", check_deterministic=False) @ torch.ones(17, dtype=torch.float64)
    else:
        case.check("Hessian", "GGN", "EF")
    for kind in ("KFAC", "EKFAC"):
        with pytest.raises(
            NotImplementedError, match=r"model: it makes nested tensors, and Kronecker .* none\. Pad them"
        ):
            case.make(kind)
