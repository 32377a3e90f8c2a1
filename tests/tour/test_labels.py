"""Names of groups have room for themselves, in any figure, and stand by what they name."""

import itertools

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

from curvops import HessianLinearOperator
from curvops.tour import module_groups, plot_matrices
from curvops.tour.labels import LONGEST, placed_labels, shortened


def deep() -> nn.Sequential:
    """Forty layers, most of them tiny."""
    tiny = [
        nn.Linear(12, 2),
        nn.LayerNorm(2),
        *(f(2) for _ in range(18) for f in (lambda n: nn.Linear(n, n), nn.LayerNorm)),
    ]
    return nn.Sequential(nn.Linear(8, 12), *tiny, nn.Linear(2, 20))


def test_names_stay_in_one_line():
    named = placed_labels(["a\nb", "c\r\nd"], [0, 50, 100], height=7)
    assert [label.text for label in named] == ["a b", "c d"]
    assert shortened("a\nb") == "a b"


def overlaps(boxes) -> list:
    return [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]


@pytest.mark.parametrize("width", ["page", "column"])
@pytest.mark.parametrize("long", [False, True])
def test_names_of_forty_layers_do_not_overlap(width, long):
    model = deep()
    assert len(model) == 40
    sizes = module_groups({name: p.shape for name, p in model.named_parameters()}, depth=1)
    if long:
        sizes = {f"encoder.blocks.{label}.feed_forward": size for label, size in sizes.items()}
    matrix = torch.rand(sum(sizes.values()), sum(sizes.values()))
    fig, axes = plot_matrices({"Hessian": matrix, "Generalized Gauss-Newton": matrix}, groups=sizes, width=width)
    fig.canvas.draw()
    assert fig.get_figwidth() == {"page": 6.75, "column": 3.25}[width]
    labels = [[*axes[0, 0].get_yticklabels()], [*axes[0, 0].get_xticklabels()], [*axes[0, 1].get_xticklabels()]]
    for side in labels:
        assert len(side) >= (8 if width == "page" else 5)
        assert not overlaps([label.get_window_extent() for label in side])
    texts = [label for side in labels for label in side] + [ax.title for ax in axes.flat] + fig.texts
    texts.append(fig.axes[-1].yaxis.label)
    assert not overlaps([text.get_window_extent() for text in texts])
    for text in texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= fig.bbox.x1 and box.y1 <= fig.bbox.y1, text
        assert text.get_fontsize() >= 7
    # each name's line begins in the middle of what it names
    lines = [line for line in axes[0, 0].lines if line.get_xdata()[0] == 0 and not line.get_clip_on()]
    assert len(lines) == len(labels[0])
    assert [line.get_ydata()[-1] for line in lines] == pytest.approx([label.get_position()[1] for label in labels[0]])


def test_names_are_joined_only_where_room_is_missing_and_every_group_has_one():
    edges = [0, 50, 51, 52, 53, 54, 100]
    labels = placed_labels(["a", "b.0", "b.1", "b.2", "b.3", "c"], edges, height=8)
    assert [label.text for label in labels] == ["a", "b.0–1", "b.2–3", "c"]
    assert [k for label in labels for k in range(label.first, label.last + 1)] == list(range(6))
    places = [label.place for label in labels]
    assert all(b - a >= 8 - 1e-9 for a, b in itertools.pairwise(places))
    assert [label.text for label in placed_labels("ab", [0, 10, 20], height=8)] == ["a", "b"]
    assert [label.text for label in placed_labels("abcd", [0, 1, 2, 3, 4], height=8)] == ["a–d"]
    for name in ("x" * 50, "encoder.layer.11.output", "a.b." + "y" * 30, "short"):
        assert len(shortened(name)) <= LONGEST + 1


def test_groups_follow_the_modules_as_deeply_as_there_is_room():
    model = nn.ModuleDict({f"block{k}": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for k in range(8)})
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert list(module_groups(shapes)) == [f"block{k}.{i}" for k in range(8) for i in range(2)]
    assert module_groups(shapes, most=15) == {f"block{k}": 12 for k in range(8)}
    assert module_groups(shapes, most=3) == module_groups(shapes, 1), "children, if even these are too many"
    assert module_groups({f"net.{name}": shape for name, shape in shapes.items()}, 2) == module_groups(shapes, 1)
    assert module_groups({"w": (2, 3), "b": (3,)}) == {"w": 6, "b": 3}, "a function's parameters own themselves"
    assert module_groups({"a.w": (2,), "b.w": (1,), "a.b": (4,)}) == {"a": 2, "b": 1, "a (2)": 4}
    assert module_groups({"0.parametrizations.weight.original0": (2,), "0.bias": (1,)}) == {"0": 3}
    with pytest.raises(ValueError, match="depth of at least 1, got 0"):
        module_groups(shapes, 0)


def test_a_figure_takes_a_model_or_a_depth_and_a_single_operator():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.Tanh()), nn.Linear(3, 2))
    data = [(torch.randn(4, 2), torch.randn(4, 2))]
    hessian = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data)

    def names(groups):
        fig, axes = plot_matrices(hessian, groups=groups)
        assert axes[0, 0].get_title() == "Hessian" and fig.get_figwidth() == 3.25
        plt.close(fig)
        return [label.get_text() for label in axes[0, 0].get_yticklabels()]

    assert names(model) == ["0.0", "1"]
    assert names(1) == ["0", "1"]
    model[1].requires_grad_(False)
    part = HessianLinearOperator(model, nn.MSELoss(), dict(model[0].named_parameters()), data)
    _, axes = plot_matrices({"one": part, "two": part.to_dense()}, groups=model)
    assert [label.get_text() for label in axes[0, 0].get_yticklabels()] == ["0"]
    _, axes = plot_matrices(torch.eye(3), "mine")
    assert axes[0, 0].get_title() == "mine"


def test_names_are_no_formulas():
    figure, axes = plot_matrices({"A": torch.eye(8)}, groups={"a$b_$": 4, "x$y$": 4})
    figure.canvas.draw()
    assert [text.get_text() for text in axes[0, 0].get_yticklabels()] == ["a$b_$", "x$y$"]
    assert not any(text.get_parse_math() for text in axes[0, 0].get_yticklabels())


def test_a_joined_name_keeps_both_ends():
    names = [
        "bert.embeddings.word_embeddings",
        "bert.embeddings.position_embeddings",
        "bert.embeddings.LayerNorm",
        "fc",
    ]
    texts = [label.text for label in placed_labels(names, [0, 30, 33, 35, 65], height=10, reach=3)]
    assert texts == ["…word_embeddings", "position…–LayerNorm", "fc"]
    deep = [f"bert.encoder.layer.{k}.attention.self.query" for k in range(6)]
    (label,) = placed_labels(deep, range(7), height=10)
    assert label.text == "…0–5…query"
