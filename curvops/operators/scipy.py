"""Linear operators as SciPy's, for its eigenvalue and linear solvers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from curvops.extras import extra
from curvops.operators.linear_operator import LinearOperator

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as SciPyLinearOperator


def to_scipy(operator: LinearOperator, dtype: Any = None) -> SciPyLinearOperator:
    """SciPy's view of an operator; arrays are converted to its dtype and device and back."""
    np, linalg = extra("numpy", "to_scipy()"), extra("scipy.sparse.linalg", "to_scipy()")
    own = torch.promote_types(operator.dtype, torch.float32)  # NumPy has no bfloat16
    numpy_dtype = np.dtype(dtype if dtype is not None else torch.empty(0, dtype=own).numpy().dtype)

    def product(which: LinearOperator) -> Any:
        def run(array: Any) -> Any:
            vector = torch.from_numpy(np.array(array)).to(which.device, which.dtype)
            return (which @ vector).to("cpu", own).numpy().astype(numpy_dtype)

        return run

    forward, backward = product(operator), product(operator.adjoint())
    return linalg.LinearOperator(
        operator.shape, matvec=forward, rmatvec=backward, matmat=forward, rmatmat=backward, dtype=numpy_dtype
    )
