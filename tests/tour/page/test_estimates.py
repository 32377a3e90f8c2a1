"""The page of a coarse tour, in a real browser: norms with errors, and lines of code for blocks."""

from itertools import accumulate

import numpy as np
import pytest
import torch

import curvops
from curvops.spectrum import SpectralDensity
from curvops.tour import OPERATORS
from curvops.tour.coarse import Effort, coarse_tour, operator_options
from curvops.tour.coarse_files import CoarseFile
from curvops.tour.page import write_page
from curvops.tour.setups import tiny


def test_a_coarse_tour(chromium, tmp_path):
    norms = {"A": torch.tensor([[2.0, 0.5], [0.5, 1.0]]), "B": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}
    pair = torch.tensor([3.0, -1.0], dtype=torch.float64)
    density = SpectralDensity(
        dim=8,
        nodes=torch.tensor([[0.1, 2.0]]).double(),
        weights=torch.ones(1, 2).double() / 2,
        outliers=pair,
        products=3,
    )
    coarse = CoarseFile(
        norms,
        errors={title: 0.1 * n for title, n in norms.items()},
        traces={"A": pair},
        trace_errors={"A": pair.abs() / 10},
        eigenvalues={"A": pair.flip(0)},
        residuals={"A": pair.flip(0).abs() / 100},
        masses={"A": torch.tensor([[0.25, 0.75], [1.0, 0.0]])},
        densities={"A": density},
        parameters={"w": (5,), "b": (3,)},
        groups={"w": 5, "b": 3},
        products={"A": 40},
    )
    chromium.open(write_page(tmp_path / "coarse.html", coarse))
    told, here = chromium.hover(0, 1)
    assert (here, told["row"], told["A"]) == ("A", "w (5 parameters)", "0.5 ± 0.05")
    assert "less than the norm of a difference" in chromium.text("overall")
    assert "Hollow marks" in chromium.text("eigenvalues-note")
    chromium.choose("axis", "Logarithm of the magnitude")  # which sorts them, and their residuals
    assert chromium.plot("eigenvalues", "p.data[0].text") == ["A: λ1 = 3, residual 0.03", "A: λ2 = -1, residual 0.01"]
    chromium.choose("axis", "Linear")
    assert chromium.plot("traces", "[p.data[0].y, p.data[0].error_y.array]") == [[3, -1], pytest.approx([0.3, 0.1])]
    assert chromium.plot("eigenvalues", "p.data[0].y") == [-1, 3]
    ticks = "return [...document.querySelectorAll('#eigenvalues .xtick text')].map(t => t.textContent)"
    assert chromium.run(ticks) == ["1", "2"]
    assert chromium.plot("masses", "p.data[0].z") == [[0.25, 0.75], [1, 0]]
    assert max(chromium.plot("density", "p.data[1].y")) == pytest.approx(float(coarse.curves()["A"].values.max()))
    assert not chromium.find("diagonal-part").is_displayed()
    assert not chromium.find("edges").is_displayed()
    assert chromium.errors() == []


def test_differences_of_estimates_carry_their_errors(chromium, tmp_path):
    norms = {
        "A": torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double(),
        "B": torch.tensor([[1.0, 0.39], [0.39, 1.0]]).double(),
    }
    errors = {"A": torch.full((2, 2), 0.03).double(), "B": torch.full((2, 2), 0.04).double()}
    errors["A"][1, 1] = torch.nan  # of one sample
    coarse = CoarseFile(norms, errors=errors, parameters={"w": (5,), "b": (3,)}, groups={"w": 5, "b": 3})
    chromium.open(write_page(tmp_path / "coarse.html", coarse))
    chromium.choose("colors", "Linear")

    def cells():
        return chromium.run("return [...document.querySelectorAll('#blocks td.number')].map(c => c.textContent)")

    chromium.choose("subtrahend", "B")
    chromium.choose("minuend", "A")
    # errors are √(0.03² + 0.04²) = 0.05: 0.5 and 0.39 differ by more than two of them
    assert cells() == ["100 ± 5 %", "28.2 ± 12.8 %", "28.2 ± 12.8 %", "not told apart"]
    (image,) = chromium.images("difference").values()
    np.testing.assert_allclose(image[0], [[1, 0.11], [0.11, 0]], rtol=1e-6)
    assert chromium.hover(0, 0, "difference")[0]["A − B"] == "1 ± 0.05"
    chromium.choose("colors", "Logarithm of the magnitude")
    assert "zero, or not told apart" in chromium.text("difference-legend")
    assert "exactly zero" in chromium.text("legend")
    told = chromium.hover(1, 1, "difference")[0]
    assert (told["A − B"], told["A"]) == ("0, error unknown, not told apart", "1, error unknown")
    note = chromium.text("blocks-note")
    assert "estimated" in note and "double precision" not in note
    norms["A"][0, 1] = norms["A"][1, 0] = 0.485
    chromium.open(write_page(tmp_path / "near.html", coarse))
    chromium.choose("subtrahend", "B")
    chromium.choose("minuend", "A")
    assert cells()[1:3] == ["not told apart"] * 2
    assert not chromium.find("eigenvalues").is_displayed()  # an empty box
    assert chromium.text("eigenvalues-note") == "Not computed."
    assert chromium.errors() == []


GROUPS = {"two layers": "modules", "cut within a layer": {"0": 1, "1": 3, "2": 8}, "tensors": "tensors"}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_a_line_computes_the_entries_of_a_block(groups, chromium, tmp_path):
    setup, titles = tiny(dtype=torch.float64), list(OPERATORS)
    coarse = coarse_tour(setup.risk(), titles=titles, groups=groups, seed=3, effort=Effort(2, 0, 1, 1, 0))
    chromium.open(write_page(tmp_path / "coarse.html", coarse))
    given = {name: getattr(setup, name) for name in ("model", "loss", "params", "data")}
    edges = [0, *accumulate(coarse.groups.values())]
    for k, title in enumerate(titles):
        row, column = k % len(coarse.groups), (k + k // 2) % len(coarse.groups)
        chromium.click(row, column, panel=k)
        chromium.wait(f"return document.getElementById('code').textContent.includes('{OPERATORS[title][0].__name__}')")
        assert (chromium.find("row").get_attribute("value"), chromium.find("column").get_attribute("value")) == (
            f"{row}",
            f"{column}",
        )
        block = eval(chromium.text("code"), {"curvops": curvops, **given})
        whole = OPERATORS[title][0].of(setup.risk(), **operator_options(title, coarse.settings)).to_dense()
        expected = whole[edges[row] : edges[row + 1], edges[column] : edges[column + 1]]
        torch.testing.assert_close(block, expected, rtol=1e-12, atol=1e-14)
        if not coarse.errors[title][row, column]:
            torch.testing.assert_close(coarse.norms[title][row, column], block.norm(), rtol=1e-10, atol=1e-14)
    chromium.find("copy").click()
    assert chromium.run("return getSelection().toString()") == chromium.text("code")
    assert chromium.errors() == []


def test_many_groups(chromium, tmp_path):
    norms = torch.eye(360, dtype=torch.float64)
    names = {f"{k}": 1 for k in range(360)}
    chromium.open(write_page(tmp_path / "many.html", CoarseFile({"A": norms, "B": 3 * norms}, groups=names)))
    assert not chromium.find("alert").is_displayed()
    assert chromium.errors() == []
