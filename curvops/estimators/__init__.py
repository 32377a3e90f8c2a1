"""Estimates of traces, diagonals, norms and functions of any matrix with products."""

from curvops.estimators.block_norms import BlockNorms, block_norms
from curvops.estimators.blocks import Block, by_group
from curvops.estimators.diagonal import diagonal
from curvops.estimators.estimate import Estimate
from curvops.estimators.function import logdet, trace_function
from curvops.estimators.norm import squared_norm
from curvops.estimators.trace import trace

__all__ = [
    "Block",
    "BlockNorms",
    "Estimate",
    "block_norms",
    "by_group",
    "diagonal",
    "logdet",
    "squared_norm",
    "trace",
    "trace_function",
]
