"""Every operator on every model of the zoo, against oracles that know nothing of how it is computed."""

from __future__ import annotations

import warnings
from functools import cache

import pytest
import torch
from oracles import Problem, relative

import curvops
from zoo.models import ZOO

NAMES = sorted(ZOO)


@pytest.fixture(autouse=True)
def _double_precision():
    torch.set_default_dtype(torch.float64)


@cache
def problem(name: str) -> Problem:
    return Problem(ZOO[name])


def create(kind: str, p: Problem, **options):
    if p.entry.axis:
        options["batch_size_fn"] = lambda X: X.shape[p.entry.axis]
    return getattr(curvops, f"{kind}LinearOperator")(p.model, p.loss, p.params, p.data, **options)


def product(kind: str, p: Problem, **options):
    """The operator and its product with the problem's vector, the caller's things untouched."""
    before = p.state()
    with warnings.catch_warnings():
        if p.entry.surrogate:  # whose derivative is rightly called wrong
            warnings.filterwarnings("ignore", ".*differs from central differences", RuntimeWarning)
        op = create(kind, p, **options)
    got = op @ p.v
    after = p.state()
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(before, after, strict=True))
    return op, got


@pytest.mark.parametrize("name", NAMES)
def test_hessian(name):
    p = problem(name)
    _, got = product("Hessian", p)
    if p.entry.surrogate:
        assert relative(got, p.twice_differentiated()) < p.tolerance(1e-9)
    else:
        # a kink inside the interval of a difference spoils one step, never all
        assert min(p.hessian_errors(got)) < p.tolerance(1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_ggn(name):
    p = problem(name)
    assert relative(product("GGN", p)[1], p.ggn @ p.v.double()) < p.tolerance(1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_empirical_fisher(name):
    p = problem(name)
    assert relative(product("EF", p)[1], p.empirical_fisher @ p.v.double()) < p.tolerance(1e-9)


@pytest.mark.parametrize("name", [n for n in NAMES if ZOO[n].convex])
@pytest.mark.parametrize("kind", ["KFAC", "EKFAC"])
def test_kronecker_approximation(kind, name):
    """Symmetric, positive semi-definite, complete, and each block of the right scale."""
    p = problem(name)
    op, got = product(kind, p, check_deterministic=False)
    dense = op.to_dense().double()
    assert torch.isfinite(dense).all()
    assert relative(got, dense @ p.v.double()) < p.tolerance(1e-9)
    assert relative(dense.T, dense) < p.tolerance(1e-9)
    values = torch.linalg.eigvalsh(dense)
    assert values.min() >= -p.tolerance(1e-10) * values.max()
    total = p.ggn.trace()
    for name, k, g in zip(p.params, p.traces(dense), p.traces(p.ggn), strict=True):
        if g > 1e-12 * total:
            assert 1 / 300 < k / g < 300, f"{name}: {k / g}"
        elif kind == "EKFAC":
            assert k <= 1e-9 * total, f"{name}: {k}"
    text = str(op.explain())
    assert all(name in text for name in p.params)


@pytest.mark.parametrize("name", [n for n in NAMES if ZOO[n].convex and not ZOO[n].mixes])
def test_ekfac_keeps_the_trace_of_every_block(name):
    p = problem(name)
    op, _ = product("EKFAC", p, fisher_type="type-2", check_deterministic=False)
    ours, exact = p.traces(op.to_dense()), p.traces(p.ggn)
    for name, k, g in zip(p.params, ours, exact, strict=True):
        assert abs(k - g) <= p.tolerance(1e-6) * g + 1e-12 * sum(exact), f"{name}: {k / g}"


@pytest.mark.parametrize("name", [n for n in NAMES if not ZOO[n].convex])
def test_no_factor_without_convexity(name):
    p = problem(name)
    with pytest.raises(ValueError, match="not convex"):
        product("KFAC", p, fisher_type="type-2")
    op, got = product("EKFAC", p, fisher_type="empirical")
    assert p.v @ got > 0
    assert relative(op.trace(), p.empirical_fisher.trace()) < 1e-6


IN_ONE_PASS = [
    "vit_by_hand",
    "huggingface_llama",
    "huggingface_mixtral",
    "llama_by_hand",
    "gpt_with_positions",
    "encoder_decoder_with_masks",
    "attention_with_own_widths_bias_rows_and_zero_row",
    "linear_attention_by_einsum",
    "recurrent_layers_and_cells",
    "lstm_with_projection",
    "recurrence_by_hand",
    "experts_in_one_tensor",
    "stacked_ensemble",
    "channel_norm_and_layer_scale",
    "masked_tokens",
]


@pytest.mark.parametrize("name", IN_ONE_PASS)
def test_no_parameter_needs_its_data_one_by_one(name):
    op = create("KFAC", problem(name), check_deterministic=False)
    assert {row.why for row in op.explain().rows} <= {"tapped", "never used"}
