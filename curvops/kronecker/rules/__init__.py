"""What the taps know of operations that take parameters: a rule for each, which applies it and records its rows."""

from __future__ import annotations

from typing import Any

from curvops.kronecker.rules import elementwise, layers, norms, products, recurrent
from curvops.kronecker.taps import Rule

RULES: dict[Any, Rule] = {
    **layers.RULES,
    **norms.RULES,
    **products.RULES,
    **elementwise.RULES,
    **recurrent.RULES,
}
