"""Data flows one way: each floor imports only floors below it, at the top of its files, and no file is long."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "curvops"
FLOORS = [
    {""},  # the files beside the folders
    {"losses"},
    {"risk", "solvers", "spectrum", "estimators"},
    {"operators"},
    {"products"},
    {"kronecker"},
    {"clients", "plots", "tour"},
    {"compat", "cli"},
]
TOOLBOX = ["solvers", "spectrum", "estimators"]  # for anybody's matrices
FILES = sorted(PACKAGE.rglob("*.py"))


def module(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(name):
    """The package itself, that is its list of names, stands with the command line on top."""
    part = "cli" if name in ("curvops", "curvops.__main__") else name.split(".")[1]
    return next((k for k, parts in enumerate(FLOORS) if part in parts), 0)


def imports(path):
    tree = ast.parse(path.read_text())
    found = [(node, node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    names = {module(other) for other in FILES}
    top = set(map(id, tree.body))
    for node, name in found:
        if name.split(".")[0] == "curvops":
            # the command line says what to install where click is missing, and the list of names is imported lazily
            late = module(path) in ("curvops", "curvops.cli")
            assert id(node) in top or late, f"{module(path)} imports {name} inside something"
            for alias in node.names:
                yield f"{name}.{alias.name}" if f"{name}.{alias.name}" in names else name


@pytest.mark.parametrize("path", FILES, ids=module)
def test_each_file_knows_its_place(path):
    own = module(path)
    assert len(path.read_text().splitlines()) <= 400
    for name in imports(path):
        assert floor(name) <= floor(own) or (name == "curvops" and own.startswith("curvops.tour")), (
            f"{own} imports {name}"
        )


@pytest.mark.parametrize("path", FILES, ids=module)
def test_texts_are_utf_8_wherever_they_are_written(path):
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("read_text", "write_text", "open"):
            modes = [one.value for one in call.args if isinstance(one, ast.Constant)]
            binary = any(isinstance(mode, str) and "b" in mode for mode in modes) and call.func.attr == "open"
            known = any(keyword.arg == "encoding" for keyword in call.keywords)
            other = isinstance(call.func.value, ast.Name) and call.func.value.id in ("Image", "os")  # of no texts
            assert binary or known or other, f"line {call.lineno}: {call.func.attr}(…) without encoding"


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name in TOOLBOX], ids=module)
def test_the_toolbox_knows_no_neural_network(path):
    for name in imports(path):
        assert floor(name) == 0 or name.split(".")[1] in TOOLBOX, f"{module(path)} imports {name}"


def test_no_circle():
    graph = {module(path): {n for n in imports(path) if n != "curvops"} for path in FILES}
    while graph:
        free = [name for name, needed in graph.items() if not needed & graph.keys() - {name}]
        assert free, f"a circle among {sorted(graph)}"
        for name in free:
            del graph[name]
