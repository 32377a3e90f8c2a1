"""Backends for laplace-torch beside its own where those work, and beside autograd where they refuse; in double precision."""

from copy import deepcopy

import pytest
import torch
from laplace import Laplace, marglik_training
from laplace.curvature import (
    AsdlEF,
    AsdlGGN,
    BackPackEF,
    BackPackGGN,
    CurvlinopsEF,
    CurvlinopsGGN,
    CurvlinopsHessian,
)
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset

from curvops import BlockRule, GGNLinearOperator, KFACLinearOperator
from curvops.clients.laplace import CurvopsEF, CurvopsGGN, CurvopsHessian

pytestmark = pytest.mark.filterwarnings("ignore")  # laplace-torch's and its backends' own
N, CLASSES = 17, 3


class Transformer(nn.Module):
    """Embedding, positions, attention, layer norm: what laplace-torch's own backends refuse."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(6, 4), nn.Parameter(torch.randn(1, 5, 4))
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(4, CLASSES)

    def forward(self, X):
        X = X["input_ids"] if isinstance(X, dict) else X
        return self.head(self.encoder(self.words(X) + self.places).mean(1))


class CrossAttention(nn.Module):
    """One weight, used in two parts."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, X):
        return self.head(self.attention(X, X.flip(1).tanh(), X.flip(1).tanh(), need_weights=False)[0].mean(1))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, CLASSES)), (4,)),
    "one input": (lambda: nn.Sequential(nn.Linear(1, 7), nn.Tanh(), nn.Linear(7, CLASSES)), (1,)),
    "cnn": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES)),
        (2, 4, 4),
    ),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(24, CLASSES)),
        (4, 3, 3),
    ),
    "norm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, CLASSES)), (4,)),
    "cross-attention": (CrossAttention, (5, 4)),
    "transformer": (Transformer, None),
}
BEYOND = ["grouped", "norm", "cross-attention", "transformer"]  # of at least two of its own backends


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def problem(name, likelihood):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    X = torch.randint(6, (N, 5)) if shape is None else torch.randn(N, *shape)
    y = torch.randn(N, CLASSES) if likelihood == "regression" else torch.randint(CLASSES, (N,))
    return model, X, y


def loader(X, y):
    return DataLoader(TensorDataset(X, y), batch_size=5)


def fitted(model, X, y, backend, structure, subset="all", **options):
    likelihood = "regression" if y.is_floating_point() else "classification"
    # some backends leave hooks behind
    la = Laplace(deepcopy(model), likelihood, subset, structure, backend=backend, **options)
    la.fit(loader(X, y))
    return la


def dense(la, structure):
    precision = la.posterior_precision
    return precision.to_matrix() if structure == "kron" else torch.atleast_2d(precision)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def oracle(model, X, y):
    """The GGN of the log-likelihood by autograd, datum by datum."""
    params, total = {n: p.detach() for n, p in model.named_parameters()}, 0
    for x in X:
        blocks = jacrev(lambda p, x=x: functional_call(model, p, (x[None],))[0])(params)
        J = torch.cat([block.flatten(1) for block in blocks.values()], 1)
        s = model(x[None])[0].detach().softmax(0)
        total = total + J.T @ (torch.eye(CLASSES) if y.is_floating_point() else s.diag() - s.outer(s)) @ J
    return total


ALIKE = [
    *[(CurvopsGGN, other, s) for other in (CurvlinopsGGN, AsdlGGN, BackPackGGN) for s in ("full", "diag", "kron")],
    *[(CurvopsEF, other, s) for other in (CurvlinopsEF, AsdlEF) for s in ("full", "diag", "kron")],
    *[(CurvopsEF, BackPackEF, s) for s in ("full", "diag")],
    (CurvopsHessian, CurvlinopsHessian, "full"),
]


