"""`import curvops.compat` lets scripts written for curvlinops run: names, arguments of its releases, numbers."""

import sys
from importlib import reload
from types import ModuleType

import pytest
import torch
from torch import nn

import curvops
import curvops.compat

FUNCTIONS = [
    "hutchinson_trace",
    "hutchpp_trace",
    "xtrace",
    "hutchinson_diag",
    "xdiag",
    "hutchinson_squared_fro",
    "lanczos_approximate_spectrum",
    "lanczos_approximate_log_spectrum",
]
CLASSES = [
    "HessianLinearOperator",
    "GGNLinearOperator",
    "EFLinearOperator",
    "FisherMCLinearOperator",
    "KFACLinearOperator",
    "EKFACLinearOperator",
    "KFOCLinearOperator",
    "GGNDiagonalLinearOperator",
    "JacobianLinearOperator",
    "TransposedJacobianLinearOperator",
    "SubmatrixLinearOperator",
    "CGInverseLinearOperator",
    "LSMRInverseLinearOperator",
    "NeumannInverseLinearOperator",
    "KFACInverseLinearOperator",
    "FisherType",
    "KFACType",
    "LanczosApproximateSpectrumCached",
    "LanczosApproximateLogSpectrumCached",
    "HutchinsonTraceEstimator",
    "HutchPPTraceEstimator",
    "HutchinsonDiagonalEstimator",
    "HutchinsonSquaredFrobeniusNormEstimator",
]


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = [(torch.rand(n, 3).double(), torch.randint(2, (n,))) for n in (5, 4)]
    return model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data


def test_names():
    import curvlinops

    assert curvlinops.__all__ == sorted({*FUNCTIONS, *CLASSES, *curvlinops.__all__})
    assert all(hasattr(curvlinops, name) for name in (*FUNCTIONS, *CLASSES))
    from curvlinops.kfac_utils import FisherType

    assert FisherType is curvlinops.FisherType


def test_the_real_one_was_imported_before(monkeypatch):
    real = ModuleType("curvlinops")
    real.__file__ = "curvlinops/__init__.py"
    monkeypatch.setitem(sys.modules, "curvlinops", real)
    with pytest.raises(ImportError, match="imported already"):
        reload(curvops.compat)


@pytest.mark.parametrize("name", ["HessianLinearOperator", "GGNLinearOperator", "EFLinearOperator"])
def test_parameters_as_list_dict_and_copies(problem, name):
    from curvlinops.examples import functorch

    oracle = {"H": "functorch_hessian", "G": "functorch_ggn", "E": "functorch_empirical_fisher"}[name[0]]
    model, loss, params, data = problem
    moved = {n: p.detach() + 0.1 for n, p in params.items()}
    for given in (params, list(params.values()), moved):
        found = getattr(curvops.compat.modules.operators, name)(model, loss, given, data, num_data=9).to_dense()
        torch.testing.assert_close(found, getattr(functorch, oracle)(model, loss, given, data))
    nn.utils.vector_to_parameters(torch.cat([p.flatten() for p in moved.values()]), params.values())
    torch.testing.assert_close(found, getattr(curvops, name)(model, loss, params, data).to_dense())


def test_functions_of_the_input_alone(problem):
    from curvlinops import GGNLinearOperator, JacobianLinearOperator

    model, loss, params, data = problem
    own = list(params.values())
    ggn = GGNLinearOperator(lambda X: model(X), loss, own, data)
    torch.testing.assert_close(ggn.to_dense(), curvops.GGNLinearOperator(*problem).to_dense())
    assert JacobianLinearOperator(model, own, data).shape == (18, 26)


def test_sampled_fisher(problem):
    from curvlinops import FisherMCLinearOperator, GGNDiagonalLinearOperator, GGNLinearOperator

    expected = curvops.GGNLinearOperator(*problem, mc_samples=3, seed=1).to_dense()
    for operator in (FisherMCLinearOperator, GGNLinearOperator):
        torch.testing.assert_close(operator(*problem, mc_samples=3, seed=1).to_dense(), expected)
    diagonal = GGNDiagonalLinearOperator(*problem, mc_samples=3, seed=1)
    torch.testing.assert_close(diagonal.to_dense().diagonal(), expected.diagonal())


