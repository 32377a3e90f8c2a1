"""The figure shows the right colours at the right places, and says what is wrong with what it cannot draw."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image
from torch import Tensor, nn

from curvops import HessianLinearOperator
from curvops.tour import color_domain, figure_style, log_abs, plot_matrices, save_figure, unchanged

GROUPS = [3, 0, 5, 4]


def symmetric(size: int = 12) -> Tensor:
    matrix = torch.randn(size, size)
    return matrix + matrix.T


def six(size: int = 12) -> dict[str, Tensor]:
    return {title: symmetric(size) for title in "ABCDEF"}


@pytest.mark.parametrize("groups", [GROUPS, {"a long layer name": 3, "unused": 0, "b": 5, "c": 4}])
def test_panels_are_square_the_bar_as_tall_and_nothing_overlaps_or_leaves_the_filled_paper(groups):
    fig, axes = plot_matrices(six(), groups=groups, axis_label="Block")
    fig.canvas.draw()
    boxes, bar = [ax.get_window_extent() for ax in axes.flat], fig.axes[-1].get_window_extent()
    assert axes.shape == (2, 3)
    assert [b.width for b in boxes] == pytest.approx([boxes[0].height] * 6, abs=0.05)
    assert (bar.y1, bar.y0) == pytest.approx((boxes[0].y1, boxes[-1].y0), abs=0.05)
    tight, texts = [ax.get_tightbbox() for ax in fig.axes], [text.get_window_extent() for text in fig.texts]
    paper = fig.bbox
    for box in [*tight, *texts]:
        assert box.x0 >= paper.x0 and box.y0 >= paper.y0 and box.x1 <= paper.x1 and box.y1 <= paper.y1
    for k, first in enumerate(tight):
        assert not any(first.overlaps(other) for other in [*tight[k + 1 :], *texts])
    assert fig.get_figwidth() == 6.75
    assert max(box.x1 for box in tight) > paper.x1 - 0.05 * fig.dpi


def test_boundaries_lie_between_entries_and_labels_in_the_middle_of_groups():
    _, axes = plot_matrices(six(), groups=GROUPS)
    for ax in axes.flat:
        for color, width in (("white", 0.9), ("0.15", 0.4)):  # the dark line stands on the white one
            lines = [line for line in ax.lines if line.get_color() == color and line.get_linewidth() == width]
            horizontal = [line.get_ydata()[0] for line in lines if line.get_xdata()[0] == 0]
            vertical = [line.get_xdata()[0] for line in lines if line.get_ydata()[0] == 0]
            assert horizontal == vertical == [2.5, 7.5]
        assert len(ax.lines) == 8
        assert ax.get_xticks().tolist() == ax.get_yticks().tolist() == [1.0, 5.0, 9.5]
        assert ax.images[0].get_extent() == [-0.5, 11.5, 11.5, -0.5]
    for labels in (axes[1, 0].get_xticklabels(), axes[1, 0].get_yticklabels()):
        assert [label.get_text() for label in labels] == ["1", "2", "3"]


def test_each_entry_has_its_pixel_in_a_pdf_sized_image_and_the_first_row_is_on_top(tmp_path):
    matrix = torch.zeros(4, 4)
    matrix[0, 3] = 1.0
    fig, axes = plot_matrices({"A": matrix}, transform=unchanged)
    pixels = np.asarray(Image.open(save_figure(fig, tmp_path / "a.png")).convert("RGB"), dtype=int)
    box = axes[0, 0].get_window_extent().transformed(fig.transFigure.inverted())
    height, width = pixels.shape[:2]

    def at(row: float, column: float) -> list[int]:
        x, y = box.x0 + (column + 0.5) / 4 * box.width, box.y1 - (row + 0.5) / 4 * box.height
        return pixels[int((1 - y) * height), int(x * width)].tolist()

    assert at(0, 3) == pytest.approx([255 * c for c in plt.get_cmap("RdBu_r")(1.0)[:3]], abs=3)
    assert at(3, 0) == at(1, 1) == pytest.approx([247, 247, 247], abs=3)


def test_domain_is_shared_and_for_log_abs_becomes_darker_in_grey_with_every_step():
    matrices = {"small": 1e-3 * torch.eye(3), "large": torch.full((3, 3), -100.0)}
    _, axes = plot_matrices(matrices)
    for ax in axes.flat:
        assert ax.images[0].get_clim() == (-3.0, 2.0), "exact zeros are no entries of 1e-6"
        assert ax.images[0].get_cmap().name.startswith("magma_r")
    assert axes[0, 1].images[0].get_array().tolist() == [[2.0] * 3] * 3
    grey = axes[0, 0].images[0].cmap(np.linspace(0, 1, 128))[:, :3] @ [0.299, 0.587, 0.114]
    assert (np.diff(grey) < 0).all() and grey[0] > 0.9 and grey[-1] < 0.1
    assert log_abs(torch.tensor([[-10.0, 0.0]])).tolist() == [[1.0, -6.0]]
    assert log_abs(torch.tensor([[1e-9]]), epsilon=1e-8).item() == pytest.approx(-8.0)


def test_odd_transformations_are_centred_on_zero():
    matrices = {"A": torch.tensor([[4.0, -1.0], [-1.0, 1.0]])}
    for transform in (unchanged, lambda m: 2 * m, lambda m: m.sign() * m.abs().sqrt()):
        _, axes = plot_matrices(matrices, transform=transform)
        lower, upper = axes[0, 0].images[0].get_clim()
        assert lower == -upper == -transform(matrices["A"]).max()
        image = axes[0, 0].images[0]
        assert image.get_cmap().name.startswith("RdBu_r")
        assert image.cmap(image.norm(0.0))[:3] == pytest.approx(to_rgb("#f7f7f7"), abs=0.01), "zero is in the middle"
    _, axes = plot_matrices(matrices, transform=unchanged, signed=False, cmap="cividis")
    assert axes[0, 0].images[0].get_clim() == (-1.0, 4.0)


def test_clip_keeps_a_share_inside_and_domains_of_constant_zero_and_infinite_entries():
    matrix = torch.eye(10)
    matrix[0, 0] = 1000.0
    _, axes = plot_matrices({"A": matrix}, transform=unchanged, clip=0.98)
    assert axes[0, 0].images[0].get_clim() == (-1.0, 1.0)
    assert axes[0, 0].images[0].colorbar.extend == "max"
    with pytest.raises(ValueError, match=re.escape("clip must be in (0, 1], got 0")):
        color_domain([matrix], signed=True, clip=0)
    assert color_domain([torch.ones(2, 2)], signed=False) == (0.5, 1.5)
    assert color_domain([torch.zeros(2, 2)], signed=True) == (-0.5, 0.5)
    assert color_domain([torch.tensor([[float("-inf"), 2.0], [0.0, 1.0]])], signed=False) == (0.0, 2.0)


def test_operators_titles_and_a_free_number_of_panels():
    data = [(torch.randn(5, 2), torch.randn(5, 1))]
    model = torch.nn.Linear(2, 1)
    hessian = HessianLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), data)
    _, axes = plot_matrices([hessian, hessian.to_dense(), torch.eye(3).half(), torch.ones(3, 3).int()], list("ABCD"))
    assert axes.shape == (2, 3)
    assert [ax.get_title() for ax in axes.flat] == ["A", "B", "C", "D", "", ""]
    assert [ax.axison for ax in axes.flat] == [True] * 4 + [False] * 2
    assert np.array_equal(axes[0, 0].images[0].get_array(), axes[0, 1].images[0].get_array())
    assert plot_matrices(six(), rows=3)[1].shape == (3, 2)
    assert plot_matrices(six(), columns=6)[1].shape == (1, 6)


def test_titles_labels_and_fonts_are_set_without_latex_and_a_style_of_ones_own_is_used(caplog):
    fig, axes = plot_matrices(six(), groups=GROUPS, transform_title="magnitude")
    fig.canvas.draw()
    assert fig.axes[-1].get_ylabel() == "magnitude"
    assert fig.get_supxlabel() == fig.get_supylabel() == "Layer"
    assert axes[0, 0].title.get_fontsize() == 8
    assert {label.get_fontsize() for label in axes[0, 0].get_yticklabels()} == {7}
    assert not any(text.get_usetex() for text in fig.findobj(Text))
    assert not caplog.records, "matplotlib looked for fonts that are not there"
    assert figure_style(usetex=True)["text.usetex"] is True
    fig, axes = plot_matrices(six(), config={"figure.figsize": (4.0, 1.0), "axes.titlesize": 5})
    assert (fig.get_figwidth(), axes[0, 0].title.get_fontsize()) == (4.0, 5)


def test_pdf_is_small_embeds_fonts_and_every_entry(tmp_path):
    def drawn(matrices, groups):
        return save_figure(plot_matrices(matrices, groups=groups)[0], tmp_path / "a.pdf").read_bytes()

    small = six()
    assert drawn(small, GROUPS) == drawn(small, GROUPS), "the same figure gives the same file"
    content = drawn(six(683), [112, 0, 404, 0, 37, 0, 130])
    assert len(content) < 2_000_000
    assert content.count(b"/Width 683") == 6
    assert b"/FontFile2" in content and b"/Type3" not in content


def test_large_matrices_are_averaged_to_what_print_can_show(tmp_path):
    blocks = torch.block_diag(torch.ones(600, 600), torch.zeros(600, 600))
    fig, axes = plot_matrices(dict.fromkeys("ABC", blocks), groups=[600, 600], transform=unchanged)
    shown = np.asarray(axes[0, 0].images[0].get_array())
    assert shown.shape == (600, 600)
    assert (shown[:300, :300] == 1).all() and (shown[300:] == 0).all()
    assert axes[0, 0].images[0].get_extent() == [-0.5, 1199.5, 1199.5, -0.5]
    label = axes[0, 0].images[0].colorbar.ax.get_ylabel()
    assert " ".join(label.split()) == "Unaltered matrix entries, cell means"
    assert save_figure(fig, tmp_path / "a.pdf").stat().st_size < 2_000_000


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"matrices": {}}, ValueError, "at least one matrix"),
        ({"matrices": [torch.eye(2)]}, ValueError, "needs titles="),
        ({"matrices": [torch.eye(2)], "titles": ["A", "B"]}, ValueError, "one title for each of the 1 matrices, got 2"),
        ({"matrices": [torch.eye(2)] * 2, "titles": ["A", "A"]}, ValueError, "the titles must differ"),
        ({"matrices": 1.0}, TypeError, "expected a matrix, a mapping from title to matrix, or a sequence"),
        ({"matrices": {"A": [[1.0]]}}, TypeError, "'A' must be a tensor or an operator with to_dense(), got list"),
        ({"matrices": {"A": torch.ones(2, 3)}}, ValueError, "square matrices of one shape, got {'A': (2, 3)}"),
        ({"matrices": {"A": torch.eye(2), "B": torch.eye(3)}}, ValueError, "{'A': (2, 2), 'B': (3, 3)}"),
        ({"matrices": {"A": torch.eye(2) * float("nan")}}, ValueError, "'A' has 4 entries that are NaN"),
        ({"matrices": {"A": torch.eye(4)}, "groups": [1, 2]}, ValueError, "[1, 2] sum to 3, the matrices have 4 rows"),
        ({"matrices": {"A": torch.eye(1)}, "groups": [2, -1]}, ValueError, "group sizes [2, -1]"),
        ({"matrices": {"A": torch.eye(4)}, "groups": 1}, ValueError, "Pass operators, or groups=model"),
        ({"matrices": {"A": torch.eye(4)}, "groups": nn.Linear(1, 1)}, ValueError, "has 2 parameters, the matrices 4"),
        ({"matrices": {"A": torch.eye(4)}, "groups": "modules"}, ValueError, "Pass operators, or groups=model"),
        ({"matrices": {"A": torch.eye(4)}, "groups": "layers"}, TypeError, "groups: expected sizes, a mapping"),
        ({"matrices": {"A": torch.eye(4)}, "width": "half"}, ValueError, "must be 'column' or 'page', got 'half'"),
        ({"matrices": {"A": torch.eye(2)}, "transform": torch.diagonal}, ValueError, "keep the shape (2, 2), got (2,)"),
        ({"matrices": {"A": -torch.eye(2)}, "transform": torch.log10}, ValueError, "transform makes 2 entries of 'A'"),
        ({"matrices": six(), "rows": 1, "columns": 2}, ValueError, "6 matrices do not fit into 1 x 2 panels"),
    ],
)
def test_what_cannot_be_drawn_is_refused(kwargs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        plot_matrices(**kwargs)
    assert not plt.get_fignums()
