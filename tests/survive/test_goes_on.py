"""What is interrupted goes on from its checkpoint, to the same bits; and refuses what is of something else."""

import errno
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks.cases import gated
from survive.cases import COMPUTATIONS, ESTIMATES, LAYERS, Counted, Loader, convolutional, differing, symmetric
from torch import nn

import curvops.checkpoint
from curvops import (
    Checkpoint,
    EKFACLinearOperator,
    EmpiricalRisk,
    GGNDiagonalLinearOperator,
    KFACLinearOperator,
)
from curvops.estimators import trace
from curvops.files import read_about
from curvops.spectrum import eigenpairs


class Interrupted(Exception):
    pass


def at(number):
    def stop(count):
        if count == number:
            raise Interrupted

    return stop


def never(count):
    pass


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_what_was_interrupted_goes_on_to_the_same_bits(name, tmp_path, monkeypatch):
    monkeypatch.setattr("curvops.kronecker.kfoc.STEPS", 3)  # as a walk over the data each
    compute, steps = COMPUTATIONS[name], []
    expected = compute(steps.append)
    total = min(len(steps), 30)
    for place in sorted(
        {0, total // 3, total - 1} if name == "kfoc" or name in ESTIMATES else {0, 1, 4, total // 2, total - 1}
    ):
        checkpoint = Checkpoint(tmp_path / f"{place}.safetensors", every=3)
        with pytest.raises(Interrupted):
            compute(at(place), checkpoint)
        assert differing(compute(never, checkpoint), expected) == [], place
        assert differing(compute(never, checkpoint), expected) == [], place


def test_what_was_said_of_pieces_is_said_again(tmp_path):
    *problem, data = convolutional()
    options = {"memory_budget": 30_000, "check_deterministic": False}
    with pytest.raises(Interrupted):
        checkpoint = Checkpoint(tmp_path / "kfac.safetensors", every=1)
        KFACLinearOperator(*problem, Loader(data, at(5)), checkpoint=checkpoint, **options)
    notes = KFACLinearOperator(*problem, data, **options).explain().notes
    assert any("in pieces of 4 data" in note for note in notes)
    assert KFACLinearOperator(*problem, data, checkpoint=checkpoint, **options).explain().notes == notes


@pytest.mark.parametrize("name", ["kfac", "ekfac", "ekfac swept", "eigenpairs", "density in parts"])
def test_it_may_be_interrupted_any_number_of_times(name, tmp_path):
    compute, checkpoint, interruptions = COMPUTATIONS[name], Checkpoint(tmp_path / "state", every=1), 0
    expected = compute(never)
    while True:
        try:
            # data are looked at again, so that each run gets a batch farther; products are not taken again
            found = compute(at(interruptions if "kfac" in name else 3), checkpoint)
            break
        except Interrupted:
            interruptions += 1
    assert differing(found, expected) == []
    assert interruptions > 9


def test_skipped_batches_are_not_computed(tmp_path):
    *problem, data = convolutional()
    passes = []
    problem[0].register_forward_pre_hook(lambda *_: passes.append(0))
    checkpoint = Checkpoint(tmp_path / "kfac", every=5)
    with pytest.raises(Interrupted):
        KFACLinearOperator(*problem, Loader(data, at(34)), checkpoint=checkpoint)  # after two walks of the check
    passes.clear()
    KFACLinearOperator(*problem, Loader(data, never), checkpoint=checkpoint, check_deterministic=True)
    # neither is the check; batches on which something was proved are looked at, with a few of their data
    again = len(passes)
    KFACLinearOperator(*problem, Loader(data, never))
    assert 0 < 3 * again < len(passes) - again


@pytest.mark.parametrize("kind", [KFACLinearOperator, GGNDiagonalLinearOperator])
def test_data_that_came_since_are_not_skipped(kind, tmp_path):
    """Small batches go together: those of a longer data set with what was skipped, if that is not known."""
    model = torch.nn.Linear(4, 3).double()
    problem = model, torch.nn.CrossEntropyLoss(), dict(model.named_parameters())
    data = [(torch.randn(8, 4).double(), torch.randint(3, (8,))) for _ in range(6)]
    checkpoint = Checkpoint(tmp_path / "c.safetensors", every=1)
    kind(*problem, data[:3], fisher_type="type-2", checkpoint=checkpoint)
    found = kind(*problem, data, fisher_type="type-2", checkpoint=checkpoint)
    expected = kind(*problem, data, fisher_type="type-2")
    torch.testing.assert_close(found.to_dense(), expected.to_dense(), rtol=0, atol=1e-12)


def test_operations_that_differ_between_batches(tmp_path):
    """Groups are found anew where a batch contradicts an earlier one, wherever that was interrupted."""
    p = gated()
    problem = p.model, p.loss, p.params
    for cls, sizes in ((KFACLinearOperator, [(1, 1, 1, 1, 1, 1), (2, 1, 3)]), (EKFACLinearOperator, [(1, 1, 1, 3)])):
        for batches in (p.data(*several) for several in sizes):
            steps = []
            expected = cls(*problem, Loader(batches, steps.append), check_deterministic=False)
            for place in range(len(steps)):
                checkpoint = Checkpoint(tmp_path / f"{cls.__name__}{len(batches)}.{place}", every=1)
                with pytest.raises(Interrupted):
                    cls(*problem, Loader(batches, at(place)), check_deterministic=False, checkpoint=checkpoint)
                found = cls(*problem, batches, check_deterministic=False, checkpoint=checkpoint)
                assert torch.equal(found.to_dense(), expected.to_dense())
                assert found.state.data == expected.state.data
                assert [group.operation for group, _ in found.state.groups] == [
                    group.operation for group, _ in expected.state.groups
                ]


def test_a_mean_that_the_loss_does_not_tell(tmp_path):
    """What the loss learns of the batches is learnt again."""
    *_, data = convolutional()
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 3)).double()
    batches = [(X, torch.nn.functional.one_hot(y % 3, 3).double()) for X, y in data]

    def loss(z, y):
        return (z - y).square().mean(1).sum() / len(z)

    for problem in ((model, loss), (model, nn.SmoothL1Loss())):
        options = {"reduction": "mean"} if problem[1] is loss else {}

        def build(loader, checkpoint, problem=problem, options=options):
            risk = EmpiricalRisk(*problem, dict(model.named_parameters()), loader, **options)
            return KFACLinearOperator.of(risk, checkpoint=checkpoint)

        expected = build(batches, None)
        checkpoint = Checkpoint(tmp_path / type(problem[1]).__name__, every=2)
        with pytest.raises(Interrupted):
            build(Loader(batches, at(7)), checkpoint)
        assert torch.equal(build(batches, checkpoint).to_dense(), expected.to_dense())


