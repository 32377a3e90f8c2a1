"""What is stored is used for the same problem only: whatever of it changes is seen, and nothing else is."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import curvops
from curvops import EmpiricalRisk
from curvops.tour import coarse_tour
from curvops.tour.identity import content, differences, identity

X = {"a": torch.linspace(-1, 1, 24).double().reshape(6, 4), "b": torch.eye(6, 4).double()}
Y = torch.arange(6) % 3


def scale(x):
    return x * x.cos()


class Config:
    def __init__(self, power):
        self.power = power


class Net(nn.Module):
    """Whose output depends on all that a module may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).double().reshape(3, 4))
        self.frozen = nn.Parameter(torch.ones(4).double(), requires_grad=False)
        self.register_buffer("shift", torch.zeros(4).double(), persistent=False)
        self.plain = torch.ones(4).double()
        self.options = {"gain": 1.0, "powers": [1, 2]}
        self.config = Config(1)
        self.table = np.ones(4)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        given = (
            (x["a"] + 2 * x["b"]) * self.frozen * self.plain + self.shift + self.options["gain"] ** self.config.power
        )
        return self.drop((scale(given) * torch.from_numpy(self.table)) @ self.weight.T)


class Problem:
    def __init__(self) -> None:
        self.model = Net().eval()
        self.loss = nn.CrossEntropyLoss(weight=torch.ones(3).double())
        self.data = [(dict(X), Y), (dict(X), Y)]

    def risk(self):
        params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return EmpiricalRisk(self.model, self.loss, params, self.data)

    def arguments(self):
        return self.model, self.loss, self.data


def put(path, value):
    """A change of what a problem has under a name, in place where it has entries."""

    def change(problem, _):
        *names, last = path.split(".")
        for name in names:
            problem = problem[name] if isinstance(problem, dict) else getattr(problem, name)
        if isinstance(problem, dict):
            problem[last] = value
        elif isinstance(value, float):
            with torch.no_grad():
                getattr(problem, last)[..., 0] += value
        else:
            setattr(problem, last, value)

    return change


def exchanged(problem, _):
    problem.data = [({"a": X["b"], "b": X["a"]}, Y), *problem.data[1:]]


def other_order(problem, _):
    problem.data = [({"b": X["b"], "a": X["a"]}, Y), *problem.data[1:]]


def other_cut(problem, _):
    joined = {key: torch.cat([value, value]) for key, value in X.items()}
    problem.data = [(joined, torch.cat([Y, Y]))]