@pytest.mark.parametrize("likelihood", ["regression", "classification"])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("mine,other,structure", ALIKE)
def test_its_own_posterior_and_marginal_likelihood(mine, other, structure, name, likelihood):
    if (other, structure, name) == (BackPackGGN, "kron", "cnn"):
        name = "one input"  # BackPACK scales a convolution's inputs otherwise than KFAC expand
    model, X, y = problem(name, likelihood)
    found, expected = (fitted(model, X, y, b, structure, prior_precision=50.0) for b in (mine, other))
    close(found.mean, expected.mean)
    close(dense(found, structure), dense(expected, structure))
    assert found.n_data == expected.n_data
    for one, two in zip(outputs(found, X), outputs(expected, X), strict=True):
        close(one, two)
    tau = torch.tensor(3.0, requires_grad=True)
    if mine is not CurvopsHessian:  # it would not be positive definite
        values = [la.log_marginal_likelihood(prior_precision=tau) for la in (found, expected)]
        close(*values)
        close(*(torch.autograd.grad(value, tau)[0] for value in values))
        for la in (found, expected):
            la.optimize_prior_precision(n_steps=5)
        close(found.prior_precision, expected.prior_precision)


def curvature(la, structure):
    return la.H_facs.to_matrix() if structure == "kron" else la.H


def outputs(la, X):
    answer = la(X[:4])
    return answer if isinstance(answer, tuple) else (answer,)


@pytest.mark.parametrize("likelihood", ["regression", "classification"])
@pytest.mark.parametrize("name", MODELS)
def test_curvature_by_autograd(name, likelihood):
    model, X, y = problem(name, likelihood)
    expected = oracle(model, X, y)
    close(fitted(model, X, y, CurvopsGGN, "full").H, expected)
    close(fitted(model, X, y, CurvopsGGN, "diag").H, expected.diagonal())
    # in one batch, laplace-torch's blocks are KFAC's
    loss = nn.MSELoss(reduction="sum") if likelihood == "regression" else nn.CrossEntropyLoss(reduction="sum")
    kfac = KFACLinearOperator(model, loss, dict(model.named_parameters()), [(X, y)], fisher_type="type-2")
    la = Laplace(model, likelihood, "all", "kron", backend=CurvopsGGN)
    la.fit(DataLoader(TensorDataset(X, y), batch_size=N))
    close(la.H_facs.to_matrix(), la.backend.factor * kfac.to_dense())


