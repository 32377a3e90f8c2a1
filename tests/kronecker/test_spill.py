"""Factors and rows in files are those in memory, to the bit; the files leave nothing behind, and a full disk is an error."""

import errno
import gc
from pathlib import Path

import pytest
import torch

from curvops.spill import Spill
from kronecker.cases import PROBLEMS, build, mlp, plan


def mapped():
    """Files of ours that are mapped to memory, each by its first address."""
    gc.collect()  # operators refer to themselves
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split("-")[0] for line in lines if "/curvops-" in line}


def notes(op, beginning):
    return [note for note in op.explain().notes if beginning in note]


SOME = [("kfac", "cnn"), ("ekfac", "cnn"), ("ekfac", "tokens"), ("ekfac", "tied"), ("kfoc", "tokens")]


@pytest.mark.parametrize(("kind", "name"), SOME)
def test_the_same_bits(kind, name, tmp_path, monkeypatch):
    monkeypatch.setattr("curvops.kronecker.kfoc.STEPS", 4)
    problem, options = PROBLEMS[name](), {"fisher_type": "type-2", "check_deterministic": False}
    before = mapped()
    kept = build(kind, problem, 3, 2, 1, **options)
    # rows on disk from the first one on, and from somewhere in between
    for budget in (0, 3000):
        expected = build(kind, problem, 3, 2, 1, memory_budget=budget, **options)
        found = build(kind, problem, 3, 2, 1, memory_budget=budget, spill=tmp_path, **options)
        assert mapped() > before and not list(tmp_path.iterdir())
        assert torch.equal(found.to_dense(), expected.to_dense())
        for (_, own), (_, its) in zip(found.state.groups, expected.state.groups, strict=True):
            assert all(torch.equal(own.tensors[part], its.tensors[part]) for part in its.tensors)
        # no data were swept again
        assert notes(found, "backward passes") == notes(kept, "backward passes")
        assert notes(found, "taken in files of spill=") and not notes(expected, "spill=")
    del found, own
    assert mapped() == before


def test_tensors_are_as_they_were(tmp_path):
    spill, whole = Spill(tmp_path, torch.device("cpu")), torch.randn(6, 5, 4, dtype=torch.float64)
    several = [whole.permute(2, 0, 1), whole[1:, 2:4], whole[2].expand(3, 5, 4), torch.arange(7), torch.zeros(0, 3)]
    found = spill.put_all(several)
    for one, other in zip(found, several, strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride() and one.dtype == other.dtype
        assert one.data_ptr() % 64 == other.data_ptr() % 64
    found[0][0, 0, 0] += 1
    assert found[0].data_ptr() != whole.data_ptr()
    assert len({one.untyped_storage().data_ptr() for one in found[:3]}) == 1
    assert whole.numel() * 8 <= spill.bytes <= whole.numel() * 8 + 7 * 8 + 128
    large = spill.zeros((2**21, 3), torch.float64)  # a file of its own
    assert not large[::999].any() and not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_when_the_space_is_taken(tmp_path, monkeypatch):
    def full(handle, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("curvops.spill._reserve", full)
    with pytest.raises(
        OSError, match=r"^spill: '.*' has no room for 16.8 MB more \(No space left on device\)\. Pass a"
    ):
        build("kfac", mlp(), spill=tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_refused(tmp_path):
    with pytest.raises(TypeError, match="spill: expected the path of a folder, got bool"):
        build("kfac", mlp(), spill=True)
    with pytest.raises(ValueError, match=r"spill: '.*none' is not a folder\. Make it"):
        plan("kfac", mlp(), spill=tmp_path / "none")
    with pytest.raises(
        ValueError, match="spill: files are mapped to the memory of the CPU, the parameters are on cuda:0"
    ):
        Spill(tmp_path, torch.device("cuda:0"))
