"""Libraries that only some features need."""

from __future__ import annotations

import importlib
from typing import Any

_PACKAGES = {"PIL": "Pillow", "sklearn": "scikit-learn"}  # where it has another name than what is imported


def extra(module: str, feature: str, package: str = "") -> Any:
    """A module that a feature needs; if it is missing, a ModuleNotFoundError says to install it, or the ``package``."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = package or package_of(module)
        raise ModuleNotFoundError(f"{feature} needs {package}: pip install {package}.", name=error.name) from None


def package_of(module: str) -> str:
    """The name by which a module is installed."""
    name = module.partition(".")[0]
    return _PACKAGES.get(name, name)