@pytest.mark.parametrize("name", ["norm", "transformer"])
def test_blocks_of_norms_are_those_of_the_matrix(name):
    model, X, y = problem(name, "classification")
    expected, found = oracle(model, X, y), fitted(model, X, y, CurvopsGGN, "kron").H_facs.to_matrix()
    start, norms = 0, {n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    for parameter, p in model.named_parameters():
        own = slice(start, start := start + p.numel())
        if parameter.rpartition(".")[0] in norms or parameter == "places":
            close(found[own, own], expected[own, own])


@pytest.mark.parametrize("name", ["norm", "cross-attention", "transformer"])
def test_its_own_backends_refuse(name):
    model, X, y = problem(name, "classification")
    for backend in (CurvlinopsGGN, AsdlGGN, BackPackGGN):
        with pytest.raises((NotImplementedError, RuntimeError, AttributeError, ValueError, IndexError)):
            fitted(model, X, y, backend, "kron").log_marginal_likelihood()


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize("name", BEYOND)
def test_a_whole_laplace(name, structure):
    model, X, y = problem(name, "classification")
    layers = len(list(model.parameters()))
    la = fitted(model, X, y, CurvopsGGN, structure, prior_precision=torch.linspace(1, 2, layers))
    P = dense(la, structure) if structure != "diag" else la.posterior_precision.diag()
    prior = torch.cat([t.expand(p.numel()) for t, p in zip(la.prior_precision, model.parameters(), strict=True)])
    ratio = torch.linalg.slogdet(P)[1] - prior.log().sum()
    mean = nn.utils.parameters_to_vector(model.parameters()).detach()
    evidence = -nn.functional.cross_entropy(model(X), y, reduction="sum") - (ratio + mean @ (prior * mean)) / 2
    close(la.log_marginal_likelihood().detach(), evidence.detach())
    f, J = model(X[:4]).detach(), la.backend.jacobians(X[:4])[0]
    close(la._glm_predictive_distribution(X[:4])[1], J @ torch.linalg.inv(P) @ J.mT)
    close(la._glm_predictive_distribution(X[:4])[0], f)
    samples = la.sample(2, generator=torch.Generator().manual_seed(0))
    assert samples.shape == (2, len(mean)) and samples.isfinite().all()
    la.optimize_prior_precision(n_steps=5)


@pytest.mark.parametrize("name", MODELS)
def test_jacobians(name):
    model, X, _ = problem(name, "regression")
    params = dict(model.named_parameters())
    expected = jacrev(lambda p: functional_call(model, p, (X,)))(params)
    expected = torch.cat([J.flatten(2) for J in expected.values()], 2).detach()
    backend = CurvopsGGN(model, "regression")
    close(backend.jacobians(X)[0], expected)
    with_graph, f = backend.jacobians(X, enable_backprop=True)
    close(with_graph, expected)
    assert with_graph.requires_grad and f.requires_grad


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_last_layer(structure):
    for name in ("mlp", "transformer"):
        model, X, y = problem(name, "classification")
        found = fitted(model, X, y, CurvopsGGN, structure, "last_layer")
        head = model[2] if name == "mlp" else model.head
        features = head.in_features * CLASSES + CLASSES
        if structure == "full":
            close(found.H, oracle(model, X, y)[-features:, -features:])
        if name == "mlp":
            expected = fitted(model, X, y, AsdlGGN if structure == "kron" else CurvlinopsGGN, structure, "last_layer")
            close(found.log_marginal_likelihood(), expected.log_marginal_likelihood())


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("mine,other", [(CurvopsGGN, CurvlinopsGGN), (CurvopsEF, CurvlinopsEF)])
def test_subnetwork(mine, other, structure):
    model, X, y = problem("mlp", "classification")
    places = torch.tensor([3, 0, 40])
    found, expected = (
        fitted(model, X, y, b, structure, "subnetwork", subnetwork_indices=places) for b in (mine, other)
    )
    close(found.H, expected.H)
    close(found(X[:4]), expected(X[:4]))


def test_frozen_parameters_stay_out():
    model, X, y = problem("transformer", "classification")
    for p in (model.words.weight, *model.encoder.layers[0].linear1.parameters()):
        p.requires_grad_(False)
    free = torch.cat([torch.full((p.numel(),), p.requires_grad) for p in model.parameters()])
    expected = oracle(model, X, y)[free][:, free]
    close(fitted(model, X, y, CurvopsGGN, "full").H, expected)
    assert fitted(model, X, y, CurvopsGGN, "kron").H_facs.diag().shape == expected.diagonal().shape


def test_inputs_in_a_dict():
    model, X, y = problem("transformer", "classification")
    batches = [{"input_ids": X[k : k + 5], "labels": y[k : k + 5]} for k in range(0, N, 5)]
    expected = fitted(model, X, y, CurvopsGGN, "kron")

    class Loader(list):
        dataset = range(N)

    found = Laplace(model, "classification", "all", "kron", backend=CurvopsGGN)
    found.fit(Loader(batches))
    close(found.log_marginal_likelihood(), expected.log_marginal_likelihood())


def test_a_second_fit_adds_data():
    for name in ("mlp", "cross-attention"):
        model, X, y = problem(name, "classification")
        for structure in ("full", "diag", "kron"):
            la = Laplace(model, "classification", "all", structure, backend=CurvopsGGN)
            for part in (slice(0, 10), slice(10, N)):
                la.fit(loader(X[part], y[part]), override=False)
            close(la.log_marginal_likelihood(), fitted(model, X, y, CurvopsGGN, structure).log_marginal_likelihood())


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_a_fit_after_a_parameter_is_frozen(structure):
    """A backend of laplace-torch keeps the parameters that were trained when it was made; its own Kronecker one fails."""
    found = []
    for backend in (CurvopsGGN, CurvlinopsGGN):
        model, X, y = problem("mlp", "classification")
        la = Laplace(model, "classification", "all", structure, backend=backend)
        la.fit(loader(X, y))
        next(model.parameters()).requires_grad_(False)
        la.fit(loader(X, y))
        found.append(la.log_marginal_likelihood())
    close(*found)


def test_a_saved_posterior_is_the_same(tmp_path):
    model, X, y = problem("cross-attention", "classification")
    la = fitted(model, X, y, CurvopsGGN, "kron")
    torch.save(la.state_dict(), tmp_path / "la.pt")
    other = Laplace(model, "classification", "all", "kron", backend=CurvopsGGN)
    other.load_state_dict(torch.load(tmp_path / "la.pt"))
    close(other.log_marginal_likelihood(), la.log_marginal_likelihood())
    close(other(X), la(X))


def test_sampled_labels_are_right_in_the_mean_and_reproducible():
    model, X, y = problem("mlp", "regression")
    options = {"stochastic": True, "num_samples": 100}
    for structure in ("full", "diag", "kron"):
        exact = fitted(model, X, y, CurvopsGGN, structure, prior_precision=50.0)
        one, two, other = (
            fitted(model, X, y, CurvopsGGN, structure, prior_precision=50.0, backend_kwargs={**options, "seed": seed})
            for seed in (0, 0, 1)
        )
        dense_ones = [dense(la, structure) for la in (exact, one, two, other)]
        assert torch.equal(dense_ones[1], dense_ones[2]) and not torch.equal(dense_ones[1], dense_ones[3])
        # 17 data with 100 samples each; the prior does not count
        assert (dense_ones[1] - dense_ones[0]).norm() < 0.2 * curvature(exact, structure).norm()


def test_marginal_likelihood_training():
    model, X, y = problem("norm", "classification")
    la, _, losses, _ = marglik_training(
        model,
        loader(X, y),
        "classification",
        "kron",
        backend=CurvopsGGN,
        n_epochs=3,
        n_hypersteps=2,
        marglik_frequency=1,
    )
    assert isinstance(la.backend, CurvopsGGN) and losses[-1] < losses[0]


def test_options_reach_kfac():
    model, X, y = problem("cnn", "classification")
    options = {"kfac_approx": "reduce", "rule": BlockRule(largest_factor=2)}
    la = fitted(model, X, y, CurvopsGGN, "kron", backend_kwargs=options)
    assert {factor.ndim for factors in la.H_facs.kfacs for factor in factors} == {1}
    with pytest.raises(TypeError, match="unknown options 'kfac'"):
        fitted(model, X, y, CurvopsGGN, "kron", backend_kwargs={"kfac": "reduce"})


def test_hessian():
    model, X, y = problem("norm", "classification")
    params = {n: p.detach() for n, p in model.named_parameters()}
    flat = nn.utils.parameters_to_vector(params.values())

    def risk(vector):
        parts = vector.split([p.numel() for p in params.values()])
        shaped = {n: v.view_as(p) for (n, p), v in zip(params.items(), parts, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, shaped, (X,)), y, reduction="sum")

    # by double backward: forward mode over a layer norm's backward pass is wrong
    expected = hessian(risk, flat)
    close(fitted(model, X, y, CurvopsHessian, "full").H, expected)
    close(fitted(model, X, y, CurvopsHessian, "diag").H, expected.diagonal())
    with pytest.raises(NotImplementedError, match="Use backend=CurvopsGGN"):
        fitted(model, X, y, CurvopsHessian, "kron")


def test_what_the_structure_cannot_hold_is_named():
    class Halves(nn.Module):
        """Two maps whose weights are every second column of one."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(CLASSES, 4))

        def forward(self, X):
            return X[:, :2] @ self.weight[:, ::2].T + (X[:, 2:] @ self.weight[:, 1::2].T).tanh()

    torch.manual_seed(0)
    model, X, y = Halves(), torch.randn(N, 4), torch.randint(CLASSES, (N,))
    with pytest.raises(ValueError, match=r"block of 'weight'.*Use the structure 'diag' or 'full'"):
        fitted(model, X, y, CurvopsGGN, "kron")
    full = fitted(model, X, y, CurvopsGGN, "full").H
    close(
        full,
        GGNLinearOperator(model, nn.CrossEntropyLoss(reduction="sum"), {"weight": model.weight}, [(X, y)]).to_dense(),
    )
