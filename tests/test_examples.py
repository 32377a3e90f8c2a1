"""The steps that users build run, and their checks against dense matrices hold."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# these are no functions: one is run by `make docs`, and the other by `make minilm`, as it needs a package of weights
WALKS = {"visual_tour", "minilm_laplace"}
NAMES = sorted({path.stem for path in EXAMPLES.glob("*.py")} - WALKS)


@pytest.mark.parametrize("name", NAMES)
def test_example(name):
    spec = spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
