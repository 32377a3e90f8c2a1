"""The plots draw the numbers that they are given, on the axes that they are given."""

import re
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from curvops import GGNLinearOperator, HessianLinearOperator, KFACLinearOperator
from curvops.estimators import trace
from curvops.plots import (
    plot_convergence,
    plot_eigenvectors_by_layer,
    plot_loss_along,
    plot_loss_plane,
    plot_spectral_density,
)
from curvops.spectrum import eigenpairs, spectral_density

MATRIX = torch.diag(torch.cat([torch.linspace(-1, 1, 58), torch.tensor([30.0, 50.0])]).double())


def hessian(loss=None, operator=HessianLinearOperator):
    generator = torch.Generator().manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    X, y = (torch.rand(6, k, dtype=torch.float64, generator=generator) for k in (3, 2))
    return operator(model, loss or torch.nn.MSELoss(), dict(model.named_parameters()), [(X[:4], y[:4]), (X[4:], y[4:])])


def density(outliers=2, num_vectors=4):
    deflate = eigenpairs(MATRIX, outliers) if outliers else None
    return spectral_density(MATRIX, num_vectors=num_vectors, depth=20, deflate=deflate)


PLOTS = {
    "density": lambda ax: plot_spectral_density(density(), ax=ax),
    "layers": lambda ax: plot_eigenvectors_by_layer(hessian().eigenpairs(3), ax=ax),
    "convergence": lambda ax: plot_convergence([trace(MATRIX, num_products=9)], ax=ax),
    "along": lambda ax: plot_loss_along(hessian(), torch.ones(26).double(), ax=ax),
    "plane": lambda ax: plot_loss_plane(hessian(), *torch.eye(26)[:2].double(), steps=torch.linspace(-1, 1, 3), ax=ax),
}


@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)
def test_given_axes_come_back_new_ones_have_a_figure_of_their_own_and_settings_stay(plot):
    settings = dict(plt.rcParams)
    _, own = plt.subplots()
    assert plot(own) is own and len(plt.get_fignums()) == 1
    new = plot(None)
    assert new.figure is not own.figure and len(plt.get_fignums()) == 2
    assert new.xaxis.label.get_fontfamily() == ["STIXGeneral"] and own.xaxis.label.get_fontfamily() != ["STIXGeneral"]
    assert dict(plt.rcParams) == settings


@pytest.mark.parametrize("scale", ["linear", "symlog"])
def test_density_its_band_and_its_outliers_are_drawn(scale):
    found = density()
    ax = plot_spectral_density(found, scale=scale, errors=3.0)
    line, marks = ax.lines
    points, values, errors = found.density(scale=scale, outliers=False)
    np.testing.assert_array_equal(line.get_xdata(), points)
    np.testing.assert_array_equal(line.get_ydata(), values)
    band = ax.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose(band[:, 1].max(), (values + 3 * errors).max())
    np.testing.assert_allclose(marks.get_xdata(), [30, 50], rtol=1e-8)
    assert ax.get_xscale() == {"linear": "linear", "symlog": "asinh"}[scale]


def test_area_under_the_density_is_the_part_of_the_bulk_on_the_scale_that_is_drawn():
    ax = plot_spectral_density(density())
    x, y = ax.lines[0].get_data()
    scale = ax.xaxis.get_transform()
    np.testing.assert_allclose(np.trapezoid(y, scale.transform(x) / scale.linear_width), 58 / 60, rtol=1e-6)


@pytest.mark.parametrize("largest", [1e-9, 2.0, 3e7])
def test_ticks_of_the_symmetric_logarithm_are_zero_and_powers_of_ten_that_keep_apart(largest):
    ax = plot_spectral_density(spectral_density(torch.diag(torch.linspace(-largest, largest, 50).double())))
    ticks = ax.get_xticks()
    low, high = ax.get_xlim()
    assert 0 in ticks and all(low <= tick <= high for tick in ticks)
    np.testing.assert_allclose(np.log10(ticks[ticks > 0]) % 1, np.zeros((ticks > 0).sum()), atol=1e-12)
    places = ax.xaxis.get_transform().transform(np.array([low, *ticks, high]))
    assert len(ticks) >= 5 and np.diff(places[1:-1]).min() > 0.05 * (places[-1] - places[0])


