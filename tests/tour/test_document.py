"""The tutorial document runs with our import line, from its own text, wherever that text is at hand."""

import ast
import re
from pathlib import Path

import pytest
from tueplots import bundles

DOCUMENT = Path(__file__).parents[3] / "shared" / "visual_tour.txt"

COMPUTATION = """
operators = {
    "Hessian_mat": HessianLinearOperator(model, loss_function, params, dataloader),
    "GGN_mat": GGNLinearOperator(model, loss_function, params, dataloader),
    "EF_mat": EFLinearOperator(model, loss_function, params, dataloader),
    "F_mat": GGNLinearOperator(model, loss_function, params, dataloader, mc_samples=1),
    "KFAC_mat": KFACLinearOperator(model, loss_function, params, dataloader, separate_weight_and_bias=False),
}
EKFAC_linop = EKFACLinearOperator(model, loss_function, params, dataloader, separate_weight_and_bias=False)
globals().update({name: operator.to_dense() for name, operator in operators.items()})
EKFAC_mat = EKFAC_linop @ eye(num_params, device=DEVICE)
"""


def statements(text: str) -> list[str]:
    """Take the Python statements out of a text in which prose and a program's output stand between them."""
    lines, found, start = text.splitlines(), [], 0
    while start < len(lines):
        if not lines[start].strip() or lines[start].startswith("#"):
            start += 1
            continue
        stop = next((k for k in range(start + 1, len(lines) + 1) if _is_code(lines[start:k])), None)
        if stop is None:
            start += 1
            continue
        rest = stop  # whatever is indented below belongs to it, over empty lines too
        while rest < len(lines) and (not lines[rest].strip() or lines[rest][0].isspace()):
            rest += 1
            if lines[rest - 1].strip():
                stop = rest
        found.append("\n".join(lines[start:stop]))
        start = stop
    return found


def _is_code(lines: list[str]) -> bool:
    """A word, words with commas between them, and `name: value` would be Python too, but do nothing."""
    try:
        first = ast.parse("\n".join(lines)).body[0]
    except SyntaxError:
        return False
    if isinstance(first, ast.Expr):
        return not isinstance(first.value, ast.Name | ast.Tuple)
    return not (isinstance(first, ast.AnnAssign) and first.value is None)


# the document hands tensors to matplotlib, which numpy warns of
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.skipif(not DOCUMENT.exists(), reason="the document is not beside this checkout")
def test_the_document_runs_and_both_figures_come_out(tmp_path, monkeypatch, capsys):
    import matplotlib.pyplot as plt

    code = statements(DOCUMENT.read_text())
    imports = [k for k, statement in enumerate(code) if "from curvlinops import" in statement]
    target = [k for k, statement in enumerate(code) if statement.startswith("matrices = [")]
    assert len(imports) == len(target) == 1, "the document has lost its import or the place of its computation"
    code[imports[0]] = code[imports[0]].replace("from curvlinops import", "from curvops import")
    code.insert(target[0], COMPUTATION)

    icml = bundles.icml2024
    monkeypatch.setattr(bundles, "icml2024", lambda **kwargs: icml(**{**kwargs, "usetex": False}))
    monkeypatch.chdir(tmp_path)
    closed = []
    monkeypatch.setattr(plt, "close", lambda which: closed.append((which, len(plt.get_fignums()))))
    names: dict = {"__name__": "document"}
    exec(compile("\n\n".join(code), str(DOCUMENT), "exec"), names)

    printed = capsys.readouterr().out.splitlines()
    assert printed == ["Total parameters: 683", "Layer parameters: [112, 0, 404, 0, 37, 0, 130]"]
    assert all(line in DOCUMENT.read_text() for line in printed)
    assert closed == [("all", 2)], "two figures were open when the document closed them"
    for number in plt.get_fignums():
        panels = [ax for ax in plt.figure(number).axes if ax.images]
        assert [ax.get_title() for ax in panels] == names["titles"]
        assert all(ax.images[0].get_array().shape == (683, 683) for ax in panels)
    assert (tmp_path / "curvature_matrices_log_abs.pdf").stat().st_size > 10_000
    assert all(re.fullmatch("torch.float32", str(m.dtype)) for m in names["matrices"])
