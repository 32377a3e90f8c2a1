"""Each example is run by some chore, and the tutorials among them stand in the gallery."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = {path.stem: path.read_text() for path in (ROOT / "examples").glob("*.py")}
CONF = (ROOT / "docs" / "conf.py").read_text()
# run where their packages are, by chores of their own; all others as `make docs` builds the gallery
(IGNORED,) = re.findall(r'"ignore_pattern": r"(.*)"', CONF)
TUTORIALS = sorted(name for name in EXAMPLES if not re.search(IGNORED, f"{name}.py"))


def test_each_example_is_run_by_a_chore():
    makefile = (ROOT / "Makefile").read_text()
    for name in EXAMPLES.keys() - set(TUTORIALS):
        used = any(f"from {name} import" in text for text in EXAMPLES.values())
        assert used or f"examples/{name}.py" in makefile, f"nothing runs examples/{name}.py"


def test_the_gallery_has_each_tutorial_in_its_place():
    (order,) = re.findall(r"ExplicitOrder\((.*?)\n    \)", CONF, re.DOTALL)
    assert sorted(re.findall(r'^ +"(\w+)",$', order, re.MULTILINE)) == TUTORIALS


def test_a_tutorial_has_a_title_and_text_between_its_steps():
    for name in TUTORIALS:
        title, line = (ast.get_docstring(ast.parse(EXAMPLES[name])) or "\n").splitlines()[:2]
        assert line == "=" * len(title) and title, name
        assert len(re.findall(r"^# %%\n# \S", EXAMPLES[name], re.MULTILINE)) >= 3, name