@pytest.mark.parametrize(
    ("values", "threshold"),
    [([0.0] * 5, None), (list(range(50)), 20.0), ([2.0] * 6, None), ([1.0], None), ([-3.0, -3.0], None)],
)
def test_spectra_of_few_values(values, threshold):
    """Nothing but zeros, one value, or a scale that turns beyond it."""
    ax = plot_spectral_density(spectral_density(torch.diag(torch.tensor(values).double())), threshold=threshold)
    low, high = ax.get_xlim()
    assert any(low <= tick <= high for tick in ax.get_xticks())
    assert ax.get_ylim()[0] < ax.get_ylim()[1]


def test_only_what_lies_outside_of_the_bulk_is_an_outlier_and_the_curve_fills_the_axes():
    ax = plot_spectral_density(replace(density(), outliers=torch.tensor([0.5, 50.0]).double()))
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["density", "1 outlier", "1 known exactly, within the bulk"]
    np.testing.assert_array_equal(ax.lines[1].get_xdata(), [50.0])
    low, high = np.log10(ax.get_ylim())
    top = np.log10(max(path.vertices[:, 1].max() for path in ax.collections[0].get_paths()))
    assert 0 < high - top < 0.1 * (high - low)


def test_without_outliers_nothing_is_marked():
    ax = plot_spectral_density(density(outliers=0))
    assert len(ax.lines) == 1 and ax.get_legend() is None


def test_mass_of_an_eigenvector_by_layer_and_the_largest_eigenvalue_on_the_left():
    operator = hessian()
    values, vectors = np.linalg.eigh(operator.to_dense().numpy())
    ax = plot_eigenvectors_by_layer(operator.eigenpairs(3))
    expected = np.stack([(vectors[rows, :-4:-1] ** 2).sum(0) for rows in (slice(0, 16), slice(16, 26))])
    np.testing.assert_allclose(ax.images[0].get_array(), expected, atol=1e-6)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "2"]
    assert [label.get_text() for label in ax.get_xticklabels()] == [f"{value:.3g}" for value in values[:-4:-1]]


def test_names_are_no_formulas():
    pairs = eigenpairs(MATRIX, 2)
    ax = plot_eigenvectors_by_layer(pairs, groups={"a$b_$": slice(0, 10), "x$y$": slice(10, 60)})
    ax.figure.canvas.draw()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a$b_$", "x$y$"]
    assert not any(label.get_parse_math() for label in ax.get_yticklabels())


def test_mass_by_tensor_and_by_rows():
    pairs = hessian().eigenpairs(2)
    by_tensor = plot_eigenvectors_by_layer(pairs, groups="tensors").images[0].get_array()
    by_rows = plot_eigenvectors_by_layer(pairs, groups={"bias": torch.arange(12, 16)}).images[0].get_array()
    np.testing.assert_array_equal(by_tensor[1], by_rows[0])
    np.testing.assert_allclose(by_tensor.sum(0), [1, 1])


