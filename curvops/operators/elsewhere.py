"""Methods that some operators have and others lack, for errors that say who has them."""

from __future__ import annotations

from typing import Any, NoReturn

_STATE = (
    "Kronecker operators have it (KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator, GGNDiagonalLinearOperator, and what load() "
    "reads), and no multiples, inverses or blocks of them: call it before these are taken."
)
_DATA = (
    "Kronecker operators have it that are made of a model and data (KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator, "
    "GGNDiagonalLinearOperator), and neither what load() reads nor multiples, inverses or blocks of them."
)
_BLOCKS = (
    "Operators of blocks have it: KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator, GGNDiagonalLinearOperator, "
    "DiagonalOperator, block_diagonal(), and their multiples and inverses."
)
OWNERS = {
    **dict.fromkeys(("save", "merge", "moving_average"), _STATE),
    **dict.fromkeys(("refresh", "decompose", "share", "layers"), _DATA),
    **dict.fromkeys(("power", "det", "sample", "eigenvalues"), _BLOCKS),
}


class Elsewhere:
    """In the place of a method that an operator lacks: an AttributeError that says who has it, so that `hasattr` is false."""

    def __init__(self, method: str, owners: str) -> None:
        self._method, self._owners = method, owners

    def __get__(self, operator: Any, kind: type) -> NoReturn:
        own = kind.__name__
        name = own if operator is None or operator.name == own else f"{operator.name} ({own})"
        raise AttributeError(f"{name}: it has no {self._method}(). {self._owners}")
