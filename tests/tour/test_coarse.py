"""The coarse tour is what the full matrices say, coarsened; it goes on where it was interrupted, and its figures show it."""

import copy
import re
from functools import cache
from itertools import accumulate, pairwise
from unittest import mock

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from zoo.models import ZOO

import curvops
from curvops import EmpiricalRisk, HessianLinearOperator
from curvops.estimators import block_norms
from curvops.spectrum import SpectralDensity
from curvops.tour import (
    OPERATORS,
    Effort,
    Finished,
    coarse_tour,
    load_coarse,
    load_matrices,
    plot_blocks,
    plot_spectra,
    save_coarse,
    save_matrices,
    tutorial,
)
from curvops.tour.groups import sizes_of
from curvops.tour.matrices import each_matrix
from curvops.tour.setups import tiny
from curvops.tour.table import table

matplotlib.use("agg")
SEEDS = 40
MODELS = ["tutorial", "gpt"]


@cache
def risk_of(name):
    if name == "tutorial":
        setup = tutorial(dtype=torch.float64)
        return setup.risk(), setup.groups
    model, X, y, loss = copy.deepcopy(ZOO["gpt_with_positions"].build())
    risk = EmpiricalRisk(model.double(), loss, dict(model.named_parameters()), [(X, y)])
    return risk, sizes_of("modules", risk.space.dim, risk.space.shapes, most=40)


@cache
def matrices_of(name):
    risk, groups = risk_of(name)
    return {found.title: found.matrix for found in each_matrix(risk)}, groups


@cache
def coarse_of(name):
    risk, groups = risk_of(name)
    return coarse_tour(risk, groups=groups, effort=Effort(eigenvalues=3, density_depth=12))


def exact(matrix, groups):
    """Norms of all blocks, and traces of those on the diagonal."""
    rows = [slice(*ends) for ends in pairwise(accumulate(groups.values(), initial=0))]
    norms = torch.stack([torch.stack([matrix[i, j].norm() for j in rows]) for i in rows])
    return norms, torch.stack([matrix[i, i].trace() for i in rows]), rows


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_within_their_errors(name):
    matrices, groups = matrices_of(name)
    coarse, scores = coarse_of(name), []
    assert list(coarse.norms) == list(OPERATORS) and coarse.groups == dict(groups)
    for title, matrix in matrices.items():
        norms, traces, rows = exact(matrix, groups)
        if title in ("KFAC", "EKFAC"):
            assert not coarse.errors[title].any() and not coarse.trace_errors[title].any()
            assert coarse.products[title] == 0
            torch.testing.assert_close(coarse.norms[title], norms)
            torch.testing.assert_close(coarse.traces[title], traces)
            continue
        named = dict(zip(groups, rows, strict=True))
        found = [block_norms(matrix, named, symmetric=True, seed=seed) for seed in range(SEEDS)]
        # the operator's products are the matrix', so that other seeds may take the matrix
        torch.testing.assert_close(coarse.norms[title], found[0].norms.as_subclass(torch.Tensor), rtol=1e-6, atol=1e-12)
        for field, truth in (("norms", norms), ("traces", traces)):
            values = torch.stack([getattr(one, field).as_subclass(torch.Tensor) for one in found])
            errors = torch.stack([getattr(one, field).standard_error for one in found])
            sampled = errors.sum(0) > 0
            torch.testing.assert_close(values[0][~sampled], truth[~sampled])
            scores.append(((values - truth) / errors)[:, sampled].flatten())
    z = torch.cat(scores)
    # 8 products: a t-distribution's mean square is 7 / 5
    assert 0.6 < z.square().mean() < 1.6, z.square().mean()
    assert (z.abs() > 2).double().mean() < 0.12 and z.abs().max() < 12


@pytest.mark.parametrize("name", MODELS)
def test_spectra(name):
    matrices, groups = matrices_of(name)
    coarse = coarse_of(name)
    for title, matrix in matrices.items():
        values, vectors = torch.linalg.eigh(matrix)
        order = values.abs().argsort(descending=True)[:3]
        torch.testing.assert_close(coarse.eigenvalues[title], values[order], rtol=1e-5, atol=1e-9)
        _, _, rows = exact(matrix, groups)
        masses = torch.stack([vectors[own][:, order].square().sum(0) for own in rows], 1)
        torch.testing.assert_close(coarse.masses[title], masses, rtol=1e-3, atol=1e-4)
        mean = float(coarse.densities[title].moments(1).values[1])  # of two start vectors, or of all eigenvalues
        assert abs(mean - values.mean()) <= (1e-9 if title in ("KFAC", "EKFAC") else 1) * values.abs().mean()
    assert set(coarse.curves()) == set(OPERATORS)
    curve = coarse.curves(2000)["KFAC"]
    turned = (curve.points / coarse.threshold).asinh()
    assert abs(torch.trapezoid(curve.values, turned) - 1) < 1e-3 and not curve.errors.any()


