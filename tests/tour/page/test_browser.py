"""The page in a real browser: it loads alone, each control does what it says, and numbers are those that were saved."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from selenium.webdriver.common.keys import Keys
from tour.page.pages import random_tour

from curvops.tour import MatrixFile
from curvops.tour.coarse_files import CoarseFile
from curvops.tour.identity import identity
from curvops.tour.page import write_page
from curvops.tour.setups import tiny

ROW, COLUMN = 9, 3  # of the tiny network
NAMES = {"row": "3.weight[1, 3]", "column": "3.weight[0, 1]"}


def array(tour, title):
    return tour.matrices[title].double().numpy()


def is_saved(text, matrix, row, column):
    """Whether a text is that very number in the matrix's own precision."""
    return np.array(text, dtype=matrix.numpy().dtype).tobytes() == matrix[row, column].numpy().tobytes()


def test_it_loads_alone(chromium, tour_page, tour):
    asked = chromium.open(tour_page)
    assert [address for address in asked if not address.startswith(("data:", "blob:"))] == [tour_page.as_uri()]
    assert chromium.errors() == []
    assert chromium.driver.title == "Three tiny images"
    assert list(chromium.images()) == list(tour.matrices)
    assert not chromium.find("loading").is_displayed()
    assert not chromium.find("stops").is_displayed()


def test_pointing_and_typing_read_the_saved_numbers(page, tour):
    for panel, title in ((0, "Hessian"), (5, "KFAC")):
        told, here = page.hover(ROW, COLUMN, panel=panel)
        assert here == title
        assert {name: told.pop(name) for name in NAMES} == NAMES
        assert list(told) == list(tour.matrices)
        assert all(is_saved(text, tour.matrices[title], ROW, COLUMN) for title, text in told.items())
    told, here = page.hover(ROW, COLUMN, "difference")
    gap = array(tour, "Generalized Gauss-Newton")[ROW, COLUMN] - array(tour, "Hessian")[ROW, COLUMN]
    assert float(told[here]) == gap
    for name, place in (("row", ROW), ("column", COLUMN)):
        page.type(name, str(place))
    told, _ = page.reading("entry")
    assert told["row"] == NAMES["row"]
    assert all(is_saved(told[title], matrix, ROW, COLUMN) for title, matrix in tour.matrices.items())
    page.type("row", "12000")  # far outside: the last row
    assert page.reading("entry")[0]["row"] == "3.bias[1]"
    for typed, meant in (("12000", "11"), ("1.5", "2"), ("-5", "0")):
        page.type("row", typed + Keys.TAB)
        assert page.find("row").get_attribute("value") == meant


def test_colours(page, tour):
    hessian = array(tour, "Hessian")
    everything = np.abs(np.stack([array(tour, title) for title in tour.matrices]))
    most = everything.max()
    floor = max(everything[everything > 0].min(), most * 1e-6)
    assert "exactly zero" in page.text("legend")
    place, low, high = page.images()["KFAC"]
    kfac = array(tour, "KFAC")
    assert np.array_equal(np.isnan(place), kfac == 0)  # a colour of its own
    with np.errstate(divide="ignore"):
        expected = np.log10(np.abs(kfac)).clip(min=low)
    np.testing.assert_allclose(place[kfac != 0], expected[kfac != 0], atol=1e-6)
    np.testing.assert_allclose([low, high], np.log10([floor, most]))

    page.choose("colors", "Signed logarithm")
    place, low, high = page.images()["Hessian"]
    np.testing.assert_allclose(place, np.sign(hessian) * np.log10(1 + np.abs(hessian) / floor), rtol=1e-6)
    assert low == -high
    assert "exactly zero" not in page.text("legend")

    page.choose("colors", "Linear")
    place, low, high = page.images()["Hessian"]
    assert np.array_equal(place, hessian)
    assert low == -high
    assert len({limits[1:] for limits in page.images().values()}) == 1
    page.choose("scale", "Each its own")
    for title, (_, low, high) in page.images().items():
        np.testing.assert_allclose([-low, high], np.quantile(np.abs(array(tour, title)), 0.99))
    assert "each panel" in page.text("legend")


