"""Dense derivatives of PyTorch's own losses, by autograd in float64."""

import copy

import pytest
import torch

from curvops.losses import output_loss


def gradient(total, z):
    z = z.detach().requires_grad_()
    (g,) = torch.autograd.grad(total(z), z)
    return g


def hessian(total, z):
    columns = torch.autograd.functional.hessian(total, z.detach(), vectorize=True)
    return columns.reshape(z.numel(), z.numel())


def close(a, b, tol=1e-11):
    scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
    torch.testing.assert_close(a, b, rtol=0, atol=tol * scale)


def count(loss, *batches):
    """What the mean divides by, on one walk over batches (z, y, number of data)."""
    walk = loss.walk()
    for batch in batches:
        walk.curvature(*batch)
    return 1 / walk.constant()


def factor_matrix(curvature, factor):
    """The block-diagonal matrix of all S_t S_tᵀ over the flattened output."""
    # position of every entry of the rows within the flattened output
    places = curvature.rows(torch.arange(curvature.z.numel()).reshape(curvature.z.shape)).flatten()
    dense = factor.dense()
    matrix = torch.zeros(len(places), len(places), dtype=torch.float64)
    matrix[places[:, None], places] = torch.block_diag(*(dense @ dense.mT))
    return matrix


def check_factor(factor):
    dense = factor.dense()
    assert dense.shape == (factor.num_terms, factor.width, factor.num_columns)
    for k in range(factor.num_columns):
        torch.testing.assert_close(factor.column(k), dense[..., k])
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(factor.num_terms, factor.width, generator=generator, dtype=torch.float64)
    expected = (dense @ (dense.mT @ u.unsqueeze(-1))).squeeze(-1)
    close(factor.product(u), expected)


def differences(total, z):
    """The Hessian by central differences of PyTorch's own gradient."""
    columns = []
    for step in 1e-5 * torch.eye(z.numel(), dtype=z.dtype):
        ahead, behind = (gradient(total, z + sign * step.view_as(z)) for sign in (1, -1))
        columns.append((ahead - behind).flatten() / 2e-5)
    return torch.stack(columns)


def check_loss(module, z, y, size, root=None):
    """All that a loss gives, beside PyTorch's own; `root` times the gradient is the empirical factor."""
    plain = copy.deepcopy(module)
    plain.reduction = "sum"

    def total(z):
        return plain(z, y)

    loss = output_loss(module)
    curvature = loss.curvature(z, y, size)
    leaf = z.clone().requires_grad_()
    close(loss.curvature(leaf, y, size).value(), total(z))
    close(curvature.outputs(curvature.gradient()), gradient(total, z))
    eye = torch.eye(z.numel(), dtype=torch.float64)
    H = torch.stack([curvature.hessian_product(e.reshape(z.shape)).reshape(-1) for e in eye])
    if curvature.closed_form:
        close(H, hessian(total, z))
        close(hessian(lambda z: loss.curvature(z, y, size).value(), z), H)
    else:
        close(H, differences(total, z), 1e-8)
    exact, empirical = curvature.factor("type-2"), curvature.factor("empirical")
    for factor in (exact, empirical):
        check_factor(factor)
    close(factor_matrix(curvature, exact), H)
    rows = curvature.rows(z)
    assert rows.shape == (curvature.num_terms, curvature.width)
    assert torch.equal(curvature.outputs(rows), z)
    assert curvature.factor("forward-only").dense().shape == (*rows.shape, 0)
    if root is not None:
        close(empirical.dense()[..., 0], curvature.rows(root * gradient(total, z)))
    # the shares of a cut add up, and give the mean
    cuts = ((0, 1), (1, len(z))) if z.ndim and size == len(z) > 1 else ((0, None),)
    batches = [(z[a:b], y[a:b], len(z[a:b])) for a, b in cuts] if len(cuts) > 1 else [(z, y, size)]
    mean = copy.deepcopy(module)
    mean.reduction = "mean" if module.reduction == "sum" else module.reduction
    if mean(z, y).isfinite():
        close(curvature.value() / count(output_loss(mean), *batches), mean(z, y))
    else:
        with pytest.raises(ValueError, match="the mean runs over 0 entries"):
            count(output_loss(mean), *batches)
    return curvature
