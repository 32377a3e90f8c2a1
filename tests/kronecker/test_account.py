"""`explain()` says how each parameter was treated, and `plan` says the same from the same arguments."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvops import BlockRule
from kronecker.cases import KINDS, PROBLEMS, Net, build, cnn, layers, plan, real, seeded, tokens
from kronecker.support import FILE, table

RULES = {"default": None, "small": BlockRule(largest_factor=3, largest_block=2)}


def unusual():
    """A parameter that is never used, a free one, a scalar, and a norm."""

    def make():
        net = Net(
            lambda net, X: net.scale * net.norm(net.layer(X) + net.free.exp()),
            layer=nn.Linear(3, 2),
            norm=nn.LayerNorm(2),
        )
        net.register_parameter("free", nn.Parameter(torch.randn(2)))
        net.register_parameter("scale", nn.Parameter(torch.tensor(0.5)))
        net.register_parameter("unused", nn.Parameter(torch.randn(4)))
        return net

    return seeded(make), nn.MSELoss(), real(6, 3), real(6, 2)


MODELS = {**PROBLEMS, "layers": layers, "unusual": unusual}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_is_what_happens(kind, name, separate, rule):
    problem = MODELS[name]()
    options = {"separate_weight_and_bias": separate, "rule": RULES[rule], "check_deterministic": False}
    op, planned = build(kind, problem, **options), plan(kind, problem, **options)
    explained = op.explain()
    assert planned.rows == explained.rows
    assert planned.memory == explained.memory == sum(p.block.memory for p in op.blocks)
    assert sum(row.size for row in planned.rows) == op.shape[0]


def test_forward_only():
    options = {"fisher_type": "forward-only"}
    assert plan("kfac", tokens(), **options).rows == build("kfac", tokens(), **options).explain().rows


def test_the_account_prints():
    op = build("ekfac", unusual())
    text = str(op.explain())
    assert text.splitlines()[0] == repr(op)
    for part in [
        "layer.weight",
        "eigen 2 ⊗ 3",
        "linear",
        "unused",
        "zero",
        "nothing",
        "never used",
        "total: ",
        "norm.",
    ]:
        assert part in text
    rows = {row.names: row for row in op.explain().rows}
    assert rows["unused",].block == "zero" and rows["free",].block == "dense 2"
    assert "exp" in rows["free",].why or "exp" in rows["free",].operation
    assert rows["layer.weight",].memory == 8 * (2 * 3 + 2 * 2 + 3 * 3)


def test_parts_of_a_parameter_are_told():
    def make():
        both = nn.Parameter(torch.rand(2, 2))
        return Net(lambda net, X: F.layer_norm(net.layer(X), (2,), *net.both), layer=nn.Linear(3, 2), both=both)

    note = "used in parts, each with a block of its own and none between them: 'both'"
    assert note in build("kfac", (seeded(make), nn.MSELoss(), real(6, 3), real(6, 2))).explain().notes
    assert "used in parts" not in str(build("kfac", tokens()).explain())


def test_costs():
    planned = plan("kfac", cnn(), 3, 3)
    assert "batch of 3: 1 forward and 2 backward passes to the layers' outputs, about 1.0 gradients" in planned.notes
    for kind in ("kfac", "ekfac"):  # two batches, two outputs
        assert "4 backward passes to the layers' outputs" in build(kind, cnn(), 3, 3).explain().notes
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 12)))
    many = model, nn.MSELoss(), real(6, 3), real(6, 12)
    assert any(note.startswith("fewer backward passes: fisher_type='mc'") for note in plan("kfac", many).notes)
    sampled = plan("kfac", many, fisher_type="mc", mc_samples=3)
    assert any("1 forward and 3 backward passes" in note for note in sampled.notes)
    for kind, words in (("ekfac", "the data is swept again"), ("kfoc", "times again")):
        assert any(words in note and "memory_budget=" in note for note in plan(kind, many).notes)
    assert any("rule=BlockRule" in note for note in plan("kfac", many).notes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_takes_one_forward_pass_of_the_first_batch(kind):
    model, loss, X, y = tokens()
    passes, batches = [], []

    class Data(list):
        def __iter__(self):
            return (batches.append(1) or batch for batch in super().__iter__())

    model.register_forward_pre_hook(lambda *_: passes.append(1))
    KINDS[kind].plan(model, loss, dict(model.named_parameters()), Data([(X, y)] * 3), fisher_type="type-2")
    assert (len(passes), len(batches)) == (1, 1)


def test_the_table_is_true():
    found, committed = table().splitlines(), FILE.read_text(encoding="utf-8").splitlines()
    assert "WRONG" not in "".join(found)
    assert found == committed, "write it anew: make support"