@pytest.mark.parametrize("release", [2, 3])
def test_kfac_and_its_inverses(problem, release):
    from curvlinops import FisherType, KFACInverseLinearOperator, KFACLinearOperator, KFACType

    model, loss, params, data = problem
    given = list(params.values()) if release == 2 else params
    extra = {"shape": None} if release == 2 else {"backend": "make_fx"}
    options = {"fisher_type": FisherType.TYPE2, "kfac_approx": KFACType.EXPAND, "separate_weight_and_bias": False}
    kfac = KFACLinearOperator(model, loss, given, data, **options, **extra)
    ours = curvops.KFACLinearOperator(*problem, fisher_type="type-2", separate_weight_and_bias=False)
    torch.testing.assert_close(kfac.to_dense(), ours.to_dense())

    def inverse(**damping):
        if release == 2:
            return KFACInverseLinearOperator(kfac, **damping).to_dense()
        return kfac.inverse(**damping).to_dense()

    eye = torch.eye(26).double()
    exact = inverse(damping=0.1, use_exact_damping=True)
    torch.testing.assert_close(exact, torch.linalg.inv(kfac.to_dense() + 0.1 * eye))
    heuristic = inverse(damping=0.1, use_heuristic_damping=True, min_damping=1e-4)
    torch.testing.assert_close(heuristic, ours.inverse(0.1, "heuristic", 1e-4).to_dense())
    factors = [(p.block.left[0], p.block.right[0]) for p in kfac.blocks]
    damped = [torch.kron(*(f + 0.1 * torch.eye(len(f)).double() for f in pair)) for pair in factors]
    expected = torch.zeros_like(eye)
    for placed, block in zip(kfac.blocks, damped, strict=True):
        expected[placed.positions[:, None], placed.positions] = torch.linalg.inv(block)
    torch.testing.assert_close(inverse(damping=0.1), expected)
    with pytest.raises(ValueError, match="got both"):
        inverse(damping=0.1, use_exact_damping=True, use_heuristic_damping=True)


def test_inverses_of_shifted_operators(problem):
    from curvlinops import CGInverseLinearOperator, GGNLinearOperator, LSMRInverseLinearOperator
    from curvlinops import NeumannInverseLinearOperator as Neumann
    from curvlinops.diag import DiagonalLinearOperator
    from curvlinops.examples import IdentityLinearOperator, TensorLinearOperator

    ggn = GGNLinearOperator(*problem)
    damped = ggn + 0.1 * IdentityLinearOperator([p.shape for p in problem[2].values()], ggn.device, ggn.dtype)
    expected = torch.linalg.inv(ggn.to_dense() + 0.1 * torch.eye(26).double())
    diagonal = DiagonalLinearOperator([1 / damped.to_dense().diagonal()])
    found = [
        CGInverseLinearOperator(damped, tolerance=1e-9, eps=0),
        CGInverseLinearOperator(damped, tolerance=1e-9, preconditioner=diagonal.__matmul__),
        LSMRInverseLinearOperator(damped, atol=0, btol=0, maxiter=100),
        Neumann(damped, num_terms=500),
        Neumann(damped, num_terms=0, preconditioner=TensorLinearOperator(expected).__matmul__),
    ]
    for inverse in found:
        torch.testing.assert_close(inverse.to_dense(), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="did not converge"):
        Neumann(damped, scale=100.0) @ torch.ones(26).double()


def test_estimators_draw_from_the_global_random_state():
    from curvlinops import HutchinsonTraceEstimator, hutchinson_squared_fro, hutchinson_trace, xdiag

    torch.manual_seed(0)
    matrix = torch.rand(30, 30).double()
    estimates = torch.stack([hutchinson_trace(matrix, 5) for _ in range(400)])
    assert len(estimates.unique()) == 400
    assert abs(estimates.mean() - matrix.trace()) < 4 * estimates.std() / 20
    torch.manual_seed(3)
    first = xdiag(matrix, 6)
    torch.manual_seed(3)
    assert type(first) is torch.Tensor and torch.equal(first, xdiag(matrix, 6))
    assert isinstance(HutchinsonTraceEstimator(matrix).sample(), float)
    torch.testing.assert_close(hutchinson_squared_fro(matrix, 30), (matrix**2).sum())


