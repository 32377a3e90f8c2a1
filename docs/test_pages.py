"""The Python blocks of these pages run, in order; run by `make docs`."""

import re
import warnings
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent
# fragments of other pages stand for code of the reader's
PAGES = ["guide", "choosing", "mathematics", "extending", "page", "coarse", "command_line", "survive", "performance"]


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = (FOLDER / f"{page}.md").read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert blocks
    names: dict = {"__name__": page}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # of peft
        for block in blocks:
            line = text[: block.start(1)].count("\n")  # an error names the line of the page
            exec(compile("\n" * line + block[1], f"docs/{page}.md", "exec"), names)


@pytest.mark.parametrize("page", sorted(path.name for path in FOLDER.glob("*.md")))
def test_links_lead_somewhere_in_the_repository_too(page):
    text = re.sub(r"^(```+).*?^\1", "", (FOLDER / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for said, target in re.findall(r"(?<!`)\[([^\]\n]*)\]\(([^)\s]+)\)", text):
        assert said, f"a link to {target} without words"
        if "://" not in target and not target.startswith("#"):
            assert (FOLDER / target.partition("#")[0]).exists(), target