def test_zoom_and_pan_are_linked_and_blocks_open(page, tour):
    first, second = (0, 2), (2, 12)
    assert list(tour.groups.values()) == [2, 10]
    whole = ((-0.5, 11.5), (-0.5, 11.5))

    def seen():
        assert len(set(page.ranges())) == 1
        assert page.ranges("difference") == page.ranges()[:1]
        return page.ranges()[0]

    assert seen() == whole
    page.click(5, 1, panel=4)
    page.wait("return document.getElementById('block-rows').value === '1'")
    block = tuple((a - 0.5, b - 0.5) for a, b in (second, first))
    assert seen() == block
    assert page.plot("panels", "p.layout.yaxis.ticktext") == ["3.weight", "3.bias"]
    page.find("whole").click()
    assert seen() == whole
    page.choose("block-rows", "2")
    page.choose("block-columns", "1")
    assert seen() == block
    page.find("panels").send_keys(Keys.ESCAPE)
    assert seen() == whole
    page.find("panels").send_keys("+", Keys.ARROW_DOWN)
    np.testing.assert_allclose(seen(), [(3.7, 9.7), (2.5, 8.5)])
    page.find("zoom-out").click()
    assert seen() == whole
    page.drag((2, 2), (8, 6), panel=2)
    page.wait("return document.getElementById('panels').layout.xaxis.range[0] > 0")
    np.testing.assert_allclose(seen(), [(2, 8), (2, 6)], atol=0.2)
    before = np.array(seen())
    page.choose("drag", "pan")
    page.drag((6, 5), (5, 4), panel=1)
    page.wait(
        "return Math.abs(document.getElementById('panels').layout.xaxis.range[0] - arguments[0]) > 0.3", before[1][0]
    )
    np.testing.assert_allclose(np.array(seen()) - before, 1, atol=0.2)
    assert page.errors() == []


def test_boundaries(page, tour):
    lines = "p.data.filter(t => t.type === 'scatter').map(t => t.x.filter(x => x !== null).length)"
    assert page.plot("panels", lines) == [4] * 12  # one across and one down in each panel, dark on pale
    assert page.plot("panels", "p.layout.yaxis.ticktext") == list(tour.groups)
    page.choose("edges", "Layers and parameters")
    assert page.plot("panels", lines) == [12, 12, 4, 4] * 6
    assert page.plot("panels", "p.layout.yaxis.ticktext") == list(tour.parameters)
    page.choose("edges", "None")
    assert page.plot("panels", lines) == []


def test_differences(page, tour):
    page.choose("minuend", "KFAC")
    page.choose("subtrahend", "Empirical Fisher")
    page.choose("colors", "Linear")
    one, other = array(tour, "KFAC"), array(tour, "Empirical Fisher")
    (image,) = page.images("difference").values()
    np.testing.assert_allclose(image[0], one - other, rtol=1e-6)

    def shares(norms):
        return [float(f"{100 * norm:.3g}") for norm in norms]

    overall = float(page.text("overall").split()[-2])
    assert [overall] == shares([np.linalg.norm(one - other) / np.linalg.norm(other)])
    blocks = [(i, j) for i in (slice(2), slice(2, 12)) for j in (slice(2), slice(2, 12))]
    cells = page.run("return [...document.querySelectorAll('#blocks td.number')].map(c => c.textContent)")
    expected = shares([np.linalg.norm((one - other)[b]) / np.linalg.norm(other[b]) for b in blocks])
    assert [float(cell.split()[0]) for cell in cells] == expected
    page.choose("subtrahend", "KFAC")
    assert page.text("overall").endswith(": 0 %.")


