"""Every operator on every problem passes the conformance suite."""

import random

import numpy as np
import pytest
import torch
from conformance import ALGEBRA, COMBINED, KRONECKER, OPERATORS, RISK, SOME, Untouched, close, conforms, draws
from problems import LOSSES, PROBLEMS, Interrupting, N
from scipy.sparse.linalg import eigsh

CUTS = [(N,), (1, 3, 2), (1,) * N]


@pytest.fixture(params=SOME)
def operator(request):
    return request.param


def make(name, problem, *sizes, **options):
    return OPERATORS[name](*problem.args(*sizes), **problem.options, **options)


@pytest.mark.parametrize(
    "operator,problem", [(o, p) for o in SOME for p in PROBLEMS if o not in ALGEBRA or p in ("mlp", "odd")]
)
def test_conformance(operator, problem):
    p = PROBLEMS[problem]()
    conforms(make(operator, p, 2, 4))


@pytest.mark.parametrize("operator", [name for name in KRONECKER if name not in SOME])
def test_all_kronecker_options_conform(operator):
    conforms(make(operator, PROBLEMS["mlp"](), 2, 4))


@pytest.mark.parametrize("combined", COMBINED)
@pytest.mark.parametrize("problem", ["mlp", "cnn"])
def test_combinations_conform(combined, problem):
    p = PROBLEMS[problem]()
    conforms(COMBINED[combined](*p.args(2, 4), **p.options))


@pytest.mark.parametrize("operator", ["hessian", "kfac type-2 expand separate"])
def test_scipy_finds_eigenvalues(operator):
    op = make(operator, PROBLEMS["mlp"](), 2, 4)
    largest = eigsh(op.to_scipy(), k=1, which="LM", v0=np.ones(op.shape[1]), return_eigenvectors=False)
    expected = torch.linalg.eigvalsh(op.to_dense()).abs().max().item()
    assert abs(abs(largest[0]) - expected) <= 1e-8 * expected


# each operator sees the losses that differ most, the exact ones see all, and one of each other kind every mean
FEW_LOSSES = ["ce_all_mean", "ce_soft_all_sum", "bce_pos_weight_mean", "mse_sum", "huber_mean", "positions_mean"]
PAIRS = [
    (operator, loss)
    for loss in LOSSES
    for operator in [*RISK, *KRONECKER]
    if operator in RISK or loss in FEW_LOSSES or (operator in SOME and "mean" in loss)
] + [
    (operator, problem)
    for problem in PROBLEMS
    for operator in [*RISK, *KRONECKER]
    if operator in SOME or problem in ("cnn", "odd")
]


def tolerance(operator, problem):
    """KFOC iterates until it changes little, so that rounding may cost or save it a step."""
    return 1e-6 if operator.startswith("kfoc") else 1e-9 if problem in PROBLEMS else 1e-10


@pytest.mark.parametrize("operator,problem", PAIRS)
def test_batches_do_not_matter(operator, problem):
    p = (LOSSES | PROBLEMS)[problem]()
    one, *others = [make(operator, p, *cut, check_deterministic=False) for cut in CUTS]
    if problem == "cnn" and operator.startswith("ekfac") and "reduce" in operator:
        # fewer means over positions than inputs: the eigenbasis of the repeated eigenvalue zero is not unique
        for op in others:
            close(op.trace(), one.trace())
        return
    v = draws(p.dim, 2)
    for op in others:
        close(op @ v, one @ v, tolerance(operator, problem))
    close(others[0].to_dense(), one.to_dense(), tolerance(operator, problem))


@pytest.mark.parametrize("problem", [*PROBLEMS, "train"])
def test_the_caller_is_untouched(operator, problem):
    p = PROBLEMS["norms" if problem == "train" else problem]()
    if problem == "train":
        p.model.train()  # batch norm updates its statistics, were it allowed to
    for parameter in p.params.values():
        parameter.grad = torch.ones_like(parameter)
    data = p.data(2, 4)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 — the global one is what must not move
    with Untouched(p.model, data):
        op = OPERATORS[operator](p.model, p.loss, p.params, data, **p.options)
        op @ draws(p.dim)
        op.to_dense()
    with Untouched(p.model, data), torch.autocast("cpu", torch.bfloat16, enabled=False), torch.no_grad():
        op @ draws(p.dim, 2)


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_nothing_behind(operator, error):
    p = PROBLEMS["mlp"]()
    loader = Interrupting(p.data(2, 2, 2))
    op = None if operator in KRONECKER else OPERATORS[operator](p.model, p.loss, p.params, loader)
    v = draws(p.dim)
    with Untouched(p.model, loader.batches):
        loader.error = error
        for _ in range(2):
            with pytest.raises(type(error)):
                # a Kronecker operator is a snapshot, taken when it is made
                (OPERATORS[operator](p.model, p.loss, p.params, loader) if op is None else op) @ v
        loader.error = None
    op = OPERATORS[operator](p.model, p.loss, p.params, loader) if op is None else op
    close(op @ v, make(operator, p, 2, 2, 2) @ v)
    close(op.to_dense() @ v, op @ v)


def test_callers_without_gradients(operator):
    p = PROBLEMS["mlp"]()
    expected = make(operator, p, 2, 4) @ draws(p.dim)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            close(make(operator, p, 2, 4) @ draws(p.dim), expected)
            assert not make(operator, p, 2, 4).to_dense().is_inference()


@pytest.mark.parametrize(
    "operator", ["hessian", "ggn", "ef", "kfac type-2 expand separate", "ekfac mc expand separate"]
)
def test_batch_norm_in_train_mode_mixes_data_and_conforms(operator):
    p = PROBLEMS["norms"]()
    p.model.train()
    conforms(make(operator, p))
