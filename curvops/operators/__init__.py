"""Linear operators and their algebra."""

from curvops.operators.algebra import StructuredAlgebra
from curvops.operators.linear_operator import LinearOperator

LinearOperator.algebra = StructuredAlgebra()
