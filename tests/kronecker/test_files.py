"""Saved operators and copies come back bit for bit; broken files and other models are refused, in one line."""

import copy
import json
import os
import pickle

import pytest
import torch
from safetensors import safe_open
from torch import nn

import curvops
import curvops.files
from curvops.tour.files import load_matrices, save_matrices
from kronecker.cases import PROBLEMS, build, close, cnn, mlp, params

OPTIONS = [
    {},
    {"separate_weight_and_bias": False},
    {"separate_weight_and_bias": False, "kfac_approx": "reduce"},
    {"fisher_type": "empirical"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("kind", ["kfac", "ekfac", "kfoc", "diagonal"])
def test_equal_bit_for_bit(kind, name, options, tmp_path):
    problem = PROBLEMS[name]()
    op = build(kind, problem, 4, 2, **options)
    op.save(tmp_path / "op")
    loaded = curvops.load(tmp_path / "op", params(problem[0]))
    for other in (loaded, copy.deepcopy(op), pickle.loads(pickle.dumps(op))):
        assert torch.equal(other.to_dense(), op.to_dense())
        assert torch.equal(other.inverse(0.1).to_dense(), op.inverse(0.1).to_dense())
        assert other.name == op.name and other.domain == op.domain and other.state.settings == op.state.settings
        if other is loaded:
            assert [r.block for r in other.explain().rows] == [r.block for r in op.explain().rows]
        else:
            assert type(other) is type(op) and other.explain().rows == op.explain().rows
        if kind in ("kfac", "diagonal"):
            close(other.merge(op).to_dense(), op.merge(op).to_dense())
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "op").read_bytes()


def test_what_is_loaded_can_be_merged(tmp_path):
    op = build("kfac", mlp())
    op.save(tmp_path / "op")
    loaded = curvops.load(tmp_path / "op")
    assert torch.equal(loaded.merge(op).to_dense(), op.merge(op).to_dense())
    op.moving_average(op, 0.5).save(tmp_path / "average")
    with pytest.raises(ValueError, match="a moving average no longer knows"):
        curvops.load(tmp_path / "average").merge(op)


@pytest.mark.parametrize(
    "save, load",
    [
        (lambda path: build("ekfac", mlp()).save(path), curvops.load),
        (lambda path: save_matrices(path, {"a": torch.randn(9, 9)}), load_matrices),
    ],
)
def test_a_file_that_is_cut_anywhere_is_refused_in_one_line(save, load, tmp_path):
    path = tmp_path / "op"
    save(path)
    content = path.read_bytes()
    for keep in [len(content) * k // 50 for k in range(50)] + [1, 7, 8, 9, len(content) - 1]:
        path.write_bytes(content[:keep])
        with pytest.raises(ValueError, match="is truncated or not a safetensors file") as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path):
    for load in (curvops.load, load_matrices):
        with pytest.raises(FileNotFoundError, match="nothing' is not a file"):
            load(tmp_path / "nothing")
    save_matrices(tmp_path / "matrices", {"a": torch.eye(2)})
    with pytest.raises(ValueError, match="is a safetensors file, but not one of Kronecker factors"):
        curvops.load(tmp_path / "matrices")
    build("kfac", mlp()).save(tmp_path / "factors")
    with pytest.raises(ValueError, match="but not one of curvature matrices"):
        load_matrices(tmp_path / "factors")
    (tmp_path / "text").write_text("not a file of tensors")
    with pytest.raises(ValueError, match="is truncated or not a safetensors file"):
        curvops.load(tmp_path / "text")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("2.bias"), r"does not fit the model: the model lacks '2\.bias'\."),
        (lambda p: p.update(extra=torch.ones(1)), r"the file lacks 'extra'\."),
        (
            lambda p: p.update({"0.weight": torch.ones(9, 3).double()}),
            r"'0\.weight' is \(9, 3\) in the model and \(4, 3\) in the file",
        ),
        (
            lambda p: p.update({"0.bias": torch.ones(4)}),
            r"'0\.bias' is torch\.float32 in the model and torch\.float64 in the file",
        ),
        (lambda p: p.update({"0.weight": p.pop("0.weight")}), r"the parameters are in another order\."),
    ],
)
def test_a_model_that_differs_is_told_how(change, message, tmp_path):
    problem = mlp()
    build("kfac", problem).save(tmp_path / "op")
    given = params(problem[0])
    change(given)
    with pytest.raises(ValueError, match=message) as caught:
        curvops.load(tmp_path / "op", given)
    assert "\n" not in str(caught.value)


def test_the_file_says_what_it_holds(tmp_path):
    op = build("kfac", cnn())
    op.save(tmp_path / "op")
    with safe_open(tmp_path / "op", framework="pt") as file:
        about = json.loads(file.metadata()["curvops"])
    assert about["versions"]["curvops"] == curvops.files.versions()["curvops"]
    assert about["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert about["kind"] == "KFACLinearOperator" and about["reduction"] == "mean"
    assert "B kron A" in about["conventions"] and "row-major" in about["conventions"]
    assert about["parameters"][0] == ["0.weight", [4, 1, 2, 2], "float64"]
    assert [name for name, _, _ in about["parameters"]] == op.domain.names
    assert about["settings"]["fisher_type"] == "type-2"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, error):
    path, op = tmp_path / "op", build("kfac", mlp())
    op.save(path)
    before = path.read_bytes()

    def fail(_):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        build("kfac", (*mlp()[:1], nn.CrossEntropyLoss(reduction="sum"), *mlp()[2:])).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        build("kfac", mlp()).save(tmp_path / "missing" / "op")
