"""From second moments to Kronecker factors, also for a weight that is used in both directions."""

from __future__ import annotations

import torch
from torch import Tensor

from curvops.kronecker.factors import Factors
from curvops.operators.blocks import KroneckerBlock


def kronecker_block(factors: Factors, constant: float, outputs_known: bool) -> KroneckerBlock | None:
    """The block c · B ⊗ A of a group, in the order of its weight; ``None`` if no row was seen.

    Args:
        factors: The accumulated moments.
        constant: The risk's constant c.
        outputs_known: Whether B was accumulated; otherwise it is the identity and c does not enter.
    """
    blocks = []
    for side, moments in factors.sides.items():
        if moments.rows == 0:
            continue
        a, b = moments.inputs, moments.outputs if outputs_known else _identity(moments.outputs)
        per_row, scale = 1 / moments.rows, constant if outputs_known else 1.0
        right_side = side == "right"
        blocks.append(KroneckerBlock(b, a, (scale, per_row)) if right_side else KroneckerBlock(a, b, (per_row, scale)))
    if len(blocks) < 2:
        return blocks[0] if blocks else None
    return KroneckerBlock(*nearest_product([(block.left, block.right) for block in blocks]))


def nearest_product(products: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The Kronecker product nearest to a sum of two, in Frobenius norm (Van Loan & Pitsianis 1993).

    The sum rearranged is Σ vec(L_i) vec(R_i)ᵀ, of rank two; its leading singular pair lies in the spans
    of the L_i and of the R_i, and follows from their Gram matrices. A factor that is diagonal in one term
    is made diagonal in both, since it was found too large for a matrix.
    """
    lefts, rights = (_alike([pair[k] for pair in products]) for k in (0, 1))
    gram_left, gram_right = _gram(lefts), _gram(rights)
    # leading eigenvector x of G_R G_L gives L = Σ x_i L_i up to scale
    values, vectors = torch.linalg.eig(gram_right @ gram_left)
    x = vectors[torch.arange(len(vectors)), :, values.real.argmax(1)].real.abs()
    left = sum(_scale(x[:, i], f) for i, f in enumerate(lefts))
    y = (gram_left @ x.unsqueeze(-1)).squeeze(-1)
    norm = (x * y).sum(1).clamp(min=torch.finfo(x.dtype).tiny)
    right = sum(_scale(y[:, i] / norm, f) for i, f in enumerate(rights))
    assert isinstance(left, Tensor) and isinstance(right, Tensor)
    return left, right


def _alike(factors: list[Tensor]) -> list[Tensor]:
    if len({f.ndim for f in factors}) == 1:
        return factors
    return [f if f.ndim == 2 else f.diagonal(dim1=1, dim2=2) for f in factors]


def _gram(factors: list[Tensor]) -> Tensor:
    flat = torch.stack([f.flatten(1) for f in factors], 1)
    return flat @ flat.mT


def _scale(weight: Tensor, factor: Tensor) -> Tensor:
    return weight.view(-1, *[1] * (factor.ndim - 1)) * factor


def _identity(like: Tensor) -> Tensor:
    if like.ndim == 2:
        return torch.ones_like(like)
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like).contiguous()
