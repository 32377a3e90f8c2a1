"""Dense matrices: how layers and rows go together, and within which room."""

import torch
from conformance import close, draws
from problems import PROBLEMS

from curvops import GGNLinearOperator, HessianLinearOperator
from curvops.products import ggn, layered, rules


def test_small_layers_go_together():
    """A deep and narrow net takes a pass for many of its layers, and not one for each."""
    sizes = {"a.weight": 6, "a.bias": 2, "b.weight": 50, "b.bias": 4, "alone": 2, "c.weight": 70, "d.weight": 3}
    together = layered.layers(sizes, 64)
    assert together == [["a.weight", "a.bias", "b.weight", "b.bias", "alone"], ["c.weight"], ["d.weight"]]
    assert layered.layers(sizes, 0) == [
        ["a.weight", "a.bias"],
        ["b.weight", "b.bias"],
        ["alone"],
        ["c.weight"],
        ["d.weight"],
    ]
    layers = [layer for _ in range(12) for layer in (torch.nn.Linear(2, 2), torch.nn.Tanh())]
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), *layers).double()
    params, X, y = dict(model.named_parameters()), draws(5, 3), draws(5, 2)
    found = HessianLinearOperator(model, torch.nn.MSELoss(), params, [(X, y)]).to_dense()
    shapes = {name: p.shape for name, p in params.items()}

    def risk(flat):
        parts = flat.split([shape.numel() for shape in shapes.values()])
        own = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return torch.nn.functional.mse_loss(torch.func.functional_call(model, own, (X,)), y)

    flat = torch.nn.utils.parameters_to_vector(params.values()).detach()
    close(found, torch.autograd.functional.hessian(risk, flat))


def test_parameters_without_entries_are_no_layers():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 2)).double()
    data = [(draws(5, 3), draws(5, 2))]
    expected = HessianLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), data).to_dense()
    model.empty = torch.nn.Parameter(torch.zeros(0, 3).double())
    params = {"empty": model.empty, **dict(model.named_parameters())}
    op = HessianLinearOperator(model, torch.nn.MSELoss(), params, data)
    close(op.to_dense(), expected)
    assert "forward over reverse by layer (a random combination equals" in op.explain()


def test_rows_of_many_loss_terms_are_not_made_for_few_columns():
    """Backward passes for all rows of a datum take longer than one for each column."""
    segmentation = {"columns": 16, "rows": 2 * 768, "parameters": 151, "data": 2, "work": 80_000}
    assert not rules.rows_pay(**segmentation)
    assert rules.rows_pay(**segmentation | {"rows": 2 * 3})
    many = {"columns": 283, "rows": 6000, "parameters": 283, "data": 2000, "work": 520_000}
    assert rules.rows_pay(**many, matrix=True)
    assert not rules.rows_pay(**many | {"columns": 4})


def test_a_dense_ggn_within_a_budget(monkeypatch):
    """Rows are made a part at a time, of one datum at least; where these have no room, not at all."""
    p, asked = PROBLEMS["mlp"](), []
    plain = ggn.pulled_rows
    monkeypatch.setattr(ggn, "pulled_rows", lambda *a: (asked.append(len(rows)) or rows for rows in plain(*a)))
    expected = GGNLinearOperator(*p.args()).to_dense()
    assert asked == [asked[0]]
    monkeypatch.setattr(rules, "PART", 1)
    asked.clear()
    close(GGNLinearOperator(*p.args()).to_dense(), expected)
    assert len(asked) > 1
    asked.clear()
    close(GGNLinearOperator(*p.args(), memory_budget=1).to_dense(), expected)
    assert asked == []
