"""A library that is missing is named as it is installed."""

import sys

import pytest


def test_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("laplace", "laplace.curvature", "laplace.utils.matrix", "linear_operator"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("curvops.clients.laplace", "curvops.clients.laplace_kron", "curvops.clients.gpytorch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    message = "curvops.clients.laplace needs laplace-torch: pip install laplace-torch."
    with pytest.raises(ModuleNotFoundError, match=message):
        import curvops.clients.laplace
    with pytest.raises(ModuleNotFoundError, match=r"curvops\.clients\.gpytorch needs linear_operator: pip install"):
        import curvops.clients.gpytorch  # noqa: F401