def full(monkeypatch, free):
    """A disk on which so many files have room, and of another one a half."""
    written = []

    def write(self, content):
        with self.open("wb") as file:
            room = len(content) if len(written) < free else len(content) // 2
            file.write(content[:room])
        if room < len(content):
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(self)

    monkeypatch.setattr(Path, "write_bytes", write)


@pytest.mark.parametrize("name", ["ekfac", "eigenpairs", "density"])
def test_a_full_disk_loses_nothing(name, tmp_path, monkeypatch):
    expected = COMPUTATIONS[name](never)
    path = tmp_path / "state.safetensors"
    with monkeypatch.context() as patched:
        full(patched, 2)
        with pytest.warns(RuntimeWarning) as warned:
            found = COMPUTATIONS[name](never, Checkpoint(path, every=3))
    line = f"checkpoint: '{path}' cannot be written (No space left on device). The computation goes on; "
    assert all(str(one.message).startswith(line) and "\n" not in str(one.message) for one in warned)
    assert differing(found, expected) == []
    assert list(tmp_path.iterdir()) == [path]
    about = read_about(path, curvops.checkpoint.FORMAT)
    assert about.get("place", about.get("products")) == 3
    assert differing(COMPUTATIONS[name](never, Checkpoint(path, every=3)), expected) == []


def test_a_full_disk_at_the_beginning_is_an_error(tmp_path, monkeypatch):
    full(monkeypatch, 0)
    with pytest.raises(
        OSError, match=r"'.*state' cannot be written \(No space left on device\). Pass a Checkpoint with"
    ):
        COMPUTATIONS["kfac"](never, Checkpoint(tmp_path / "state"))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path):
    for name in ("kfac", "eigenpairs", "density", "trace"):
        with pytest.raises(OSError, match="cannot be written"):
            COMPUTATIONS[name](never, Checkpoint(tmp_path / "no" / "state"))