def test_density_of_known_eigenvalues():
    values = torch.cat([torch.zeros(50), torch.logspace(-9, 2, 300), -torch.logspace(-3, 1, 20)]).double()
    found = SpectralDensity.of(values)
    at = torch.tensor([-20.0, -1.0, -1e-12, 0.0, 1e-5, 1.0, 200.0])
    expected = torch.stack([(values <= x).double().mean() for x in at])
    torch.testing.assert_close(found.cumulative(at).values, expected, rtol=0, atol=2 / len(values))
    torch.testing.assert_close(found.moments(1).values[1], values.mean())
    assert not found.cumulative(at).errors.any()


def test_an_interrupted_tour_goes_on(tmp_path):
    risk, path = tiny().risk(), tmp_path / "coarse.safetensors"
    whole = coarse_tour(risk, settings={"setup": "tiny"})
    lines = []

    def interrupt(line):
        lines.append(line)
        if len(lines) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        coarse_tour(risk, path, settings={"setup": "tiny"}, say=interrupt)
    begun = load_coarse(path)
    assert list(begun.densities) == ["Hessian"] and list(begun.norms) == list(OPERATORS)[:2]
    lines.clear()
    found = coarse_tour(risk, path, settings={"setup": "tiny"}, say=lines.append)
    assert lines[0] == "Hessian: in the file already, not computed again" and len(lines) == 1 + 2 + 4 * 3
    assert begun.norms["Hessian"].equal(found.norms["Hessian"])
    there = load_coarse(path)
    for title in OPERATORS:
        for coarse in (found, there):
            torch.testing.assert_close(coarse.norms[title], whole.norms[title])
            torch.testing.assert_close(coarse.traces[title], whole.traces[title])
            torch.testing.assert_close(coarse.masses[title].sum(1), torch.ones(5).double(), rtol=0, atol=1e-5)
            assert coarse.products[title] == whole.products[title] and coarse.costs[title].seconds > 0
    assert there.settings == found.settings and there.settings["setup"] == "tiny" and "torch" in there.versions
    assert there.parameters == {name: tuple(shape) for name, shape in risk.space.shapes.items()}