def test_spectral_densities():
    from curvlinops import LanczosApproximateSpectrumCached, lanczos_approximate_log_spectrum
    from curvlinops.examples import OuterProductLinearOperator, TensorLinearOperator

    torch.manual_seed(0)
    A = TensorLinearOperator(torch.diag(torch.linspace(-1, 2, 40)).double())
    cached = LanczosApproximateSpectrumCached(A, 20)
    grid, density = cached.approximate_spectrum(num_repeats=4, kappa=2.0)
    torch.testing.assert_close(torch.trapezoid(density, grid), torch.tensor(1.0).double(), rtol=0.05, atol=0.0)
    assert torch.equal(density, cached.approximate_spectrum(num_repeats=4, kappa=2.0)[1])
    grid, density = lanczos_approximate_log_spectrum(A @ A, 40, 2000, boundaries=(1e-4, 4.0), margin=1.0)
    torch.testing.assert_close(torch.trapezoid(density, grid), torch.tensor(1.0).double(), rtol=0.05, atol=0.0)
    low = OuterProductLinearOperator(torch.tensor([2.0, -1.0]), torch.eye(4)[:, :2])
    assert low.to_dense().diagonal().tolist() == [2.0, -1.0, 0.0, 0.0]


def test_submatrix_can_be_set_anew(problem):
    from curvlinops import HessianLinearOperator, SubmatrixLinearOperator

    hessian = HessianLinearOperator(*problem)
    part = SubmatrixLinearOperator(hessian, [3, 1], [0, 2, 5])
    torch.testing.assert_close(part.to_dense(), hessian.to_dense()[[3, 1]][:, [0, 2, 5]])
    part.set_submatrix([4], [4])
    assert part.shape == (1, 1)
    with pytest.raises(ValueError, match="different numbers from 0 to 25"):
        part.set_submatrix([2, 2], [0])


def test_gradient_and_arguments_without_a_counterpart(problem):
    from curvlinops import HessianLinearOperator
    from curvlinops.examples import gradient_and_loss
    from curvlinops.examples.functorch import functorch_gradient_and_loss

    found, expected = gradient_and_loss(*problem), functorch_gradient_and_loss(*problem)
    torch.testing.assert_close(found, expected)
    with pytest.raises(NotImplementedError, match="block_sizes"):
        HessianLinearOperator(*problem, block_sizes=[2, 2])
    with pytest.raises(TypeError, match="at most 6"):
        HessianLinearOperator(*problem, False, True, None)


class Shared(nn.Module):
    """One module under two names, as in CoaT."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.b, self.norm = self.a, nn.BatchNorm1d(2)

    def forward(self, X):
        return self.norm(self.b(X)).tanh() + self.a(X)


@pytest.mark.filterwarnings("ignore:.*batch norm in train mode")
def test_copies_of_the_parameters_stand_in_and_nothing_is_swapped(problem):
    import curvlinops
    from curvlinops.examples import functorch

    model, _, _, data = problem
    model = Shared().double()
    own = dict(model.named_parameters(remove_duplicate=False))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    copies = {name: (2 * p).detach().requires_grad_() for name, p in model.named_parameters()}
    loss, found = nn.CrossEntropyLoss(), {}
    for kind in ("Hessian", "GGN", "EF"):
        operator = getattr(curvlinops, f"{kind}LinearOperator")(model, loss, copies, data[:1])
        found[kind] = operator.to_dense()
    curvlinops.KFACLinearOperator(model, loss, copies, data[:1])
    functorch.functorch_hessian(model, loss, list(model.parameters()), data[:1])
    now = dict(model.named_parameters(remove_duplicate=False))
    assert now.keys() == own.keys() and all(now[name] is p for name, p in own.items())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.a is model.b and all(isinstance(p, nn.Parameter) for p in now.values())
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(copies[name])
    X, y = data[0]
    slopes = torch.autograd.grad(loss(model(X), y), list(model.parameters()), create_graph=True)
    flat = torch.cat([g.flatten() for g in slopes])
    rows = [
        torch.cat([t.flatten() for t in torch.autograd.grad(g, list(model.parameters()), retain_graph=True)])
        for g in flat
    ]
    torch.testing.assert_close(found["Hessian"], torch.stack(rows))


@pytest.mark.parametrize("form", [list, dict])
def test_tensors_that_stand_for_nothing_are_refused(problem, form):
    import curvlinops

    model, loss, params, data = problem
    copies = {f"mine.{k}": p.detach().clone().requires_grad_() for k, p in enumerate(params.values())}
    with pytest.raises(ValueError, match="are not tensors of the module Sequential, nor named as one"):
        curvlinops.HessianLinearOperator(
            model, loss, form(copies.values()) if form is list else params | copies | {"0.bias": copies["mine.1"]}, data
        )
