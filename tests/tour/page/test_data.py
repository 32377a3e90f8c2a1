"""What a page holds of a tour's files, and what `write_page` refuses."""

import base64
import json
import re
import zlib

import numpy as np
import pytest
import torch
from tour.page.pages import film, random_tour

from curvops.tour import MatrixFile
from curvops.tour.coarse_files import CoarseFile
from curvops.tour.page import write_page


def data_of(path):
    """Return a page's data with its blobs as arrays, and the page's text."""
    text = path.read_text()
    held = {int(k): blob for k, blob in re.findall(r'<script type="text/plain" id="blob-(\d+)">([^<]*)</script>', text)}

    def unpacked(tree):
        if isinstance(tree, dict) and "blob" in tree:
            content = zlib.decompress(base64.b64decode(held[tree["blob"]]))
            return np.frombuffer(content, tree["type"]).reshape(tree["shape"])
        if isinstance(tree, dict):
            return {key: unpacked(value) for key, value in tree.items()}
        return [unpacked(value) for value in tree] if isinstance(tree, list) else tree

    return unpacked(json.loads(re.search(r'id="data">([^<]*)</script>', text)[1])), text


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tour.html"


def test_entries_are_held_bit_by_bit(path):
    single = torch.tensor([[1e-45, -0.0], [3.4e38, 1 / 3]])
    double = torch.tensor([[5e-324, -0.0], [1e150, 1 / 3]], dtype=torch.float64)
    data, _ = data_of(
        write_page(
            path, MatrixFile({"single": single, "double": double, "half": single.bfloat16()[1:, 1:].expand(2, 2)})
        )
    )
    sheets = data["stops"][0]["sheets"]
    for title, matrix in (("single", single), ("double", double)):
        assert sheets[title]["values"].tobytes() == matrix.numpy().tobytes()
    assert np.all(sheets["half"]["values"] == float(torch.tensor(1 / 3).bfloat16()))


def test_rows_have_the_names_of_parameters_and_groups(path):
    parameters = {"w": (2, 3), "scalar": (), "empty": (0, 4), "b": (2,)}
    data, _ = data_of(write_page(path, MatrixFile({"A": torch.eye(9)}, parameters, {"1": 4, "none": 0, "2": 5})))
    pieces = [(p["name"], p["shape"], p["first"], p["size"], p["rows"]) for p in data["axis"]["pieces"]]
    assert pieces == [("w", [2, 3], 0, 4, 4), ("w", [2, 3], 4, 2, 2), ("scalar", [], 0, 1, 1), ("b", [2], 0, 2, 2)]
    assert data["axis"]["groups"] == [{"label": "1", "size": 4, "rows": 4}, {"label": "2", "size": 5, "rows": 5}]
    assert data["kind"] == "entries"


def test_norms_traces_and_eigenvalues_are_those_of_the_matrices(path):
    stop = random_tour(titles=("A", "B", "C"))
    view = data_of(write_page(path, stop))[0]["stops"][0]
    a, b, c = (matrix.double() for matrix in stop.matrices.values())

    def norms(matrix):
        return [[matrix[i : i + 6, j : j + 6].norm() for j in (0, 6)] for i in (0, 6)]

    np.testing.assert_allclose(view["blocks"]["B"], norms(b), rtol=1e-14)
    for found, expected in zip(view["pairs"], (a - b, a - c, b - c), strict=True):
        np.testing.assert_allclose(found, norms(expected), rtol=1e-14)
    np.testing.assert_allclose(view["traces"]["C"]["values"], [c[:6, :6].trace(), c[6:, 6:].trace()], rtol=1e-14)
    np.testing.assert_allclose(view["eigenvalues"]["A"]["values"], torch.linalg.eigvalsh(a).flip(0), rtol=1e-12)
    assert np.array_equal(view["diagonals"]["A"], stop.matrices["A"].diagonal())


def test_beyond_its_bytes_a_page_holds_cells_with_their_range(path):
    stop = random_tour(30, parameters={"w": (3, 7), "b": (9,)}, groups={"1": 25, "2": 5})
    data, _ = data_of(write_page(path, stop, max_bytes=2 * 12 * 8**2))
    assert data["kind"] == "cells"
    starts = []  # no cell goes over the end of a parameter or a group
    row = 0
    for piece in data["axis"]["pieces"]:
        starts += range(row, row + piece["size"], piece["step"])
        row += piece["size"]
    assert {0, 21, 25} <= set(starts)
    assert len(starts) <= 8
    matrix, sheet = stop.matrices["A"].double().numpy(), data["stops"][0]["sheets"]["A"]
    for i, (top, bottom) in enumerate(zip(starts, [*starts[1:], 30], strict=True)):
        for j, (left, right) in enumerate(zip(starts, [*starts[1:], 30], strict=True)):
            cell = matrix[top:bottom, left:right]
            assert (sheet["low"][i, j], sheet["high"][i, j]) == (cell.min(), cell.max())
            np.testing.assert_allclose(sheet["values"][i, j], cell.mean(), rtol=1e-6)
    np.testing.assert_allclose(data["stops"][0]["blocks"]["A"][0][0], np.linalg.norm(matrix[:25, :25]), rtol=1e-14)
    assert len(data["stops"][0]["diagonals"]["A"]) == 30


