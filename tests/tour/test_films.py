"""A film shows each stop for its time, in the same colours."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from curvops.tour import CoarseFile, MatrixFile, Tour, film
from curvops.tour.panels import ZERO


def stop(scale: float, **others) -> MatrixFile:
    return MatrixFile({"A": scale * torch.eye(4), **others}, groups={"first": 1, "second": 3})


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_each_stop_is_a_frame_in_shared_colours(suffix, tmp_path):
    stops = {"epoch 1": stop(1.0, B=torch.eye(4)), "epoch 2": Tour(stop(1e-3))}
    path = film(stops, tmp_path / f"f.{suffix}", seconds=0.5, dpi=80)
    with Image.open(path) as found:
        frames = []
        for k in range(found.n_frames):
            found.seek(k)
            frames.append(np.asarray(found.convert("RGB"), dtype=int))
        assert len(frames) == 2 and found.info["loop"] == 0
    assert frames[0].shape == frames[1].shape and frames[0].shape[1] == 3.25 * 80, "one panel, as only A is in both"
    zero = np.array([int(ZERO[k : k + 2], 16) for k in (1, 3, 5)])
    masks = [(abs(frame - zero) <= 3).all(-1) for frame in frames]
    assert masks[0].sum() > 0.2 * masks[0].size and (masks[0] == masks[1]).mean() > 0.99, "zeros stay where they are"
    changed = (frames[0] != frames[1]).any(-1)
    assert 0.02 < changed.mean() < 0.4, "the diagonal and the label"
    assert (frames[0][0, 0] == 255).all(), "paper is white"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_labels_with_dollars_are_no_formulas(tmp_path):
    assert film({"ep$1_$": stop(1.0), "a$^$": stop(2.0)}, tmp_path / "f.gif", dpi=50).exists()


def test_what_makes_no_film_is_refused(tmp_path):
    for stops, name, error, message in (
        ({}, "f.gif", ValueError, "at least one stop"),
        ([stop(1.0)], "f.mp4", ValueError, "must end in one of .gif, .webp, .png, got 'f.mp4'"),
        ([CoarseFile()], "f.gif", TypeError, "'1' must be a Tour or a MatrixFile with matrices, got CoarseFile"),
        ([stop(1.0), MatrixFile({"B": torch.eye(4)})], "f.gif", ValueError, "['1', '2'] have no matrix in common"),
        (
            [stop(1.0), MatrixFile({"A": torch.eye(3)})],
            "f.gif",
            ValueError,
            "one shape, got {'1': (4, 4), '2': (3, 3)}",
        ),
    ):
        with pytest.raises(error, match=re.escape(message)):
            film(stops, tmp_path / name)
    assert not list(tmp_path.iterdir())