def test_eigenvalues_diagonals_and_traces(page, tour):
    page.choose("axis", "Linear")
    for k, title in enumerate(tour.matrices):
        matrix = array(tour, title)
        curves = {name: page.plot(name, f"p.data[{k}].y") for name in ("eigenvalues", "diagonal", "traces")}
        values = np.linalg.eigvalsh((matrix + matrix.T) / 2)[::-1]
        np.testing.assert_allclose(curves["eigenvalues"], values, rtol=1e-9, atol=1e-15)
        assert curves["diagonal"] == matrix.diagonal().tolist()
        np.testing.assert_allclose(curves["traces"], [matrix[:2, :2].trace(), matrix[2:, 2:].trace()])
    page.choose("axis", "Logarithm of the magnitude")
    hessian = np.linalg.eigvalsh(array(tour, "Hessian"))
    expected = np.sort(np.log10(np.abs(hessian)))[::-1]
    drawn = np.array(page.plot("eigenvalues", "p.data[0].y"), dtype=float)
    np.testing.assert_allclose(drawn[:5], expected[:5], atol=1e-6)
    assert page.plot("diagonal", "p.data[0].text[9]").startswith("Hessian: 3.weight[1, 3] = ")


def test_what_was_computed_is_told(page, tour):
    facts, told = page.text("facts"), page.find("explanations")
    for text in ("Three tiny images", "Seed", "Constant c", "0.3333333333333333", "1.2.3", "Seconds", "Peak memory"):
        assert text in facts
    told.find_element("css selector", "details:last-of-type summary").click()
    assert tour.explanations["KFAC"] in told.text


def test_what_tells_problems_apart_is_one_row(chromium, tmp_path):
    known = {"setup": "Net", **identity(tiny().risk())}
    chromium.open(write_page(tmp_path / "known.html", random_tour(settings=known)))
    rows = chromium.run("return [...document.querySelectorAll('#facts table:first-child th')].map(t => t.textContent)")
    named = ["Problem", "Device", "Precision", "Risk", "Norm of its gradient", "Fingerprint"]
    assert rows == ["Parameters", "Matrices", *named]
    assert known["content"]["weights"] in chromium.text("facts")


def test_light_dark_and_paper(page):
    def ground():
        return page.run("return getComputedStyle(document.body).backgroundColor"), page.plot(
            "panels", "p.layout.font.color"
        )

    try:
        assert ground() == ("rgb(255, 255, 255)", "#1b1e23")
        page.find("theme").click()
        dark = ("rgb(20, 22, 26)", "#e8eaee")
        assert ground() == dark
        assert page.find("theme").get_attribute("aria-pressed") == "true"
        page.run("dispatchEvent(new Event('beforeprint'))")
        assert ground() == ("rgb(255, 255, 255)", "#1b1e23")
        assert page.run("return [...document.querySelectorAll('details')].every(d => d.open)")
        assert page.plot("panels", "p._fullLayout.width") <= 681  # 180 mm
        page.run("dispatchEvent(new Event('afterprint'))")
        assert ground() == dark
        page.find("theme").click()
        assert ground()[1] == "#1b1e23"
        page.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        page.wait("return document.documentElement.dataset.theme === 'dark'")
        assert ground() == dark
        assert page.errors() == []
    finally:
        page.devtools("Emulation.setEmulatedMedia", features=[])
        page.wait("return document.documentElement.dataset.theme === 'light'")


