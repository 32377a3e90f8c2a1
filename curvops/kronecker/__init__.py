"""Kronecker-factored approximations from taps on the forward pass."""