def test_cells_of_double_precision_keep_its_range(path):
    matrix = torch.zeros(12, 12, dtype=torch.float64)
    matrix[0, 0], matrix[4, 4], matrix[8, 8] = 1e-50, 1e200, 5e-324
    for large in (1e200, 2e307):  # the sum of whose entries is infinite
        matrix[:4, 8:] = large
        stop = MatrixFile({"A": matrix, "B": matrix.float().clamp(max=1)}, {"w": (12,)})
        data, _ = data_of(write_page(path, stop, max_bytes=(24 + 12) * 3**2))
        assert data["kind"] == "cells" and len(data["axis"]["pieces"]) == 1
        sheet = data["stops"][0]["sheets"]["A"]
        assert (sheet["values"].dtype, data["stops"][0]["sheets"]["B"]["high"].dtype) == (np.float64, np.float32)
        np.testing.assert_array_equal(sheet["high"], [[1e-50, 0, large], [0, 1e200, 0], [0, 0, 5e-324]])
        np.testing.assert_allclose(sheet["values"][0, 2], large, rtol=1e-14)
        np.testing.assert_allclose(sheet["values"][1, 1], 1e200 / 16, rtol=1e-14)
        assert sheet["scale"] == {"least": 5e-324, "most": large, "usual": pytest.approx(large, rel=0.1)}


def test_large_matrices_have_no_eigenvalues(path, monkeypatch):
    monkeypatch.setattr("curvops.tour.page.stops.EIGENVALUES", 11)
    data, _ = data_of(write_page(path, random_tour(12)))
    assert data["stops"][0]["eigenvalues"] == {}


def test_no_text_ends_a_script(path):
    evil = "</script><script>alert(1)</script><!--"
    stop = random_tour(2, titles=(evil,), parameters={evil: (2,)}, groups={evil: 2}, settings={evil: [evil]})
    data, text = data_of(write_page(path, {evil: stop}, title=evil))
    assert data["titles"] == [evil]
    assert data["stops"][0]["about"]["settings"] == {evil: evil}
    assert "<script>alert" not in text
    assert "<!--" not in text
    assert "&lt;/script&gt;" in text


def test_it_loads_nothing(path):
    _, text = data_of(write_page(path, film()))
    assert not re.search(r"""(src|href)\s*=\s*["']|url\(|@import""", text)
    assert "default-src 'none'" in text


def test_a_failure_leaves_the_page_that_was_there(path, monkeypatch):
    path.write_text("before")
    monkeypatch.setattr("pathlib.Path.write_text", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_page(path, random_tour(2))
    monkeypatch.undo()
    assert [path.read_text(), list(path.parent.iterdir())] == ["before", [path]]


NAN = torch.full((2, 2), float("nan"))
REFUSED = {
    "no stop": ({}, ValueError, "at least one stop, got none"),
    "a tensor": ({"x": torch.eye(2)}, TypeError, "stop 'x' must be a MatrixFile or a CoarseFile, got Tensor"),
    "no matrix": (MatrixFile({}), ValueError, "has no matrices"),
    "not square": (MatrixFile({"A": torch.ones(2, 3)}), ValueError, "'A': expected a matrix 2 × 2, got \\(2, 3\\)"),
    "two sizes": (MatrixFile({"A": torch.eye(2), "B": torch.eye(3)}), ValueError, "'B': expected a matrix 2 × 2, got"),
    "NaN": ({"s": MatrixFile({"A": NAN})}, ValueError, "'A' of stop 's' has 4 entries that are NaN or infinite"),
    "parameters": (MatrixFile({"A": torch.eye(2)}, {"w": (3,)}), ValueError, "matrices with 3 rows, as many as their parameters"),
    "groups": (MatrixFile({"A": torch.eye(2)}, {}, {"1": 3}), ValueError, "matrices with 3 rows, as many as their groups"),
    "titles": ({"a": random_tour(), "b": random_tour(titles="BA")}, ValueError, "same titles, but 'a' has \\['A', 'B'\\]"),
    "kinds": ({"a": random_tour(), "b": CoarseFile({"A": torch.eye(1)}, groups={"1": 1})}, ValueError, "same kind of file"),
    "blocks": (CoarseFile({"A": torch.eye(2)}, groups={"1": 1}), ValueError, "'A': expected a matrix 1 × 1, got \\(2, 2\\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_refuses(path, case):
    stops, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        write_page(path, stops)
    assert not path.exists()
