"""The closed-form gradient as a function of the output: its derivative is the Hessian product."""

from __future__ import annotations

import pytest
import torch
from problems import LOSSES

from curvops.losses import output_loss


@pytest.mark.parametrize("name", LOSSES)
def test_the_derivative_of_the_gradient_is_autograds(name: str) -> None:
    p = LOSSES[name]()
    loss = output_loss(p.loss, p.options.get("reduction"))
    z = p.model(p.X).detach().requires_grad_()
    curvature = loss.curvature(z.detach(), p.y, len(p.X))
    if not curvature.closed_form:
        with pytest.raises(ValueError, match="closed form"):
            curvature.gradient_at(z)
        return
    (slope,) = torch.autograd.grad(loss.curvature(z, p.y, len(p.X)).value(), z, create_graph=True)
    own = curvature.gradient_at(z)
    torch.testing.assert_close(own, slope, rtol=1e-12, atol=1e-14)
    us = torch.randn(3, *z.shape, generator=torch.Generator().manual_seed(0), dtype=z.dtype)
    for u in us:
        (expected,) = torch.autograd.grad(slope, z, u, retain_graph=True, allow_unused=True)
        (found,) = torch.autograd.grad(own, z, u, retain_graph=True)
        torch.testing.assert_close(found, torch.zeros_like(z) if expected is None else expected, rtol=1e-11, atol=1e-13)
    (together,) = torch.autograd.grad(own, z, us, retain_graph=True, is_grads_batched=True)
    torch.testing.assert_close(together[-1], found, rtol=1e-12, atol=1e-14)
