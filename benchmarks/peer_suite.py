"""The test-suite of curvlinops, run against `curvops.compat`: counts by file, and the failures by their messages.

Usage: python benchmarks/peer_suite.py PATH_OF_ITS_REPOSITORY [FILE_OR_PYTEST_OPTION …]
       python benchmarks/peer_suite.py PATH_OF_ITS_REPOSITORY --gallery [EXAMPLE …]
The files of its tests are run as they are (they need ``einops``). What they read of its internals, attributes with a
leading underscore, lists of options, and the Kronecker factors that they change, is put in place here. The examples
of its gallery are run as they are, in processes that have imported `curvops.compat`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor

from curvops import LinearOperator, compat
from curvops.compat.kronecker import EKFACLinearOperator, FisherType, KFACLinearOperator, KFACType
from curvops.compat.operators import GGNLinearOperator
from curvops.operators.block_diagonal import Placed
from curvops.operators.blocks import Block, EigenBlock, KroneckerBlock

# estimators, inverses, submatrices, Jacobians, Hessian, GGN, EF, KFAC, EKFAC
FILES = [
    *("trace", "diagonal", "norm", "papyan2020traces", "examples"),
    *("test_inverse.py", "test_submatrix.py", "test_jacobian.py", "test_hessian.py", "test_gradient_moments.py"),
    *("test_ggn.py", "test_ggn_diagonal.py", "test_fisher.py", "test_kfac.py", "test_ekfac.py"),
]
WITHOUT_LATEX = "import matplotlib\nmatplotlib.rcParams.validate['text.usetex'] = lambda value: False\n"


def internals() -> None:
    """What its tests read of its internals."""
    shapes = {"_in_shape": "domain", "_out_shape": "codomain"}
    for name, space in shapes.items():
        setattr(LinearOperator, name, property(lambda op, space=space: list(getattr(op, space).shapes.values())))
    for operator in (KFACLinearOperator, EKFACLinearOperator):
        operator._BACKENDS = ("hooks", "make_fx")
        operator.__iter__ = lambda op: iter((None, [Factors(op, k) for k in range(len(op.blocks))], None))
    GGNLinearOperator._mc_samples = property(lambda op: op.mc_samples)
    GGNLinearOperator._seed = property(lambda op: op.seed, lambda op, seed: setattr(op, "seed", seed))
    types = SimpleNamespace(_SUPPORTED_FISHER_TYPE=tuple(FisherType), _SUPPORTED_KFAC_APPROX=tuple(KFACType))
    gradients = SimpleNamespace(_SUPPORTED_FISHER_TYPE=tuple(FisherType)[:3], _SUPPORTED_KFAC_APPROX=tuple(KFACType))
    compat.module("curvlinops.computers.kfac_hooks", {"HooksKFACComputer": types})
    compat.module("curvlinops.computers.ekfac_hooks", {"HooksEKFACComputer": gradients})


class Factors:
    """The Kronecker factors ``[n, n]`` of a block, which can be replaced: ``factors[0] = …``."""

    def __init__(self, operator: KFACLinearOperator, place: int) -> None:
        self._operator, self._place = operator, place

    @property
    def _placed(self) -> Placed:
        return self._operator.blocks[self._place]

    def _replace(self, block: Block) -> None:
        blocks = list(self._operator.blocks)
        blocks[self._place] = replace(self._placed, block=block)
        self._operator._blocks = blocks

    def _dense(self) -> list[Tensor]:
        block = self._placed.block
        if not isinstance(block, KroneckerBlock) or block.shape[0] > 1:
            raise NotImplementedError(f"{self._placed.label}: expected one Kronecker product, got {block.shape}.")
        factors = [f[0].diag() if f.ndim == 2 else f[0] for f in (block.left, block.right)]
        return [factors[0] * factors[1]] if factors[1].shape == (1, 1) else factors

    def __len__(self) -> int:
        return len(self._dense())

    def __getitem__(self, k: int) -> Tensor:
        return self._dense()[k]

    def __setitem__(self, k: int, factor: Tensor) -> None:
        factors = self._dense()
        factors[k] = factor
        left, right = factors if len(factors) == 2 else (factors[0], factor.new_ones(1, 1))
        self._replace(KroneckerBlock(left.unsqueeze(0), right.unsqueeze(0)))

    @property
    def eigenvalues(self) -> Tensor:
        """The eigenvalues, which can be replaced."""
        return self._placed.eigen().values.flatten()

    @eigenvalues.setter
    def eigenvalues(self, values: Tensor) -> None:
        eigen = self._placed.eigen()
        self._replace(EigenBlock(eigen.left, eigen.right, values.reshape(eigen.shape)))


class Counts:
    """A pytest plugin that counts outcomes by file, and failures by message."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.failures: dict[str, Counter[str]] = defaultdict(Counter)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._add(report.nodeid, report.outcome, report.longrepr)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._add(report.nodeid, "failed", report.longrepr)

    def _add(self, node: str, outcome: str, shown: Any) -> None:
        file, _, name = node.partition("::")
        self.outcomes[file][outcome] += 1
        if outcome == "failed":
            crash = getattr(getattr(shown, "reprcrash", None), "message", str(shown)).strip().splitlines()
            message = crash[0] if hasattr(shown, "reprcrash") else crash[-1]
            self.failures[f"{file}::{name.partition('[')[0]}"][re.sub(r"0x\w+", "…", message)[:200]] += 1

    def report(self) -> str:
        lines = ["", "| file | passed | skipped | failed |", "|---|---|---|---|"]
        columns = ("passed", "skipped", "failed")
        for file, found in [*self.outcomes.items(), ("all", sum(self.outcomes.values(), Counter()))]:
            lines.append(" | ".join(["| " + file, *(str(found[name]) for name in columns)]) + " |")
        for test, messages in self.failures.items():
            lines += [f"{number:5d} × {test}: {message}" for message, number in messages.items()]
        return "\n".join(lines)