def test_on_a_phone_there_is_one_column(page):
    def columns():
        return len(
            set(
                page.plot(
                    "panels", "Object.keys(p.layout).filter(k => k.startsWith('xaxis')).map(k => p.layout[k].domain[0])"
                )
            )
        )

    assert columns() == 3
    try:
        page.devtools("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=False)
        page.wait("return document.getElementById('panels')._fullLayout.width < 360")
        assert columns() == 1
        assert page.run("return document.documentElement.scrollWidth") <= 360
    finally:
        page.devtools("Emulation.clearDeviceMetricsOverride")
        page.wait("return document.getElementById('panels')._fullLayout.width > 1000")


def test_controls_can_be_reached_and_have_names(page):
    unnamed = page.run(
        "return [...document.querySelectorAll('button, select, input')].filter(e => e.checkVisibility())"
        ".filter(e => !(e.labels?.length || e.textContent.trim() || e.ariaLabel)).map(e => e.id)"
    )
    assert unnamed == []
    page.find("theme").send_keys(Keys.TAB)
    assert page.run("return document.activeElement.id") == "colors"
    assert page.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


EVIL = "</script><img src=x onerror='window.hit=1'>$x^2$&amp;<b>"


def test_a_film_has_a_slider_and_names_are_text_whatever_they_are(chromium, tmp_path):
    given = {"titles": (EVIL, "B"), "parameters": {EVIL: (12,)}, "groups": {"1": 6, EVIL: 6}}
    first = random_tour(seed=1, **given, settings={EVIL: EVIL}, explanations={EVIL: EVIL})
    second = random_tour(seed=2, **given)
    chromium.open(write_page(tmp_path / "film.html", {"step 0": first, EVIL: second}, title=EVIL))
    assert chromium.driver.title == EVIL
    assert chromium.run("return document.querySelector('#panels .annotation text').textContent") == EVIL
    assert chromium.run("return document.querySelector('#facts tr:nth-child(3)').textContent") == EVIL + EVIL
    before, low, high = chromium.images()[EVIL]

    chromium.find("stop").send_keys(Keys.ARROW_RIGHT)
    chromium.wait("return document.getElementById('stop-label').textContent === arguments[0]", EVIL)
    after = chromium.images()[EVIL]
    assert (low, high) == after[1:]  # one colour domain
    assert not np.array_equal(before, after[0])
    told, here = chromium.hover(1, 8)
    assert (here, told["row"]) == (EVIL, f"{EVIL}[1]")
    assert is_saved(told[EVIL], second.matrices[EVIL], 1, 8)
    chromium.choose("axis", "Linear")
    values = torch.linalg.eigvalsh(second.matrices[EVIL].double()).flip(0)
    np.testing.assert_allclose(chromium.plot("eigenvalues", "p.data[0].y"), values)
    assert chromium.run("return [window.hit ?? null, document.querySelectorAll('img').length]") == [None, 0]
    assert chromium.errors() == []


def test_zeros_keep_their_sign_and_doubles_their_range(chromium, tmp_path):
    single = torch.tensor([[-0.0, 0.0], [0.0, 1.0]])
    double = torch.tensor([[1e200, -1e-50], [-1e-50, 1.0]], dtype=torch.float64)
    chromium.open(write_page(tmp_path / "tour.html", MatrixFile({"A": single, "B": double})))
    told, _ = chromium.hover(0, 0)
    assert (told["A"], told["B"]) == ("-0", "1e+200")
    place, low, _ = chromium.images()["B"]
    np.testing.assert_allclose(place, [[200, low], [low, low]])  # nothing is exactly zero
    chromium.choose("colors", "Linear")
    assert np.array_equal(chromium.images()["B"][0], double)
    assert chromium.errors() == []


def test_averaged_cells_say_so(chromium, tmp_path):
    stop = random_tour(40)
    chromium.open(write_page(tmp_path / "cells.html", stop, max_bytes=2 * 12 * 10**2))
    assert "up to 4 × 4 neighbouring entries" in chromium.text("cells-note")
    told, _ = chromium.hover(0, 6)
    cell = stop.matrices["A"][:4, 24:28]
    assert (told["row"], told["column"]) == ("w[0, 0] … [3, 0] (4 entries)", "b[4] … [7] (4 entries)")
    mean, low, high = (float(part) for part in told["A"].removeprefix("mean ").replace(", from", " to").split(" to "))
    assert (np.float32(low), np.float32(high)) == (cell.min().numpy(), cell.max().numpy())
    assert mean == pytest.approx(float(cell.mean()), rel=1e-3)
    assert chromium.errors() == []


def test_the_tutorial_fits(chromium, tmp_path):
    generator = torch.Generator().manual_seed(0)
    matrices = {f"matrix {k}": torch.randn(683, 683, generator=generator) for k in range(6)}
    stop = MatrixFile(matrices, {"0.weight": (4, 28), "2.weight": (571,)}, {"1": 112, "2": 571})
    path = write_page(tmp_path / "tour.html", stop)
    assert path.stat().st_size < 25e6  # of numbers that nothing compresses
    chromium.open(path)
    chromium.click(20, 20, panel=5)  # an entry of the whole is smaller than a pixel
    chromium.wait("return document.getElementById('block-rows').value === '0'")
    row, column = 30, 100
    told, _ = chromium.hover(row, column, panel=5)
    assert (told["row"], told["column"]) == ("0.weight[1, 2]", "0.weight[3, 16]")
    assert is_saved(told["matrix 5"], matrices["matrix 5"], row, column)
    assert chromium.errors() == []


NAMES_OF_LAYERS = [f"encoder.layer.{k}.attention.output.dense" for k in range(15)] + ["fc"]


def test_no_name_is_lost_or_touches_the_next(chromium, tmp_path):
    sizes = [4, 70, 2, 70, 2]
    layers = {"conv1": 4, "conv2": 70, "norm": 2, "conv3": 70, "fc": 2}
    stop = random_tour(
        sum(sizes), parameters={f"{name}.weight": (size,) for name, size in layers.items()}, groups=layers
    )
    chromium.open(write_page(tmp_path / "layers.html", stop))
    assert chromium.plot("panels", "p.layout.yaxis.ticktext") == list(layers)  # the last two rows' as well
    assert chromium.text("overall").startswith("Frobenius norm of the difference over that of the A")
    assert "Hollow" not in chromium.text("eigenvalues-note")  # of lines

    values = torch.rand(16, 16, dtype=torch.float64) + 1
    norms = {"Generalized Gauss-Newton": values, "Hessian": 1.23456789 * torch.ones_like(values)}
    coarse = CoarseFile(
        norms,
        errors={title: 0.00571 * torch.ones_like(values) for title in norms},
        traces={"Hessian": values[0]},
        parameters=dict.fromkeys(NAMES_OF_LAYERS, (3,)),
        groups=dict.fromkeys(NAMES_OF_LAYERS, 3),
    )
    chromium.open(write_page(tmp_path / "coarse.html", coarse))
    assert chromium.hover(0, 1)[0]["Hessian"] == "1.23457 ± 0.00571"
    assert chromium.run("return document.getElementById('subtrahend').selectedOptions[0].text") == "Hessian"
    boxes = chromium.run(
        "return [...document.querySelectorAll('#traces .xtick text')].map(t => t.getBoundingClientRect())"
        ".map(b => [b.left, b.right])"
    )
    assert len(boxes) == 16
    assert all(left >= right for (_, right), (left, _) in pairwise(boxes))
    assert chromium.find("blocks-more").is_displayed()  # sixteen columns
    chromium.choose("scale", "Each its own")
    cut = """const right = (element) => element.getBoundingClientRect().right;
        return [...document.querySelectorAll('.annotation-text, #blocks caption span')]
        .filter((text) => right(text) > right(text.closest('.scroll') ?? document.body)).map((text) => text.textContent)"""
    try:
        chromium.devtools(
            "Emulation.setDeviceMetricsOverride", width=390, height=740, deviceScaleFactor=1, mobile=False
        )
        chromium.wait("return document.getElementById('difference')._fullLayout.width < 390")
        assert chromium.run(cut) == []
    finally:
        chromium.devtools("Emulation.clearDeviceMetricsOverride")
    assert chromium.errors() == []
