"""Other libraries have an environment of their own, in which `make clients` runs the tests of what serves them."""

from importlib.util import find_spec

NEEDS = {"test_laplace.py": "laplace", "test_laplace_rewards.py": "laplace", "test_gpytorch.py": "linear_operator"}
collect_ignore = [file for file, library in NEEDS.items() if not find_spec(library)]
