"""`help()` of each public class and function shows all arguments that it takes."""

import inspect
import re
from typing import get_args, get_origin, get_type_hints

import pytest
from typing_extensions import Unpack, is_typeddict

import curvops

NAMES = [name for name in curvops.__all__ if name not in ("Estimate", "RanksError")]  # made by us, not by hand


def arguments(found):
    """Names of all arguments, those too that a typed dict gathers."""
    function = found.__init__ if inspect.isclass(found) else found
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(found).parameters.items():
        assert parameter.kind is not parameter.VAR_POSITIONAL, f"*{name} does not say what it takes"
        hint = hints.get(name)
        if parameter.kind is parameter.VAR_KEYWORD and get_origin(hint) is Unpack:
            (options,) = get_args(hint)
            assert is_typeddict(options)
            yield from options.__annotations__
        else:
            yield name


@pytest.mark.parametrize("name", NAMES)
def test_all_arguments_are_told(name):
    found = getattr(curvops, name)
    text = inspect.getdoc(found)
    missing = [argument for argument in arguments(found) if not re.search(rf"\b{argument}\b", text)]
    assert text and not missing, f"help(curvops.{name}) does not tell {missing}"
