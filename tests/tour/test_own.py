"""One's own model: whatever the operators take, the tour takes; what it cannot do, it says, and what is finished it keeps."""

import gc
import re
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import curvops
from curvops.tour import OPERATORS, CoarseFile, Finished, load_coarse, load_matrices, tour_checkpoints
from curvops.tour.compute import MATRICES, REFUSED, too_large
from curvops.tour.facts import facts
from curvops.tour.own import title_of, weights_kept

X, Y = torch.linspace(-1, 1, 96).reshape(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
CE = nn.CrossEntropyLoss()


def cnn(**options) -> nn.Sequential:
    layers = nn.Conv2d(1, 2, 3, **options), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3, **options)
    return nn.Sequential(*layers)


@pytest.fixture
def undrawn(monkeypatch):
    """Without figures and pages, which are the same for all models."""
    monkeypatch.setattr("curvops.tour.own.draw", lambda *arguments, **options: None)
    monkeypatch.setattr("curvops.tour.own.film", lambda tours, path: path)


def test_from_a_model_to_its_files_in_one_call(tmp_path):
    model = cnn()
    finished = Finished()
    found = curvops.tour(
        model, CE, DataLoader(TensorDataset(X, Y), batch_size=4), output=tmp_path / "mine", finished=finished
    )
    assert list(found.matrices) == list(OPERATORS) and found.groups == {"0": 20, "3": 27} and not found.refused
    hessian = curvops.HessianLinearOperator(model, CE, dict(model.named_parameters()), [(X, Y)])
    torch.testing.assert_close(found.matrices["Hessian"], hessian.to_dense())
    figures = [f"curvature_matrices{kind}.{suffix}" for kind in ("", "_log_abs") for suffix in ("pdf", "png")]
    assert {path.name for path in found.paths} == {MATRICES, "tour.html", *figures}
    assert all(path.stat().st_size for path in found.paths) and set(finished.figures) < set(found.paths)
    kept = load_matrices(tmp_path / "mine" / MATRICES)
    assert all(torch.equal(kept.matrices[title], matrix) for title, matrix in found.matrices.items())
    assert kept.parameters == {"0.weight": (2, 1, 3, 3), "0.bias": (2,), "3.weight": (3, 8), "3.bias": (3,)}
    assert kept.settings["setup"] == "Sequential, 47 parameters" and kept.settings["c"] == pytest.approx(1 / 6)
    assert set(kept.costs) == set(kept.explanations) == set(OPERATORS)
    rows = [line for line in str(found).splitlines() if re.search(r"\d\.\d{3}", line)]
    assert [row[:26].strip() for row in rows] == ["(determinism check)", *OPERATORS, "all matrices", "figures", "page"]
    assert str(found).endswith("tour.html") and len(repr(found)) < 300 and "Hessian" in repr(found)


@pytest.fixture
def few(monkeypatch):
    """Three matrices only."""
    titles = ["Hessian", "Generalized Gauss-Newton", "KFAC"]
    monkeypatch.setattr("curvops.tour.compute.OPERATORS", {title: OPERATORS[title] for title in titles})
    return titles


class HuggingFace(nn.Module):
    """A classifier of the library's that is called with names and returns more than a tensor."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"vocab_size": 5, "hidden_size": 4, "intermediate_size": 4, "max_position_embeddings": 4}
        config = BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=1, num_labels=3)
        self.model = BertForSequenceClassification(config)

    def forward(self, X: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(**X).logits


class Tied(nn.Module):
    """An embedding that is the head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embedding(X)))


def hugging_face():
    tokens = {"input_ids": torch.arange(24).reshape(6, 4) % 5, "attention_mask": torch.ones(6, 4, dtype=torch.long)}
    return HuggingFace().eval(), [(tokens, Y)], None, 14


def function():
    params = {"w": torch.randn(16, 3), "b": torch.randn(3)}
    return lambda p, inputs: (inputs.flatten(1) @ p["w"] + p["b"]).tanh(), [(X, Y)], params, 2


def subset():
    model = cnn()
    return model, [(X, Y)], {"3.bias": model[3].bias, "0.weight": model[0].weight}, 2


