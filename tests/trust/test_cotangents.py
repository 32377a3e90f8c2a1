"""Vectors and cotangents that PyTorch differentiates: in memory that it can see otherwise, and away from zero."""

import pytest
import torch
from oracles import Case, close, real
from torch import nn

import curvops
from trust.support import CE, Model, data


@pytest.mark.parametrize("outputs, dim", [(3, 22), (4, 27)])
def test_weights_that_are_seen_as_complex_numbers(outputs, dim):
    """Behind a number, so that they begin at an odd entry of a vector, one of several that are odd or even in length."""

    class Filter(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.filter = nn.Parameter(real(1)), nn.Parameter(real(3, 2))
            self.head = nn.Linear(4, outputs)

        def forward(self, X):
            spectrum = torch.fft.rfft(self.scale * X, n=4) * torch.view_as_complex(self.filter)
            return self.head(torch.fft.irfft(spectrum, n=4).tanh())

    case = Case(Filter().double(), nn.CrossEntropyLoss(), data())
    case.check("Hessian", "GGN", "EF", "EKFAC", "GGNDiagonal")
    for kind in ("Hessian", "GGN", "EF"):
        op = case.make(kind, check_deterministic=True)
        V = real(dim, 5, seed=2)
        close(op @ V, torch.stack([op @ v for v in V.T], 1))
        parts = op @ list(op.domain.split(V[:, 0]))
        assert torch.view_as_complex(parts[1]).shape == (3,)


class LogBackward(torch.autograd.Function):
    """The identity, with a backward pass in logarithms, as that of `logcumsumexp`."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return torch.where(g > 0, g.clamp(min=1e-300).log().exp(), -(-g).clamp(min=1e-300).log().exp())


IN_LOGARITHMS = {"logcumsumexp": lambda h: torch.logcumsumexp(h, 1), "of one's own": LogBackward.apply}


@pytest.mark.parametrize("way", IN_LOGARITHMS)
def test_backward_passes_without_a_derivative_at_zero(way):
    case = Case(Model(lambda m, X: IN_LOGARITHMS[way](m.b(m.a(X).tanh()))), CE, data())
    for kind in ("Hessian", "GGN", "EF"):
        assert "second derivatives: right (within" in case.make(kind, check_deterministic=True).explain()
    case.check("Hessian", "GGN", "EF", "EKFAC", "GGNDiagonal")
    v = real(sum(p.numel() for p in case.params.values()))
    J = curvops.JacobianLinearOperator(case.model, case.params, case.data)
    close(J @ v, J.to_dense() @ v)
