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
