"""Which of the peer's modules has which names."""

from __future__ import annotations

from types import ModuleType

from curvops.compat import density, estimates, functorch, inverses, kronecker, operators, risk, spaces, utils
from curvops.operators.linear_operator import LinearOperator
from curvops.products.risk_operator import RiskOperator


def _of(module: ModuleType, *names: str) -> dict[str, object]:
    return {name: getattr(module, name) for name in names}


MODULES: dict[str, dict[str, object]] = {
    "_torch_base": {"PyTorchLinearOperator": LinearOperator, "CurvatureLinearOperator": RiskOperator},
    "hessian": _of(operators, "HessianLinearOperator"),
    "ggn": _of(operators, "GGNLinearOperator"),
    "ggn_diagonal": _of(kronecker, "GGNDiagonalLinearOperator"),
    "fisher": _of(operators, "FisherMCLinearOperator"),
    "gradient_moments": _of(operators, "EFLinearOperator"),
    "kfac": _of(kronecker, "KFACLinearOperator", "FisherType", "KFACType"),
    "kfac_utils": _of(kronecker, "FisherType", "KFACType"),
    "ekfac": _of(kronecker, "EKFACLinearOperator"),
    "kfoc": _of(kronecker, "KFOCLinearOperator"),
    "inverse": {
        "KFACInverseLinearOperator": kronecker.inverse,
        **_of(inverses, "CGInverseLinearOperator", "LSMRInverseLinearOperator", "NeumannInverseLinearOperator"),
    },
    "jacobian": _of(operators, "JacobianLinearOperator", "TransposedJacobianLinearOperator"),
    "submatrix": _of(spaces, "SubmatrixLinearOperator"),
    "trace.hutchinson": _of(estimates, "hutchinson_trace", "HutchinsonTraceEstimator"),
    "trace.meyer2020hutch": _of(estimates, "hutchpp_trace", "HutchPPTraceEstimator"),
    "trace.epperly2024xtrace": _of(estimates, "xtrace"),
    "diagonal.hutchinson": _of(estimates, "hutchinson_diag", "HutchinsonDiagonalEstimator"),
    "diagonal.epperly2024xtrace": _of(estimates, "xdiag"),
    "norm.hutchinson": _of(estimates, "hutchinson_squared_fro", "HutchinsonSquaredFrobeniusNormEstimator"),
    "papyan2020traces.spectrum": _of(
        density,
        "approximate_boundaries",
        "approximate_boundaries_abs",
        "lanczos_approximate_spectrum",
        "lanczos_approximate_log_spectrum",
        "LanczosApproximateSpectrumCached",
        "LanczosApproximateLogSpectrumCached",
    ),
    "diag": _of(spaces, "DiagonalLinearOperator"),
    "outer": _of(spaces, "OuterProductLinearOperator"),
    "examples": {
        "gradient_and_loss": risk.gradient_and_loss,
        **_of(spaces, "TensorLinearOperator", "IdentityLinearOperator", "OuterProductLinearOperator"),
    },
    "examples.functorch": _of(
        functorch,
        "functorch_hessian",
        "functorch_ggn",
        "functorch_empirical_fisher",
        "functorch_jacobian",
        "functorch_gradient",
        "functorch_gradient_and_loss",
    ),
    "examples.utils": _of(utils, "report_nonclose"),
    "sampling": _of(utils, "random_vector"),
    "utils": _of(utils, "allclose_report", "fork_rng_with_seed", "split_list"),
}
# modules whose names the package itself does not have
INNER = ("_torch_base", "diag", "outer", "examples", "examples.functorch", "examples.utils", "sampling", "utils")
NAMES = {name: value for module, names in MODULES.items() if module not in INNER for name, value in names.items()}