TINY = 1e-13  # less than any witness tells
CHANGES = {
    "forward code": (lambda _, patch: patch.setattr(f"{__name__}.scale", lambda x: x * x.sin()), "model"),
    "library code": (lambda _, patch: patch.setattr(nn.functional, "dropout", lambda x, *_: 2 * x), "code"),
    "code of second order": (
        lambda _, patch: patch.setattr(nn.functional, "dropout", lambda x, *_: x + (x - x.detach()).square()),
        "code",
    ),
    "weight": (put("model.weight", TINY), "weights"),
    "frozen weight": (put("model.frozen", TINY), "model"),
    "buffer": (put("model.shift", TINY), "model"),
    "attribute": (put("model.plain", TINY), "model"),
    "array": (put("model.table", TINY), "model"),
    "entry of a dict": (put("model.options.gain", 1 + TINY), "model"),
    "entry of a list": (put("model.options.powers", [1, 3]), "model"),
    "config": (put("model.config.power", 2), "model"),
    "mode": (put("model.drop.training", True), "model"),
    "hook": (lambda problem, _: problem.model.register_forward_hook(lambda module, x, z: 1 * z), "model"),
    "loss weight": (put("loss.weight", TINY), "loss"),
    "loss option": (lambda problem, _: setattr(problem.loss, "label_smoothing", TINY), "loss"),
    "reduction": (put("loss.reduction", "sum"), "loss"),
    "exchanged columns": (exchanged, "data"),
    "order of columns": (other_order, "data"),
    "cut": (other_cut, "data"),
    "versions": (
        lambda _, patch: patch.setattr("curvops.tour.identity.versions", lambda: {"torch": "1.0"}),
        "versions",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen_and_named(name, monkeypatch):
    problem, (change, where) = Problem(), CHANGES[name]
    before = identity(problem.risk())
    assert None not in before.values() and not differences(before, identity(problem.risk()))
    assert not differences(before, identity(Problem().risk())), "made anew"
    change(problem, monkeypatch)
    found = differences(before, identity(problem.risk()))
    if where == "code":
        assert len(found) == 1 and found[0].startswith(
            "other code: hessian_norm" if "second" in name else "other code: risk"
        )
    else:
        assert f"other {where}" in found


@pytest.mark.parametrize(
    "name", ["forward code", "library code", "loss weight", "buffer", "mode", "exchanged columns", "versions"]
)
@pytest.mark.parametrize("kind", ["dense", "coarse"])
def test_a_tour_of_another_problem_computes_anew(kind, name, tmp_path, monkeypatch):
    monkeypatch.setattr("curvops.tour.own.draw", lambda *arguments, **options: None)
    titles = ["Hessian", "KFAC"]
    operators = {title: curvops.tour.OPERATORS[title] for title in titles}
    monkeypatch.setattr("curvops.tour.compute.OPERATORS", operators)
    problem, said = Problem(), []

    def found():
        said.clear()
        if kind == "dense":
            options = {"output": tmp_path, "resume": True, "say": said.append}
            return curvops.tour(*problem.arguments(), **options).matrices
        return coarse_tour(problem.risk(), tmp_path / "blocks.safetensors", titles=titles, say=said.append).norms

    first = {title: matrix.clone() for title, matrix in found().items()}
    again = found()
    assert sum("not computed again" in line for line in said) == 2
    assert all(torch.equal(again[title], first[title]) for title in titles)
    CHANGES[name][0](problem, monkeypatch)
    found()
    assert not any("not computed again" in line for line in said) and any(
        "another computation" in line for line in said
    )


class Split(nn.Module):
    """Code in helpers, which no digest sees."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 2).double()

    def head(self, z):
        return z

    def forward(self, x):
        return self.head(self.lin(x)).unsqueeze(-1)


class SplitLoss(nn.Module):
    def distance(self, z):
        return z.exp()

    def far(self, z):
        return 0.0

    def forward(self, z, y):
        return ((self.distance(z) - y).square().sum((1, 2)) + self.far(z)).mean()


def moved_into_the_model(patch):
    patch.setattr(Split, "head", lambda _, z: z.exp())
    patch.setattr(SplitLoss, "distance", lambda _, z: z)


def other_terms(patch):
    """The same here, but the two positions of a datum are one term."""
    patch.setattr(SplitLoss, "far", lambda _, z: (z.sum((1, 2)) - 20).relu().square())


@pytest.mark.parametrize(("change", "seen"), [(moved_into_the_model, "ggn"), (other_terms, "ef")])
def test_code_that_only_some_matrices_show_is_seen(change, seen, monkeypatch):
    torch.manual_seed(0)
    model, data = Split(), [(X["a"], torch.rand(6, 2, 1).double())]

    def of():
        return identity(EmpiricalRisk(model, SplitLoss(), dict(model.named_parameters()), data, reduction="mean"))

    before = of()
    assert None not in before.values() and not differences(before, of())
    change(monkeypatch)
    (found,) = differences(before, of())
    assert found.startswith(f"other code: {seen}_norm")


def test_functions_are_known_by_code_and_what_they_refer_to():
    factor, weights = torch.ones(3).double(), {"w": torch.ones(3, 4).double()}

    def model(params, x):
        return x["a"] @ params["w"].T * factor

    smoothed = partial(nn.functional.cross_entropy, label_smoothing=0.1)

    def of(function, loss=smoothed):
        return content(EmpiricalRisk(function, loss, weights, [(X, Y)]))

    first = of(model)
    assert of(model) == of(copy.copy(model)) == first
    assert of(model, nn.functional.cross_entropy)["loss"] != first["loss"]
    assert of(lambda params, x: x["a"] @ params["w"].T * factor)["data"] == first["data"]
    factor[0] += TINY
    assert [part for part, value in of(model).items() if value != first[part]] == ["model"]


def test_rounding_is_no_change():
    before = identity(Problem().risk())
    rounded = {**before, "risk": before["risk"] * (1 + 1e-13), "hessian_probe": before["hessian_probe"] + 1e-14}
    assert not differences(before, rounded)
    for name in (
        "risk",
        "gradient_norm",
        "gradient_probe",
        *(f"{m}_{n}" for m in ("hessian", "ggn", "ef") for n in ("norm", "probe")),
    ):
        assert differences(before, {**before, name: before[name] * (1 + 1e-6) + 1e-6})
        assert differences(before, {**before, name: float("nan")}) and differences(before, {**before, name: None})


def test_nothing_of_the_callers_changes():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    before = copy.deepcopy(model.state_dict())
    data = torch.utils.data.TensorDataset(X["a"], Y)
    loader = torch.utils.data.DataLoader(data, batch_size=3)  # whose iterator draws a random number
    random = torch.get_rng_state()
    identity(EmpiricalRisk(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), loader))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
