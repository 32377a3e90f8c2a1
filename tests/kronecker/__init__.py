"""Tests of the Kronecker family."""
