"""Linear solvers for any matrix with products."""