def test_it_goes_on_within_a_matrix(tmp_path):
    """Interrupted amid the norms of blocks, the tour goes on after the last finished group, to the same bits."""
    path, effort = tmp_path / "coarse.safetensors", Effort(block_products=2, eigenvalues=0, density_vectors=0)
    setup, products = tiny(), []

    def options(stop, path=path, seed=0):
        products.clear()

        def apply(self, columns):
            products.append(columns.shape[1])
            if len(products) > stop:
                raise KeyboardInterrupt
            return plain(self, columns)

        return mock.patch.object(HessianLinearOperator, "_apply", apply), {"seed": seed, "path": path}

    def tour(stop, **more):
        patch, given = options(stop, **more)
        with patch:
            return coarse_tour(setup.risk(), titles=["Hessian"], groups="tensors", effort=effort, **given)

    plain = HessianLinearOperator._apply
    whole, total = tour(99, path=None), sum(products)
    # the second file is damaged, then of another matrix: it is replaced
    for seed, stop in ((1, 2), (1, 2), (0, 4)):
        with pytest.raises(KeyboardInterrupt):
            tour(stop, seed=seed)
        assert [each.name for each in tmp_path.iterdir()] == ["coarse.under-way.safetensors"]
        if seed:
            content = (tmp_path / "coarse.under-way.safetensors").read_bytes()
            (tmp_path / "coarse.under-way.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = tour(99)
    assert sum(products) < total
    assert list(tmp_path.iterdir()) == [path]
    for name in ("norms", "errors", "traces", "products"):
        assert torch.equal(*(torch.as_tensor(getattr(each, name)["Hessian"]) for each in (found, whole))), name


def test_a_file_of_another_computation_is_replaced(tmp_path):
    path, lines = tmp_path / "coarse.safetensors", []
    setup, effort = tiny(), Effort(eigenvalues=0, density_vectors=0)
    coarse_tour(setup.risk(), path, titles=["Hessian"], effort=effort)
    with torch.no_grad():
        setup.model[3].weight *= 2
    found = coarse_tour(setup.risk(), path, titles=["KFAC"], effort=effort, say=lines.append)
    assert "is of another computation" in lines[0] and list(load_coarse(path).norms) == list(found.norms) == ["KFAC"]


def test_refusals(tmp_path):
    risk, shapes = tiny().risk(), {"a.weight": (2, 3), "a.bias": (2,), "b.weight": (4,)}
    with pytest.raises(ValueError, match=r"titles must be some of .*got \['Hesse'\]"):
        coarse_tour(risk, titles=["Hesse"])
    with pytest.raises(ValueError, match=r"the group sizes \[3\] sum to 3, the matrices have 12 rows"):
        coarse_tour(risk, groups={"a": 3})
    with pytest.raises(TypeError, match=r"expected sizes, a mapping from label to size, .* got 'layers'"):
        coarse_tour(risk, groups="layers")
    assert sizes_of("tensors", 12, shapes) == {"a.weight": 6, "a.bias": 2, "b.weight": 4}
    assert sizes_of("modules", 12, shapes) == sizes_of(1, 12, shapes) == {"a": 8, "b": 4}
    assert sizes_of("modules", 12, {**shapes, "c.weight": (0, 3)}) == {"a": 8, "b": 4}
    with pytest.raises(ValueError, match="block_products must be an integer ≥ 2, got 1"):
        Effort(block_products=1)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        coarse_tour(risk, tmp_path / "file" / "coarse.safetensors", say=pytest.fail)
    path = save_matrices(tmp_path / "m.safetensors", {"A": torch.eye(2)})
    with pytest.raises(ValueError, match="not one of coarse curvature"):
        load_coarse(path)
    with pytest.raises(ValueError, match="not one of curvature matrices"):
        load_matrices(save_coarse(tmp_path / "c.safetensors", coarse_of("tutorial")))


def test_figures():
    coarse = copy.deepcopy(coarse_of("tutorial"))
    coarse.errors["Hessian"][0, 1] = coarse.norms["Hessian"][0, 1]
    fig, axes = plot_blocks(coarse)
    crosses = {ax.get_title(): [line for line in ax.lines if line.get_marker() == "x"] for ax in axes.flat}
    assert list(crosses) == list(OPERATORS)
    marked = crosses["Hessian"][0].get_xydata().tolist()
    assert [1, 0] in marked and len(marked) == int((coarse.errors["Hessian"] > 0.5 * coarse.norms["Hessian"]).sum())
    texts = [text.get_text() for legend in fig.legends for text in legend.get_texts()]
    assert set(texts) == {"exactly zero", "error > ½ norm"}
    plt.close(fig)
    fig, axes = plot_spectra(coarse)
    assert [text.get_text() for text in axes[1].get_xticklabels()] == list(coarse.groups)
    assert axes[1].images[0].get_array().shape == (18, 4)
    plt.close(fig)
    coarse.traces["Hessian"][0] *= -1
    fig, axes = plot_spectra(coarse)
    boxes = [text.get_window_extent() for text in axes[0].get_yticklabels() if text.get_text()]
    assert len(boxes) > 4 and not any(one.overlaps(other) for one, other in pairwise(boxes))
    plt.close(fig)
    sizes = torch.tensor(list(coarse.groups.values())).double()
    fig, axes = plot_blocks(coarse, per_entry=True, columns=6)
    shown = torch.as_tensor(axes[0, 0].images[0].get_array().filled())
    torch.testing.assert_close(shown, (coarse.norms["Hessian"] / torch.outer(sizes, sizes).sqrt()).log10())
    plt.close(fig)


FEW = Effort(eigenvalues=2, density_depth=3, density_vectors=1)


def test_a_disk_that_is_full_is_no_refusal(tmp_path, monkeypatch):
    def full(path, coarse, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("curvops.tour.coarse.save_coarse", full)
    refused = {}
    with pytest.raises(OSError, match="No space left"):
        coarse_tour(tiny().risk(), tmp_path / "blocks.safetensors", titles=["Hessian"], effort=FEW, refused=refused)
    with pytest.raises(ZeroDivisionError):
        coarse_tour(tiny().risk(), titles=["Hessian"], effort=FEW, refused=refused, say=lambda line: 1 / 0)
    monkeypatch.setattr("curvops.checkpoint.write_tensors", full)
    with pytest.raises(OSError, match=r"others\.under-way.*No space left"):
        coarse_tour(tiny().risk(), tmp_path / "others.safetensors", titles=["Hessian"], effort=FEW, refused=refused)
    assert not refused


def test_a_part_that_fails_is_named_beside_what_is_there(tmp_path, monkeypatch):
    def refuses(self, *_, **__):
        raise MemoryError("too little")

    path, refused = tmp_path / "blocks.safetensors", {}
    whole = coarse_tour(tiny().risk(), titles=["Hessian", "KFAC"], effort=FEW)
    with monkeypatch.context() as patch:
        patch.setattr("curvops.products.risk_operator.RiskOperator.eigenpairs", refuses, raising=False)
        found = coarse_tour(tiny().risk(), path, titles=["Hessian", "KFAC"], effort=FEW, refused=refused)
        with pytest.raises(MemoryError):
            coarse_tour(tiny().risk(), titles=["Hessian"], effort=FEW)
    assert list(refused) == ["Hessian: eigenvectors"] and list(found.norms) == ["Hessian", "KFAC"]
    assert list(found.masses) == ["KFAC"] and "Hessian" in found.densities
    plt.close(plot_spectra(found)[0])
    with monkeypatch.context() as patch:
        patch.setattr("curvops.products.risk_operator.RiskOperator.block_norms", refuses, raising=False)
        refused.clear()
        lost = coarse_tour(tiny().risk(), titles=["Hessian", "KFAC"], effort=FEW, refused=refused)
    assert list(refused) == ["Hessian"] and list(lost.norms) == list(lost.densities) == list(lost.costs) == ["KFAC"]
    refused.clear()
    again = coarse_tour(tiny().risk(), path, titles=["Hessian", "KFAC"], effort=FEW, refused=refused)
    assert not refused and again.products == whole.products and set(again.masses) == {"Hessian", "KFAC"}


def test_a_tour_without_any_spectrum_is_drawn_all_the_same(tmp_path, monkeypatch):
    def refuses(self, *_, **__):
        raise MemoryError("too little")

    monkeypatch.setattr("curvops.tour.coarse._Run._eigenvectors", refuses)
    model, data = tiny().model, list(tiny().data)
    found = curvops.tour(model, torch.nn.CrossEntropyLoss(), data, output=tmp_path, memory_budget=5000)
    assert list(found.matrices) == list(OPERATORS)
    assert list(found.refused) == [f"{title}: eigenvectors" for title in OPERATORS]
    assert {path.suffix for path in found.paths} == {".safetensors", ".html", ".pdf", ".png"}
    assert not any("spectra" in path.name for path in found.paths)
    assert re.search(r"^Hessian: eigenvectors +not computed: MemoryError: too little", found.table(), re.MULTILINE)


@pytest.mark.parametrize("resume", [False, True])
def test_an_earlier_file_stays_until_the_first_part_is_there(resume, tmp_path, monkeypatch):
    path, finished = tmp_path / "blocks.safetensors", Finished()
    coarse_tour(tiny().risk(), path, titles=["Hessian"], effort=FEW)
    before = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("curvops.tour.coarse._Run._blocks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            coarse_tour(tiny().risk(), path, seed=1, titles=["KFAC"], effort=FEW, resume=resume, finished=finished)
    assert path.read_bytes() == before and not finished.matrices
    coarse_tour(tiny().risk(), path, titles=["KFAC"], effort=FEW, resume=resume, finished=finished)
    titles = ["Hessian", "KFAC"] if resume else ["KFAC"]
    assert list(load_coarse(path).norms) == titles == finished.matrices[path]
    assert list(tmp_path.iterdir()) == [path]


def test_a_trace_without_an_error_is_not_called_exact():
    coarse = coarse_tour(tiny().risk(), titles=["Hessian", "KFAC"], effort=FEW)
    assert re.search(r"^KFAC .*, exact ", table(coarse, {}, None), re.MULTILINE)
    coarse.trace_errors.clear()
    assert "exact" not in table(coarse, {}, None) and "± unknown" in table(coarse, {}, None)
