"""Exact zeros are told from tiny entries, also where entries are averaged, and what is beyond the colours is announced."""

from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from curvops.tour import log_abs, plot_matrices, shared_look, unchanged
from curvops.tour.panels import ZERO


def test_exact_zeros_have_a_colour_and_a_legend_and_tiny_entries_an_arrow():
    matrix = torch.tensor([[1.0, 0.0], [1e-9, 1e-2]], dtype=torch.float64)
    fig, axes = plot_matrices({"A": matrix})
    image = axes[0, 0].images[0]
    assert image.get_array().mask.tolist() == [[False, True], [False, False]]
    assert image.cmap(image.norm(image.get_array()))[0, 1, :3] == pytest.approx(to_rgb(ZERO))
    assert (image.get_clim(), image.colorbar.extend) == ((-6.0, 0.0), "min")
    assert [text.get_text() for legend in fig.legends for text in legend.get_texts()] == ["exactly zero"]
    distance = np.abs(image.cmap(np.linspace(0, 1, 128))[:, :3] - to_rgb(ZERO)).max(1).min()
    assert distance > 0.1, "no entry has nearly the colour of zero"

    fig, axes = plot_matrices({"A": matrix + 1})
    assert not fig.legends and axes[0, 0].images[0].colorbar.extend == "neither"
    fig, axes = plot_matrices({"A": matrix}, transform=unchanged)
    assert not fig.legends and not np.ma.getmaskarray(axes[0, 0].images[0].get_array()).any()
    fig, axes = plot_matrices({"A": matrix}, transform=partial(log_abs, epsilon=1e-12))
    assert fig.legends and axes[0, 0].images[0].get_clim() == (-9.0, 0.0)
    assert axes[0, 0].images[0].colorbar.extend == "neither"
    _, axes = plot_matrices({"A": matrix}, transform=lambda m: m.abs().sqrt(), zeros=True)
    assert axes[0, 0].images[0].get_array().mask.sum() == 1


def test_a_pixel_is_zero_only_if_all_of_its_entries_are_and_else_their_mean():
    matrix = torch.zeros(8, 8)
    matrix[0, 0], matrix[1, 1], matrix[4, 4] = 100.0, 1e-2, 10.0
    shown = shared_look([{"A": matrix}]).shown(matrix, pixels=4)
    assert shown.mask.sum() == 14
    assert shown[0, 0] == pytest.approx(0.0) and shown[2, 2] == pytest.approx(1.0)
    signed = shared_look([{"A": matrix}], transform=unchanged).shown(matrix, pixels=4)
    assert signed[0, 0] == pytest.approx(100.01 / 4)


def test_a_look_holds_for_several_figures():
    frames = [{"A": torch.eye(3)}, {"A": 100 * torch.eye(3), "B": torch.full((3, 3), 1e-8)}]
    look = shared_look(frames)
    assert (look.lower, look.upper, look.extend, look.some_zeros) == (-6.0, 2.0, "min", True)
    for frame in frames:
        fig, axes = plot_matrices(frame, look=look)
        assert axes[0, 0].images[0].get_clim() == (-6.0, 2.0) and fig.legends
        assert axes[0, 0].images[0].colorbar.extend == "min"
    nothing = shared_look([{"A": torch.zeros(2, 2, dtype=torch.bfloat16)}])
    assert nothing.lower < nothing.upper and nothing.extend == "neither"
    with pytest.raises(ValueError, match="at least one matrix"):
        shared_look([{}])
