"""Estimates of traces, diagonals, norms and functions of any matrix with products."""
