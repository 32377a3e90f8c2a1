"""Models and losses in words that are the same in another process."""

from __future__ import annotations

import re
from typing import Any

from torch.nn import Module

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_PLAIN = (bool, int, float, complex, str, type(None))


def described(thing: Any) -> str:
    """A module with its submodules, modes and plain attributes, or a function's name; without addresses in memory.

    Example:
        >>> import torch
        >>> described(torch.nn.ReLU())
        'ReLU() [: inplace=False, training=True]'
    """
    text = repr(thing) if isinstance(thing, Module) else str(getattr(thing, "__qualname__", repr(thing)))
    modules = thing.named_modules(remove_duplicate=False) if isinstance(thing, Module) else []
    own = [f"{name}: {', '.join(_attributes(module))}" for name, module in modules]
    return _ADDRESS.sub("", text) + (f" [{'; '.join(own)}]" if own else "")


def _attributes(module: Module) -> list[str]:
    plain = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return [f"{name}={value!r}" for name, value in sorted(plain.items()) if isinstance(value, _PLAIN)]