def refused(tmp_path, match, change=lambda model, data: None, cls=KFACLinearOperator, **options):
    """A state of another computation is an error, and stays."""
    model, loss, params, data = convolutional()
    checkpoint = Checkpoint(tmp_path / "state", every=2)
    if not checkpoint.path.exists():
        with pytest.raises(Interrupted):
            KFACLinearOperator(
                model, loss, params, Loader(data, at(7)), check_deterministic=False, checkpoint=checkpoint
            )
    before = checkpoint.path.read_bytes()
    changed = change(model, data)
    given = {"loss_func": loss, "check_deterministic": False, "checkpoint": checkpoint} | options
    with pytest.raises(ValueError, match=match + ".* Remove it to begin anew"):
        cls(model, params=params, data=changed or data, **given)
    assert checkpoint.path.read_bytes() == before


def test_what_is_of_something_else_is_refused(tmp_path, monkeypatch):
    def weight(model, data):
        with torch.no_grad():
            model[0].weight[0, 0, 0, 0] += 1e-15

    def datum(model, data):
        data[2][0][0, 0, 0, 0] += 1e-9

    def hook(model, data):
        model[4].register_forward_hook(lambda module, args, z: 2 * z)

    def gradients(model, data):
        model[4].register_forward_hook(lambda module, args, z: z + (z - z.detach()))

    refused(tmp_path, "of another computation: other tensors .*'0.weight'", weight)
    refused(tmp_path, "other data: batch 2 ", datum)
    refused(tmp_path, "other data: batch 0 ", lambda model, data: data[::-1])
    refused(tmp_path, "other data: batch 3 ", lambda model, data: data[:3])
    refused(tmp_path, "another output or gradient for batch 0", hook)
    refused(tmp_path, "another output or gradient for batch 0", gradients)
    refused(tmp_path, "seed 2147483647, now 1", seed=1)
    refused(tmp_path, "kfac_approx expand, now reduce", kfac_approx="reduce")
    refused(tmp_path, "computation KFACLinearOperator, now EKFACLinearOperator", cls=EKFACLinearOperator)
    refused(tmp_path, "other loss", loss_func=nn.CrossEntropyLoss(label_smoothing=0.1))
    monkeypatch.setattr(curvops.checkpoint, "versions", lambda: {"curvops": "0", "torch": "0"})
    refused(tmp_path, r"other versions \('curvops', 'torch'\)")


def test_another_matrix_is_refused(tmp_path):
    checkpoint, matrix = Checkpoint(tmp_path / "state", every=5), symmetric()
    with pytest.raises(Interrupted):
        eigenpairs(Counted(matrix, at(20)), 2, checkpoint=checkpoint)
    other = matrix.clone()
    other[0, 0] += 1e-9
    with pytest.raises(ValueError, match="of another matrix: its product with a vector is not what it was"):
        eigenpairs(Counted(other, never), 2, checkpoint=checkpoint)
    with pytest.raises(ValueError, match="of another computation: k 2, now 3"):
        eigenpairs(Counted(matrix, never), 3, checkpoint=checkpoint)
    with pytest.raises(ValueError, match="computation eigenpairs, now spectral density"):
        curvops.spectrum.spectral_density(Counted(matrix, never), checkpoint=checkpoint)


def test_another_estimate_is_refused(tmp_path):
    checkpoint, matrix = Checkpoint(tmp_path / "state", every=1), symmetric()
    options = {"method": "hutchinson", "groups": LAYERS, "num_products": 100, "checkpoint": checkpoint}
    with pytest.raises(Interrupted):
        trace(Counted(matrix, at(2)), **options)
    other = {"seed": 1, "num_products": 90, "groups": {**LAYERS, "last": slice(36, 41)}, "method": "xtrace"}
    for name, value in other.items():
        with pytest.raises(ValueError, match=f"of another computation: (other )?{name}"):
            trace(Counted(matrix, never), **options | {name: value})
    with pytest.raises(ValueError, match="of another matrix"):
        trace(Counted(2 * matrix, never), **options)


def test_a_file_that_is_none_is_refused(tmp_path):
    checkpoint = Checkpoint(tmp_path / "state")
    COMPUTATIONS["kfac"](never, checkpoint)
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=re.escape(f"'{checkpoint.path}' is truncated or not a safetensors file")):
        COMPUTATIONS["kfac"](never, checkpoint)


def test_arguments():
    with pytest.raises(ValueError, match="every: expected a number of steps ≥ 1, got 0"):
        Checkpoint("state", 0)
    with pytest.raises(TypeError, match="path: expected a path, got int"):
        Checkpoint(3)
    assert replace(Checkpoint("a/b.c")).beside("0").path == Path("a/b.0.c")
