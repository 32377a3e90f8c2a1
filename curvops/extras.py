"""Libraries that only some features need."""

from __future__ import annotations

import importlib
from typing import Any


def extra(module: str, feature: str, package: str = "") -> Any:
    """A module that a feature needs; if it is missing, a ModuleNotFoundError says to install it, or the ``package``."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = package or module.partition(".")[0]
        raise ModuleNotFoundError(f"{feature} needs {package}: pip install {package}.", name=error.name) from None
