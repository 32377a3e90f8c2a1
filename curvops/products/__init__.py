"""Derivatives of one batch: the reference, the fast ways and their certificates."""
