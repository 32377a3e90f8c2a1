"""Dense derivatives of PyTorch's own losses, by autograd in float64."""

import torch


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


def check_closed_form(loss, torch_loss, z, y, batch_size):
    def total(z):
        return torch_loss(z, y)

    curvature = loss.curvature(z, y, batch_size)
    assert curvature.psd
    leaf = z.clone().requires_grad_()
    close(loss.curvature(leaf, y, batch_size).value(), total(z))
    close(hessian(lambda z: loss.curvature(z, y, batch_size).value(), z), hessian(total, z))
    close(curvature.outputs(curvature.gradient()), gradient(total, z))
    H = hessian(total, z)
    eye = torch.eye(z.numel(), dtype=torch.float64)
    products = [curvature.hessian_product(e.reshape(z.shape)).reshape(-1) for e in eye]
    close(torch.stack(products), H)
    exact = curvature.factor("type-2")
    check_factor(exact)
    close(factor_matrix(curvature, exact), H)
    rows = curvature.rows(z)
    assert rows.shape == (curvature.num_terms, curvature.width)
    assert torch.equal(curvature.outputs(rows), z)
    assert curvature.factor("forward-only").dense().shape == (*rows.shape, 0)
    return curvature
