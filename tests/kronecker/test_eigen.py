"""Eigendecompositions retry in double precision; bad factors are errors that name the layer."""

import pytest
import torch
from torch import nn

from curvops.operators.eigen import eigh
from kronecker.cases import build, close, mlp, real


def psd(dtype=torch.float64):
    root = real(1, 3, 5)
    return (root @ root.mT).to(dtype)


def failing(monkeypatch, times, error=None):
    """The first decompositions fail; the list fills with the dtypes of all."""
    original, dtypes = torch.linalg.eigh, []

    def decompose(matrix):
        dtypes.append(matrix.dtype)
        if len(dtypes) <= times:
            raise error or torch.linalg.LinAlgError("failed to converge\nwith details")
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", decompose)
    return dtypes


def test_single_precision_is_tried_again_in_double(monkeypatch):
    factor = psd(torch.float32)
    dtypes = failing(monkeypatch, 1)
    values, vectors = eigh(factor, "block of 'w'")
    assert dtypes == [torch.float32, torch.float64]
    assert values.dtype == vectors.dtype == torch.float32
    close((vectors * values.unsqueeze(1)) @ vectors.mT, factor, 1e-6)


def test_eigenvalues_that_come_back_as_no_numbers_are_tried_again_in_double(monkeypatch):
    own = torch.linalg.eigh

    def underflowing(factor):
        values, vectors = own(factor)
        return (values * torch.nan if factor.dtype == torch.float32 else values), vectors

    monkeypatch.setattr(torch.linalg, "eigh", underflowing)
    factor = psd(torch.float32)
    values, _ = eigh(factor, "block of 'w'")
    close(values, torch.linalg.eigvalsh(factor.double()).float(), 1e-6)


def test_a_second_failure_names_the_block(monkeypatch):
    failing(monkeypatch, 2)
    with pytest.raises(ValueError, match=r"of 'w': .* side 3 failed in double precision too \(failed to converge\)"):
        eigh(psd(), "block of 'w'")


def test_running_out_of_memory_is_not_retried(monkeypatch):
    dtypes = failing(monkeypatch, 2, torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        eigh(psd(), "block of 'w'")
    assert len(dtypes) == 1


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize(
    "entry,message",
    [
        (float("nan"), "the factor has entries that are not finite"),
        (float("inf"), "the factor has entries that are not finite"),
        (-0.1, r"expected a positive semi-definite factor, got .* from -1\.00e-01"),
    ],
)
def test_bad_factors(entry, message, diagonal):
    values = torch.tensor([[1.0, entry]], dtype=torch.float64)
    with pytest.raises(ValueError, match=f"block of 'w': {message}"):
        eigh(values if diagonal else torch.diag_embed(values), "block of 'w'")


def test_rounding_below_zero_is_zero():
    values, _ = eigh(torch.diag(torch.tensor([1.0, -1e-12], dtype=torch.float64))[None], "block of 'w'")
    assert values.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "kfoc", "diagonal"])
def test_a_diverged_model_is_told_by_its_layer(kind):
    model, _, X, y = mlp()
    with torch.no_grad():
        model[0].weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"block of '[02]\.(weight|bias)': the factor has entries that are not finite"):
        build(kind, (model, nn.CrossEntropyLoss(), X, y), check_deterministic=False).inverse(0.1)


def test_an_indefinite_factor_is_told_by_its_layer():
    op = build("kfac", mlp())
    op.blocks[0].block.tensors["left"].neg_()
    with pytest.raises(ValueError, match=r"block of '0\.weight': expected a positive semi-definite factor"):
        op.inverse(0.1)
