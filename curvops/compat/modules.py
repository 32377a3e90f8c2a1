"""Which of the peer's modules has which names."""

from __future__ import annotations

from curvops.compat import density, estimates, functorch, inverses, kronecker, operators, risk, spaces, utils
from curvops.operators.linear_operator import LinearOperator
from curvops.products.risk_operator import RiskOperator

MODULES: dict[str, dict[str, object]] = {
    "_torch_base": {"PyTorchLinearOperator": LinearOperator, "CurvatureLinearOperator": RiskOperator},
    "hessian": {"HessianLinearOperator": operators.HessianLinearOperator},
    "ggn": {"GGNLinearOperator": operators.GGNLinearOperator},
    "ggn_diagonal": {"GGNDiagonalLinearOperator": kronecker.GGNDiagonalLinearOperator},
    "fisher": {"FisherMCLinearOperator": operators.FisherMCLinearOperator},
    "gradient_moments": {"EFLinearOperator": operators.EFLinearOperator},
    "kfac": {
        "KFACLinearOperator": kronecker.KFACLinearOperator,
        "FisherType": kronecker.FisherType,
        "KFACType": kronecker.KFACType,
    },
    "kfac_utils": {"FisherType": kronecker.FisherType, "KFACType": kronecker.KFACType},
    "ekfac": {"EKFACLinearOperator": kronecker.EKFACLinearOperator},
    "kfoc": {"KFOCLinearOperator": kronecker.KFOCLinearOperator},
    "inverse": {
        "CGInverseLinearOperator": inverses.CGInverseLinearOperator,
        "LSMRInverseLinearOperator": inverses.LSMRInverseLinearOperator,
        "NeumannInverseLinearOperator": inverses.NeumannInverseLinearOperator,
        "KFACInverseLinearOperator": kronecker.inverse,
    },
    "jacobian": {
        "JacobianLinearOperator": operators.JacobianLinearOperator,
        "TransposedJacobianLinearOperator": operators.TransposedJacobianLinearOperator,
    },
    "submatrix": {"SubmatrixLinearOperator": spaces.SubmatrixLinearOperator},
    "trace.hutchinson": {
        "hutchinson_trace": estimates.hutchinson_trace,
        "HutchinsonTraceEstimator": estimates.HutchinsonTraceEstimator,
    },
    "trace.meyer2020hutch": {
        "hutchpp_trace": estimates.hutchpp_trace,
        "HutchPPTraceEstimator": estimates.HutchPPTraceEstimator,
    },
    "trace.epperly2024xtrace": {"xtrace": estimates.xtrace},
    "diagonal.hutchinson": {
        "hutchinson_diag": estimates.hutchinson_diag,
        "HutchinsonDiagonalEstimator": estimates.HutchinsonDiagonalEstimator,
    },
    "diagonal.epperly2024xtrace": {"xdiag": estimates.xdiag},
    "norm.hutchinson": {
        "hutchinson_squared_fro": estimates.hutchinson_squared_fro,
        "HutchinsonSquaredFrobeniusNormEstimator": estimates.HutchinsonSquaredFrobeniusNormEstimator,
    },
    "papyan2020traces.spectrum": {
        "approximate_boundaries": density.approximate_boundaries,
        "approximate_boundaries_abs": density.approximate_boundaries_abs,
        "lanczos_approximate_spectrum": density.lanczos_approximate_spectrum,
        "lanczos_approximate_log_spectrum": density.lanczos_approximate_log_spectrum,
        "LanczosApproximateSpectrumCached": density.LanczosApproximateSpectrumCached,
        "LanczosApproximateLogSpectrumCached": density.LanczosApproximateLogSpectrumCached,
    },
    "diag": {"DiagonalLinearOperator": spaces.DiagonalLinearOperator},
    "outer": {"OuterProductLinearOperator": spaces.OuterProductLinearOperator},
    "examples": {
        "gradient_and_loss": risk.gradient_and_loss,
        "TensorLinearOperator": spaces.TensorLinearOperator,
        "IdentityLinearOperator": spaces.IdentityLinearOperator,
        "OuterProductLinearOperator": spaces.OuterProductLinearOperator,
    },
    "examples.functorch": {
        "functorch_hessian": functorch.functorch_hessian,
        "functorch_ggn": functorch.functorch_ggn,
        "functorch_empirical_fisher": functorch.functorch_empirical_fisher,
        "functorch_jacobian": functorch.functorch_jacobian,
        "functorch_gradient": functorch.functorch_gradient,
        "functorch_gradient_and_loss": functorch.functorch_gradient_and_loss,
    },
    "examples.utils": {"report_nonclose": utils.report_nonclose},
    "sampling": {"random_vector": utils.random_vector},
    "utils": {
        "allclose_report": utils.allclose_report,
        "fork_rng_with_seed": utils.fork_rng_with_seed,
        "split_list": utils.split_list,
    },
}
# modules whose names the package itself does not have
INNER = ("_torch_base", "diag", "outer", "examples", "examples.functorch", "examples.utils", "sampling", "utils")
NAMES = {name: value for module, names in MODULES.items() if module not in INNER for name, value in names.items()}