@pytest.mark.parametrize(
    "make",
    [
        hugging_face,
        function,
        subset,
        lambda: (Tied(), [(torch.arange(6) % 3, Y)], None, 1),
        lambda: (cnn(dtype=torch.float64), [(X.double(), Y)], None, 2),
        lambda: (cnn(dtype=torch.bfloat16), [(X.bfloat16(), Y)], None, 2),
    ],
    ids=["hugging face", "function", "subset", "tied", "double", "half"],
)
def test_models_of_all_kinds(make, undrawn, few, tmp_path):
    model, data, params, groups = make()
    found = curvops.tour(model, CE, data, params, output=tmp_path)
    assert list(found.matrices) == few and not found.refused and len(found.groups) == groups
    given = params or dict(model.named_parameters())
    assert list(found.file.parameters) == list(given)
    hessian = curvops.HessianLinearOperator(model, CE, given, data, check_deterministic=False).to_dense()
    torch.testing.assert_close(found.matrices["Hessian"], hessian)


def test_what_does_not_fit_is_refused_in_one_line(undrawn, tmp_path, monkeypatch):
    def refuses(error, message, model, data, **options):
        with pytest.raises(error, match=re.escape(message)):
            curvops.tour(model, CE, data, output=tmp_path, **options)

    noisy = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(16, 3))
    refuses(RuntimeError, "the model has dropout in train mode (1 modules", noisy, [(X, Y)])
    refuses(TypeError, "This is one batch: pass it in a list, [(X, y)]", cnn(), (X, Y))
    refuses(TypeError, "pass torch.utils.data.DataLoader(dataset, batch_size=64)", cnn(), TensorDataset(X, Y))
    refuses(TypeError, "pass its parameters, params={name: tensor}", lambda params, inputs: inputs, [(X, Y)])
    refuses(ValueError, "sizes [3] sum to 3, the matrices have 47 rows", cnn(), [(X, Y)], groups=[3])
    refuses(ValueError, "the model Flatten has no parameters", nn.Flatten(), [(X, Y)])
    with pytest.warns(RuntimeWarning, match="is not finite"):
        refuses(ValueError, "loss: over the data it is nan", cnn(), [(X * float("nan"), Y)])
    assert not (tmp_path / MATRICES).exists()
    for name in [name for name in sys.modules if name.startswith("curvops.tour")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.delattr(curvops, "tour")
    with pytest.raises(ModuleNotFoundError, match=re.escape("curvops.tour needs plotly: pip install 'curvops[tour]'")):
        _ = curvops.tour


def test_parameters_without_entries_are_refused_at_the_door(tmp_path):
    model, params = (lambda p, inputs: inputs.flatten(1) @ p["w"]), {"w": torch.zeros(16, 0)}
    with pytest.raises(ValueError, match=r"the parameters 'w' have 0 entries.*Pass a model, or params="):
        curvops.tour(model, CE, [(X, Y)], params, output=tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_operators_that_refuse_the_model_are_left_out_and_named(undrawn, tmp_path):
    found = curvops.tour(cnn(), lambda z, y: z.cos().mean(), [(X, Y)], output=tmp_path, reduction="mean")
    assert list(found.matrices) == ["Hessian", "Generalized Gauss-Newton", "Empirical Fisher"]
    assert list(found.refused) == ["EKFAC", "Monte-Carlo Fisher", "KFAC"]
    assert re.search(r"^KFAC +not computed: ValueError: .*is not convex in the output", str(found), re.MULTILINE)
    assert load_matrices(tmp_path / MATRICES).settings[REFUSED] == found.refused
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        curvops.tour(cnn(), CE, [(X[:, :, :3], Y)], output=tmp_path, check_deterministic=False)


def test_what_is_finished_is_kept_and_on_request_not_computed_again(undrawn, few, tmp_path, monkeypatch):
    from curvops.tour import compute

    model, asked = cnn(), []

    def each_matrix(risk, *, titles, **options):
        asked.append(list(titles))
        for k, result in enumerate(whole(risk, titles=titles, **options)):
            if k == 2 and len(asked) == 1:
                raise KeyboardInterrupt
            yield result

    whole = compute.each_matrix
    monkeypatch.setattr(compute, "each_matrix", each_matrix)
    finished = Finished()
    with pytest.raises(KeyboardInterrupt):
        curvops.tour(model, CE, [(X, Y)], output=tmp_path, finished=finished)
    first = few[:2]
    assert list(load_matrices(tmp_path / MATRICES).matrices) == first
    assert finished.matrices == {tmp_path / MATRICES: first}
    found = curvops.tour(model, CE, [(X, Y)], output=tmp_path, resume=True)
    assert asked[-1] == few[2:] and list(found.matrices) == few
    curvops.tour(model, CE, [(X, Y)], output=tmp_path)
    assert asked[-1] == few, "not without being asked to"
    said: list[str] = []
    curvops.tour(model, CE, [(X, Y)], output=tmp_path, resume=True, say=said.append)
    assert asked[-1] == []
    assert said[1:] == [f"{title}: in '{tmp_path / MATRICES}' already, not computed again" for title in few]
    with torch.no_grad():
        model[0].bias[0] += 1e-6
    curvops.tour(model, CE, [(X, Y)], output=tmp_path, resume=True, say=said.append)
    assert asked[-1] == few, "another model"
    assert said[-1] == f"'{tmp_path / MATRICES}' is of another computation (other weights), and is computed anew"


def test_letters_that_the_font_lacks_give_one_warning(few, tmp_path):
    model, glyphs = nn.Module(), ("\U0001f600", "\u6f22", "\u5b57")
    for glyph in glyphs:
        model.add_module(glyph, nn.Linear(3, 3))
    model.forward = lambda x: sum(layer(x) for layer in model.children())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        curvops.tour(model, CE, [(torch.rand(4, 3), Y[:4])], output=tmp_path)
    (said,) = {str(one.message) for one in caught if "font" in str(one.message)}
    assert "the font lacks 3 of the letters in names" in said and all(glyph in said for glyph in glyphs)
    assert len([one for one in caught if "font" in str(one.message)]) == 1


def test_blocks_where_the_matrices_do_not_fit(undrawn, tmp_path):
    finished = Finished()
    said: list[str] = []
    for name in ("matrices.safetensors", "curvature_matrices.png", "film.gif", "mine.txt"):
        (tmp_path / name).write_bytes(b"")
    found = curvops.tour(
        cnn(), CE, [(X, Y)], output=tmp_path, memory_budget=100_000, finished=finished, say=said.append
    )
    assert isinstance(found.file, CoarseFile) and {m.shape for m in found.matrices.values()} == {(2, 2)}
    assert load_coarse(found.paths[0]).norms.keys() == found.matrices.keys() == OPERATORS.keys()
    assert finished.matrices == {found.paths[0]: list(OPERATORS)}
    header, *rows = str(found).splitlines()
    assert "products" in header and re.search(r"Hessian +\S+ +\S+ +\S+ ± \S+ ", str(found)), rows
    assert all(re.search(r"\d, exact ", row) for row in rows if "KFAC" in row)
    assert said[0] == f"Sequential, 47 parameters: one batch on cpu in float32, to '{tmp_path}'"
    assert re.fullmatch(r"6 matrices of 47² .* need 159 kB .* budget of 100 kB: norms of blocks instead", said[1])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"blocks.safetensors", "matrices.safetensors", "mine.txt"}, "stale drawings are removed, no numbers"
    assert said[-2:] == [
        f"removed, as drawn by an earlier tour: {tmp_path / 'film.gif'}, {tmp_path / 'curvature_matrices.png'}",
        f"of an earlier tour, and left there: {tmp_path / 'matrices.safetensors'}",
    ]


def test_checkpoints_are_toured_in_turn_and_the_weights_put_back(undrawn, few, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False), nn.BatchNorm1d(3)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = {f"step/{k}": {name: tensor / k for name, tensor in before.items()} for k in (1, 2)}
    torch.save(states["step/2"], tmp_path / "two.pt")
    found = tour_checkpoints(model, CE, [(X, Y)], {**states, "file": tmp_path / "two.pt"}, output=tmp_path / "film")
    assert list(found) == ["step/1", "step/2", "file"]
    assert {path.name for path in (tmp_path / "film").iterdir()} == {"step-1", "step-2", "file"}
    one, two, file = (tour.matrices["Hessian"] for tour in found.values())
    assert torch.equal(two, file) and not torch.allclose(one, two)

    def same():
        return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    assert same()
    for wrong in ({"1.weight": torch.ones(3, 16)}, Path("missing.pt"), {**states["step/2"], "2.weight": torch.ones(2)}):
        with pytest.raises(
            ValueError, match=r"tour_checkpoints: 'wrong'( \(file 'missing.pt'\))? does not load into Sequential"
        ):
            tour_checkpoints(model, CE, [(X, Y)], {"wrong": wrong}, output=tmp_path)
        assert same()
    with pytest.raises(ValueError, match="at least one checkpoint"):
        tour_checkpoints(model, CE, [(X, Y)], {})
    with pytest.raises(TypeError, match="must be a module"):
        tour_checkpoints(lambda p, x: x, CE, [(X, Y)], states)


def test_checkpoints_that_are_the_models_own_tensors_are_those_of_their_moment(undrawn, few, tmp_path):
    model = cnn(dtype=torch.float64)
    other = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    states = {"given": other, "own": model.state_dict(), "parameters": dict(model.named_parameters())}
    copies = {label: {name: tensor.clone() for name, tensor in state.items()} for label, state in states.items()}
    data = [(X.double(), Y)]
    found = tour_checkpoints(model, CE, data, states, output=tmp_path)
    for label, state in copies.items():
        model.load_state_dict(state)
        hessian = curvops.HessianLinearOperator(model, CE, dict(model.named_parameters()), data).to_dense()
        torch.testing.assert_close(found[label].matrices["Hessian"], hessian, rtol=0, atol=1e-14)
    assert not torch.allclose(found["given"].matrices["Hessian"], found["own"].matrices["Hessian"])


class Hooked(nn.Linear):
    """Loads its weights under one name only, and has a state that no tensor holds."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.steps = 3
        self._register_state_dict_hook(lambda module, state, *_: [state.pop(key) for key in list(state)[:1]] and None)

    def get_extra_state(self) -> int:
        return self.steps

    def set_extra_state(self, state: int) -> None:
        self.steps = state


def test_weights_are_put_back_whatever_the_hooks_of_a_state_dict_do():
    model = nn.Sequential(Hooked())
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(model.state_dict())
    with pytest.raises(ZeroDivisionError), weights_kept(model):
        with torch.no_grad():
            model[0].weight.zero_()
            model[0].passing.zero_()
            model[0].bias = nn.Parameter(torch.zeros(2))
        model[0].steps = 4
        _ = 1 / 0
    assert all(a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True)) and model[0].steps == 3


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["a/b", "a-b"], "the label 'a-b' would name the folder 'a-b', as the label 'a/b' does"),
        ([1, "1"], "the label '1' would name the folder '1', as the label 1 does"),
        (["Best", "best"], "the label 'best' would name the folder 'best', as the label 'Best' does"),
        ([".."], "the label '..' names no folder"),
        ([""], "the label '' names no folder"),
        (
            ["tour.html"],
            "the label 'tour.html' would name the folder 'tour.html', as the tour's own file 'tour.html' does",
        ),
    ],
)
def test_labels_that_name_no_folder_of_their_own_are_refused_at_the_door(labels, said, tmp_path):
    states = {label: {} for label in labels}
    with pytest.raises(ValueError, match=re.escape(said)):
        tour_checkpoints(cnn(), CE, [(X, Y)], states, output=tmp_path / "film")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04"])
def test_a_file_without_weights_is_named(content, tmp_path):
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"'first' \(file '.*weights.pt'\) does not load into Sequential"):
        tour_checkpoints(cnn(), CE, [(X, Y)], {"first": tmp_path / "weights.pt"}, output=tmp_path)


def test_a_tour_tells_its_facts_once(undrawn, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("curvops.tour.compute.facts", lambda risk: asked.append(risk) or facts(risk))
    monkeypatch.setattr("curvops.tour.coarse.facts", lambda risk: asked.append(risk) or facts(risk))
    monkeypatch.setattr("curvops.tour.compute.too_large", lambda *given: sizes.append(given) or too_large(*given))
    for memory in (100_000, 10**9):
        asked, sizes = [], []
        curvops.tour(cnn(), CE, [(X, Y)], output=tmp_path, memory_budget=memory)
        assert len(asked) == len(sizes) == 1


def test_the_error_of_an_operator_keeps_its_traceback_without_tensors(undrawn, tmp_path, monkeypatch):
    held = []

    def breaks(self):
        tensor = torch.ones(3)
        held.append(weakref.ref(tensor))
        raise ZeroDivisionError("here")

    for name in ("HessianLinearOperator", "GGNLinearOperator", "EFLinearOperator", "KFACLinearOperator"):
        monkeypatch.setattr(f"curvops.{name}.to_dense", breaks)
    monkeypatch.setattr("curvops.EKFACLinearOperator.to_dense", breaks)
    with pytest.raises(ZeroDivisionError) as raised:
        curvops.tour(cnn(), CE, [(X, Y)], output=tmp_path)
    assert "breaks" in [entry.name for entry in raised.traceback]
    gc.collect()
    assert len(held) == 6 and not any(tensor() is not None for tensor in held)


def test_the_sum_of_the_matrices_has_the_matrices_only(undrawn, few, tmp_path):
    found = curvops.tour(cnn(), CE, [(X, Y)], output=tmp_path)
    seconds = float(re.search(r"^all matrices +(\S+)", found.table(), re.MULTILINE)[1])
    assert found.check is not None
    assert seconds == pytest.approx(sum(cost.seconds for cost in found.file.costs.values()), abs=1e-3)


def test_one_parameter_is_one():
    assert title_of(nn.Linear(1, 1, bias=False), {"w": torch.ones(1)}) == "Linear, 1 parameter"
    assert title_of(nn.Linear(1, 1), {"w": torch.ones(2)}) == "Linear, 2 parameters"
