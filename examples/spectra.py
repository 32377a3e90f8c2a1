"""The spectrum of a trained network: both ends, the density in between, and what the loss does along eigenvectors."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from curvops import HessianLinearOperator
from curvops.plots import (
    plot_convergence,
    plot_eigenvectors_by_layer,
    plot_loss_along,
    plot_loss_plane,
    plot_spectral_density,
)
from curvops.spectrum import EigenPairs, SpectralDensity
from curvops.tour import digits, save_figure


def spectrum(hessian: HessianLinearOperator, ends: int, starts: int = 4) -> tuple[EigenPairs, SpectralDensity]:
    """Eigenpairs at both ends, and the density with those at the upper end taken out as outliers.

    Args:
        hessian: Of a trained network; its batches' graphs are kept in the meantime.
        ends: Eigenpairs at each end; C − 1 for C classes holds the outliers at the upper one.
        starts: Start vectors of the density. More of them make its error band narrower.
    """
    with hessian.linearized():
        pairs = hessian.eigenpairs(ends, "both")
        upper = hessian.eigenpairs(ends, start=pairs)
        return pairs, hessian.spectral_density(deflate=upper, num_vectors=starts, depth=40)


def save_plots(
    hessian: HessianLinearOperator, pairs: EigenPairs, density: SpectralDensity, exact: Tensor, folder: Path
) -> None:
    first, second = pairs.vectors[:, -1], pairs.vectors[:, -2]
    traces = [hessian.trace(num_products=m) for m in (6, 12, 24, 48)]
    steps = torch.linspace(-1, 1, 9)
    plots = {
        "density": plot_spectral_density(density),
        "layers": plot_eigenvectors_by_layer(pairs),
        "trace": plot_convergence(traces, exact.sum()),
        "loss_along": plot_loss_along(hessian, first, steps=torch.linspace(-1, 1, 21)),
        "loss_plane": plot_loss_plane(hessian, first, second, steps=steps),
    }
    for name, ax in plots.items():
        print(save_figure(ax.figure, folder / f"{name}.png"))


def main(folder: str | None = None) -> None:
    _, setup = digits(epochs=3, num_data=100, dtype=torch.float64)
    hessian = HessianLinearOperator.of(setup.risk())
    ends = 9
    pairs, density = spectrum(hessian, ends)
    exact = torch.linalg.eigvalsh(hessian.to_dense())
    print(
        f"{pairs.products} products for {ends} eigenpairs at each end, {density.products} for the density of {density.dim}"
    )
    print("largest", *(f"{value:.3f}" for value in pairs.values[ends:].flip(0).tolist()))
    print("least  ", *(f"{value:.3f}" for value in pairs.values[:ends].tolist()))

    torch.testing.assert_close(
        pairs.values, torch.cat([exact[:ends], exact[-ends:]]), rtol=0, atol=1e-10 * exact[-1].item()
    )
    points = torch.tensor([-0.1, 0.1, 1.0])
    _, found, errors = density.cumulative(points)
    true = (exact <= points.unsqueeze(1)).double().mean(1)
    for point, part, error, right in zip(points.tolist(), found.tolist(), errors.tolist(), true.tolist(), strict=True):
        print(f"eigenvalues up to {point:5.2f}: {part:.3f} ± {error:.3f}, in truth {right:.3f}")
    assert ((found - true).abs() < 4 * errors + 0.005).all()  # a node of the quadrature stands for several eigenvalues
    with TemporaryDirectory() as temporary:
        target = Path(folder or temporary)
        target.mkdir(parents=True, exist_ok=True)
        save_plots(hessian, pairs, density, exact, target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="where the plots stay; without it they are only tried")
    main(**vars(parser.parse_args()))
