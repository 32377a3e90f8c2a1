"""What is missing is named, with what to install."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from curvops import GGNLinearOperator, KFACLinearOperator
from curvops.extras import extra


def problem() -> Any:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, nn.MSELoss(), dict(model.named_parameters()), [(torch.rand(4, 3), torch.rand(4, 2))]


def test_an_installed_module_is_given() -> None:
    assert extra("torch.linalg", "This") is torch.linalg


@pytest.mark.parametrize(
    ("module", "use", "feature"),
    [
        ("tqdm", lambda path: GGNLinearOperator(*problem(), progressbar=True), "progressbar=True"),
        ("safetensors", lambda path: KFACLinearOperator(*problem()).save(path), "Saving to a file"),
        ("scipy", lambda path: GGNLinearOperator(*problem()).to_scipy(), "to_scipy()"),
    ],
)
def test_a_missing_one_is_named(
    module: str, use: Any, feature: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n == module or n.startswith(f"{module}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError) as caught:
        use(tmp_path / "state.safetensors")
    assert str(caught.value) == f"{feature} needs {module}: pip install {module}."