def test_convergence_shows_values_errors_and_the_reference():
    found = [trace(MATRIX, num_products=m) for m in (30, 9, 20)]
    ax = plot_convergence(found, MATRIX.trace(), errors=2.0, label="ours")
    reference, line = ax.lines[0], ax.containers[0].lines[0]
    assert set(reference.get_ydata()) == {float(MATRIX.trace())}
    order = [1, 2, 0]
    np.testing.assert_array_equal(line.get_xdata(), [found[k].products for k in order])
    np.testing.assert_array_equal(line.get_ydata(), [float(found[k]) for k in order])
    bars = np.array(ax.containers[0].lines[2][0].get_segments())[:, :, 1]
    np.testing.assert_allclose((bars[:, 1] - bars[:, 0]) / 4, [float(found[k].standard_error) for k in order])
    plot_convergence(found, ax=ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["reference", "ours", "XTrace"]
    assert ax.get_legend().get_texts()[0].get_fontfamily() == ["STIXGeneral"]  # more of the same, on our own axes


def moved_loss(operator, step):
    """The loss of a copy of the model elsewhere."""
    risk = operator.risk
    params = {name: p.detach().clone() for name, p in risk.params.items()}
    start = 0
    for p in params.values():
        p += step[start : start + p.numel()].reshape(p.shape)
        start += p.numel()
    X, y = (torch.cat(part) for part in zip(*risk.data.batches, strict=True))
    return float(torch.nn.functional.mse_loss(torch.func.functional_call(risk.model.module, params, (X,)), y))


@pytest.mark.parametrize("operator", [HessianLinearOperator, GGNLinearOperator, KFACLinearOperator])
def test_loss_along_a_direction_and_the_operator_s_quadratic_model(operator):
    found = hessian(operator=operator)
    v = torch.randn(26, dtype=torch.float64)
    steps = torch.tensor([-0.5, 0.0, 0.25, 1.0])
    loss, model = plot_loss_along(found, found.domain.split(v), steps=steps).lines
    backwards = plot_loss_along(found, found.domain.split(v), steps=steps.numpy()[::-1]).lines[0]
    np.testing.assert_array_equal(backwards.get_ydata(), loss.get_ydata()[::-1])
    np.testing.assert_allclose(loss.get_ydata(), [moved_loss(found, t * v) for t in steps], rtol=1e-12)
    gradient = torch.cat([g.flatten() for g in found.risk.gradient()])
    curvature = float(v @ found.to_dense() @ v)
    expected = moved_loss(found, 0 * v) + steps * float(gradient @ v) + steps**2 / 2 * curvature
    np.testing.assert_allclose(model.get_ydata(), expected, rtol=1e-6)
    np.testing.assert_array_equal(loss.get_xdata(), steps)


def test_loss_on_a_plane_has_the_first_direction_along_the_horizontal_axis(monkeypatch):
    operator, (u, v) = hessian(), torch.randn(2, 26, dtype=torch.float64)
    drawn = {}
    for name in ("contour", "contourf"):
        own = getattr(plt.Axes, name)
        monkeypatch.setattr(
            plt.Axes,
            name,
            lambda ax, x, y, z, name=name, own=own, **how: drawn.update({name: z}) or own(ax, x, y, z, **how),
        )
    steps = torch.tensor([-1.0, 0.0, 2.0]).double()
    plot_loss_plane(operator, u, v, steps=steps)
    expected = [[moved_loss(operator, s * u + t * v) for s in steps] for t in steps]
    np.testing.assert_allclose(drawn["contourf"], expected, rtol=1e-12)
    columns = torch.stack([u, v], 1)
    H, g = operator.to_dense(), torch.cat([p.flatten() for p in operator.risk.gradient()])
    for i, t in enumerate(steps):
        for j, s in enumerate(steps):
            step = columns @ torch.stack([s, t])
            model = moved_loss(operator, 0 * u) + g @ step + step @ H @ step / 2
            np.testing.assert_allclose(drawn["contour"][i, j], model, rtol=1e-10)


@pytest.mark.parametrize(
    ("plot", "error", "message"),
    [
        (lambda: plot_spectral_density(MATRIX), TypeError, "expected a SpectralDensity, from op.spectral_density(), got Tensor"),
        (lambda: plot_spectral_density(density(), scale="log"), ValueError, "expected 'linear' or 'symlog', got 'log'"),
        (lambda: plot_eigenvectors_by_layer(MATRIX), TypeError, "expected EigenPairs, from op.eigenpairs(k), got Tensor"),
        (lambda: plot_eigenvectors_by_layer(eigenpairs(MATRIX, 2)), ValueError, "no named tensors"),
        (lambda: plot_eigenvectors_by_layer(eigenpairs(MATRIX, 2), groups={"a": slice(9, 99)}), ValueError, "within 0 and 60"),
        (lambda: plot_convergence([]), ValueError, "at least one estimate"),
        (lambda: plot_convergence([2 * trace(MATRIX)]), TypeError, "expected estimates, such as op.trace(), got Tensor"),
        (lambda: plot_convergence([hessian().diagonal()]), ValueError, "of one number, got shape (26,)"),
        (lambda: plot_loss_along(2 * hessian(), torch.ones(26)), TypeError, "an operator of a model, with its risk"),
        (lambda: plot_loss_along(hessian(), torch.ones(25).double()), ValueError, "expected 26 rows"),
        (lambda: plot_loss_along(hessian(), torch.ones(26, 2).double()), ValueError, "expected one vector, got 2 columns"),
        (lambda: plot_loss_along(hessian(), torch.ones(26).double(), steps=torch.ones(1)), ValueError, "two steps [N]"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused_and_leaves_no_figure(plot, error, message):
    with pytest.raises(error, match=re.escape(message)):
        plot()
    assert not plt.get_fignums()
