"""Sampled factors approach the exact ones at the rate 1/√M, and shared backward passes are unbiased."""

import statistics
from functools import partial

import pytest
import torch
from problems import LOSSES
from problems import PROBLEMS as MODELS
from torch import nn

from curvops import BlockRule, GGNLinearOperator
from kronecker.cases import PROBLEMS, build, mlp, plan, seeded, tokens

KINDS = ("kfac", "diagonal")
SEEDS = 40
ALL = MODELS | LOSSES


def draws(make, exact, **options):
    """Relative differences of draws with seeds of their own from the exact matrix."""
    return [(make(seed=s, **options).to_dense() - exact) / exact.norm() for s in range(SEEDS)]


def check_unbiased(differences):
    """The mean of K draws is off by σ/√K in the root mean square; three times that is beyond chance."""
    mean = torch.stack(differences).mean(0)
    variance = statistics.mean(float(d.norm() ** 2) for d in differences)
    assert float(mean.norm() ** 2) < 9 * variance / len(differences)


def fisher(name):
    p = ALL[name]()
    return lambda **options: GGNLinearOperator(*p.args(), check_deterministic=False, **options)


def factors(kind, name, **options):
    problem = PROBLEMS[name]()

    def make(**given):
        sampled = {"fisher_type": "mc"} if "seed" in given else {}
        return build(kind, problem, check_deterministic=False, **options, **sampled, **given)

    return make


SAMPLED = {
    **{
        name: fisher(name) for name in ("mlp", "transformer", "bce_weight_sum", "mse_mean", "ce_all_mean", "huber_mean")
    },
    "KFAC": factors("kfac", "mlp"),
    "KFAC of tokens": factors("kfac", "tokens"),
    "KFAC of tokens, reduced": factors("kfac", "tokens", kfac_approx="reduce"),
    "diagonal of tokens": factors("diagonal", "tokens"),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_the_rate(name):
    make = SAMPLED[name]
    exact, errors = make().to_dense(), []
    for samples in (1, 16):
        differences = draws(make, exact, mc_samples=samples)
        check_unbiased(differences)
        errors.append(statistics.mean(float(d.norm() ** 2) for d in differences) ** 0.5)
    assert 3 < errors[0] / errors[1] < 5.3  # 16 times the samples, a quarter of the distance


@pytest.mark.parametrize("kind", KINDS)
def test_terms_that_share_a_backward_pass_have_random_signs(kind):
    problem = tokens()
    exact = build(kind, problem)
    separate = exact.to_dense()
    assert "random signs" not in str(exact.explain())
    rule = BlockRule(most_passes=5)  # two terms a datum with three columns each take six
    with pytest.warns(RuntimeWarning, match=r"rule\.most_passes=5 .* blocks are estimates, .* Exact: rule=BlockRule"):
        signed = build(kind, problem, rule=rule)
        differences = draws(partial(build, kind, problem, rule=rule), separate, check_deterministic=False)
    check_unbiased(differences)
    assert statistics.mean(float(d.norm()) for d in differences) > 1e-3
    assert "random signs" in str(plan(kind, problem, rule=rule))
    assert any("random signs" in note for note in signed.explain().notes)
    assert not torch.equal(signed.to_dense(), separate)
    torch.testing.assert_close(build(kind, problem, rule=BlockRule(most_passes=6)).to_dense(), separate)


@pytest.mark.filterwarnings("ignore:EKFACLinearOperator. fisher_type='type-2'. more than rule.most_passes")
def test_random_signs_do_not_depend_on_batches():
    rule = BlockRule(most_passes=5)
    whole, parts = build("ekfac", tokens(), rule=rule), build("ekfac", tokens(), 1, 3, 2, rule=rule)
    torch.testing.assert_close(whole.to_dense(), parts.to_dense(), rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*train mode")
@pytest.mark.parametrize("fisher_type", ["mc", "type-2"])
def test_samples_of_data_that_are_mixed_are_said_to_share_a_pass(fisher_type):
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)))
    problem = (model, *mlp()[1:])
    for found in (
        build("kfac", problem, fisher_type=fisher_type).explain(),
        plan("kfac", problem, fisher_type=fisher_type),
    ):
        assert ("cross terms vanish in expectation only" in str(found)) == (fisher_type == "mc")
    assert "in expectation only" not in str(build("kfac", mlp(), fisher_type=fisher_type).explain())


def test_a_seed_is_a_matrix():
    a, b, c = (build("kfac", tokens(), fisher_type="mc", seed=s).to_dense() for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
