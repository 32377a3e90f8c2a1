"""Notebooks: what is shown is well-formed HTML, escapes what comes from outside, and costs nothing."""

import sys
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import curvops
from curvops.clients.checks.report import Report, Row
from curvops.display import card, heat_map, table
from curvops.spectrum import EigenPairs

NAMES = ("<b>weight</b>", "a & 'b' \"c\"")


class Reader(HTMLParser):
    """Tags that are open, and what was read."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def picture(self):
        return next((attrs["src"] for tag, attrs in self.tags if tag == "img"), None)


def shown(value):
    return Reader(value._repr_html_())


@pytest.fixture(scope="module")
def problem():
    weight, bias = torch.randn(3, 4), torch.randn(3)
    params = dict(zip(NAMES, (weight, bias), strict=True))

    def model(params, X):
        return X @ params[NAMES[0]].T + params[NAMES[1]]

    return model, nn.CrossEntropyLoss(), params, [(torch.randn(5, 4), torch.arange(5) % 3)]


@pytest.mark.parametrize(
    "make",
    [
        curvops.HessianLinearOperator,
        curvops.GGNLinearOperator,
        curvops.EFLinearOperator,
        lambda *problem: 2 * curvops.HessianLinearOperator(*problem) + curvops.KFACLinearOperator(*problem),
        lambda *problem: curvops.InverseOperator(curvops.GGNLinearOperator(*problem), damping=1.0),
        lambda *problem: curvops.GGNLinearOperator(*problem)[NAMES[1]],
        lambda model, _, params, data: curvops.JacobianLinearOperator(model, params, data),
        lambda model, _, params, data: curvops.JacobianLinearOperator(model, params, data).T,
    ],
)
def test_operators_of_data_take_no_products(make, problem, monkeypatch):
    operator = make(*problem)

    def never(*_, **__):
        raise AssertionError("computed")

    for cls in (curvops.EmpiricalRisk, type(operator)):
        for name in ("walk", "_apply", "_apply_adjoint", "_dense"):
            if hasattr(cls, name):
                monkeypatch.setattr(cls, name, never)
    found = shown(operator)
    assert found.picture is None and f"{operator.shape[0]} × {operator.shape[1]}" in found.text
    assert not {tag for tag, _ in found.tags} & {"b", "script"}


def test_an_operator_says_what_is_known(problem):
    ggn = curvops.GGNLinearOperator(*problem)
    found = " ".join(shown(ggn).text)
    assert (
        "GGNLinearOperator" in found and "symmetric, positive semi-definite" in found and "torch.float32, cpu" in found
    )
    assert all(repr(name) in found for name in NAMES) and "central differences" in found
    hessian = curvops.HessianLinearOperator(*problem)
    _ = hessian @ torch.ones(15)
    assert "3 gradients" in " ".join(shown(hessian).text), "what a product costs, once one was taken"
    assert "none known" in " ".join(shown(ggn @ curvops.KFACLinearOperator(*problem)).text)


@pytest.mark.parametrize(
    "make",
    [
        curvops.KFACLinearOperator,
        curvops.EKFACLinearOperator,
        lambda *problem: curvops.KFACLinearOperator(*problem).inverse(0.1) @ curvops.KFACLinearOperator(*problem),
        lambda *problem: curvops.KFACLinearOperator(*problem)[NAMES[0]],
        lambda *_: curvops.DiagonalOperator(torch.arange(5.0)),
        lambda *_: curvops.OuterProductOperator(torch.arange(5.0), torch.ones(3)),
        lambda *_: curvops.IdentityOperator(curvops.TensorSpace.flat(1024)),
    ],
)
def test_what_is_at_hand_is_drawn(make, problem):
    assert shown(make(*problem)).picture.startswith("data:image/png;base64,")


def test_what_is_large_or_not_finite_is_not_drawn(monkeypatch):
    assert shown(curvops.IdentityOperator(curvops.TensorSpace.flat(1025))).picture is None
    for matrix in (torch.zeros(3, 3), torch.tensor([[1.0, torch.nan]]), torch.zeros(0, 3)):
        assert heat_map(matrix) == ""
    large = heat_map(torch.rand(1000, 700))
    assert 0 < len(large) < 100_000
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert heat_map(torch.ones(3, 3)) == ""


def test_results_are_shown(problem):
    ggn, kfac = curvops.GGNLinearOperator(*problem), curvops.KFACLinearOperator(*problem)
    cases = {
        "XTrace": ggn.trace(num_products=6),
        "exact but for rounding": kfac.trace(),
        "15 entries": ggn.diagonal(num_products=6),
        "residual": ggn.solve(torch.ones(15), 0.1),
        "start vectors": ggn.spectral_density(num_vectors=2, depth=4),
        "eigenvalue": ggn.eigenpairs(2),
        "Kronecker 3 ⊗ 4": kfac.explain(),
    }
    for expected, value in cases.items():
        assert expected in " ".join(shown(value).text), expected
    rows = (Row("<i>", "a & b", None, 1e-3, "FAILED", "because", 0.1), Row("x", "y", 1e-9, 1e-3, "ok", "", 0.2))
    found = shown(Report("title", rows, ("a <note>",)))
    assert {"<i>", "a & b", "FAILED", "1.0e-09", "a <note>", "1 ok, 1 FAILED, 0 not judged; 0.3 s"} <= set(found.text)


def test_long_tables_end():
    pairs = EigenPairs(torch.arange(100.0), torch.eye(100), torch.zeros(100), 5, False, "<why>")
    text = shown(pairs).text
    assert "… and 70 more rows" in text and "100 eigenpairs, not converged" in text and "<why>" in text
    assert table(("a",), []) == "" and Reader(card("<script>")).text == ["<script>"]
