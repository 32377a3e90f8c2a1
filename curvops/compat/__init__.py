"""``import curvops.compat`` makes ``import curvlinops`` resolve to curvops, under the names and arguments of curvlinops.

Scripts written for its releases 2 and 3 run with this one line before theirs. What differs is in
``docs/migrating.md``.

Example:
    >>> import curvops.compat
    >>> import torch
    >>> from curvlinops import GGNLinearOperator
    >>> model, data = torch.nn.Linear(3, 2), [(torch.rand(5, 3), torch.rand(5, 2))]
    >>> GGNLinearOperator(model, torch.nn.MSELoss(), list(model.parameters()), data).shape
    (8, 8)
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from curvops.compat.modules import MODULES, NAMES

PEER = "curvlinops"


def module(name: str, contents: dict[str, object]) -> ModuleType:
    """A module under the peer's name, in ``sys.modules`` and its parent; one that is there gets the contents."""
    if name not in sys.modules:
        sys.modules[name] = ModuleType(name, "Served by curvops.compat.")
        sys.modules[name].__spec__ = ModuleSpec(name, None, is_package=True)
        sys.modules[name].__path__ = []
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(module(parent, {}), own, sys.modules[name])
    vars(sys.modules[name]).update(contents)
    return sys.modules[name]


if getattr(sys.modules.get(PEER), "__file__", None) is not None:
    raise ImportError(
        f"curvops.compat: {PEER} itself is imported already, so its name is taken. Put 'import curvops.compat' before "
        f"the first import of {PEER}."
    )
for _name, _contents in MODULES.items():
    module(f"{PEER}.{_name}", _contents)
module(PEER, {**NAMES, "__all__": sorted(NAMES)})
