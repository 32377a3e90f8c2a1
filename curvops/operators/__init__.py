"""Linear operators and their algebra."""

from curvops.operators.algebra import StructuredAlgebra
from curvops.operators.elsewhere import OWNERS, Elsewhere
from curvops.operators.linear_operator import LinearOperator

LinearOperator.algebra = StructuredAlgebra()
for method, owners in OWNERS.items():
    setattr(LinearOperator, method, Elsewhere(method, owners))
