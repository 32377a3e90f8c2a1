"""The steps that users build run, and their checks against dense matrices hold."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# run by `make docs`, `make minilm` and `make clients`, as they need packages of their own or draw figures
WALKS = {"visual_tour", "minilm_laplace", "minilm_coarse", "laplace_transformer"}
NAMES = sorted({path.stem for path in EXAMPLES.glob("*.py")} - WALKS)


@pytest.mark.parametrize("name", NAMES)
def test_example(name):
    spec = spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