@contextmanager
def started_with_compat() -> Iterator[None]:
    """A context in which processes that are started as ``python`` are this one, and import `curvops.compat` first."""
    with TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(
            "import curvops.compat\n" + ("" if which("latex") else WITHOUT_LATEX)
        )
        path = os.pathsep.join([folder, str(Path(compat.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        with patch.dict(os.environ, PYTHONPATH=path, PATH=programs, MPLBACKEND="agg"):
            os.chdir(folder)  # where the examples save their figures
            yield
            os.chdir("/")


def tests(repository: Path, arguments: list[str]) -> None:
    internals()
    sys.path.insert(0, str(repository))
    chosen = [a for a in arguments if not a.startswith("-")] or FILES
    files = [str(repository / "test" / name) for name in chosen if (repository / "test" / name.split("::")[0]).exists()]
    options = [a for a in arguments if a.startswith("-")]
    quiet = ["-q", "--no-header", "--tb=no", "--show-capture=no", "--disable-warnings", "-p", "no:cacheprovider"]
    counts = Counts()
    pytest.main([*quiet, "--rootdir", str(repository), *options, *files], plugins=[counts])
    print(counts.report())


def gallery(repository: Path, names: list[str]) -> None:
    folder = repository / "docs" / "examples" / "basic_usage"
    for example in [folder / name for name in names] or sorted(folder.glob("example_*.py")):
        begin = time.perf_counter()
        with TemporaryDirectory() as place:
            done = subprocess.run(["python", str(example)], cwd=place, capture_output=True, text=True)
        why = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [""])[-1][:200]
        outcome = "runs" if done.returncode == 0 else "fails"
        print(f"| {example.name} | {outcome} | {time.perf_counter() - begin:.0f} s | {why} |", flush=True)


if __name__ == "__main__":
    path, rest = Path(sys.argv[1]).resolve(), sys.argv[2:]
    with started_with_compat():
        gallery(path, rest[1:]) if rest[:1] == ["--gallery"] else tests(path, rest)
