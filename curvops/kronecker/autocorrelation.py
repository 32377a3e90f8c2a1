"""Second moments of a convolution's windows from the map's autocorrelation, without forming the windows.

Rows of windows that are dy apart see the map's autocorrelation at that displacement, but for rows near the border that
their window never reaches. So a k × k kernel needs k³ products of channels instead of k⁴.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STRIPS = 16 * 2**20  # bytes that are written out at once
WORTH = 8e6  # multiplications from which the work saved outweighs the many small operations; measured on a CPU

Padding = tuple[tuple[int, int], ...]  # rows above and below, columns left and right


def worthwhile(x: Tensor, kernel: tuple[int, ...]) -> bool:
    """Whether the autocorrelation of a map ``[N, C, H, W]`` takes less time than its windows."""
    n, channels, height, width = x.shape
    p, q = kernel
    work = n * height * width * (channels * p * q) ** 2
    return min(p, q) > 1 and height >= 2 * p and width >= 2 * q and work >= WORTH


def window_moment(x: Tensor, kernel: tuple[int, ...], padding: Padding) -> Tensor:
    """Σ a aᵀ over all windows of stride 1.

    This is an identity, which the tests show for shapes of all kinds: no model needs to prove it. The map is
    ``[N, C, H, W]`` and has, once padded, as many windows each way as a window has places; each side is C · height · width.
    """
    _, channels, height, width = x.shape
    some = max(1, STRIPS // (kernel[1] * channels * height * width * x.itemsize))
    return torch.stack([_moment(part, kernel, padding) for part in x.split(some)]).sum(0)


def _moment(x: Tensor, kernel: tuple[int, ...], padding: Padding) -> Tensor:
    """The moment from products of rows of windows: a row's places are written out, those below it are not."""
    x = F.pad(x, (*padding[1], *padding[0]))
    n, channels, height, width = x.shape
    p, q = kernel
    high, step = height - p + 1, n * (width - q + 1)
    rows = x.unfold(3, q, 1).permute(1, 4, 2, 0, 3).reshape(channels * q, height * step)
    moment = x.new_empty(channels, p, q, channels, p, q)
    for dy in range(p):

        def product(start: int, stop: int, dy: int = dy) -> Tensor:
            """Products of rows start … stop − 1 with those dy below."""
            return rows[:, start * step : stop * step] @ rows[:, (start + dy) * step : (stop + dy) * step].T

        last = p - 1 - dy
        core = product(last, high)
        before, after = ([product(h, h + 1) for h in part] for part in (range(last), range(high, high + last)))
        for i in range(last + 1):
            total = sum([*before[i:], *after[:i]], core).view(channels, q, channels, q)
            moment[:, i, :, :, i + dy] = total
            moment[:, i + dy, :, :, i] = total.permute(2, 3, 0, 1)
    size = channels * p * q
    return moment.view(size, size)


def window_sum(x: Tensor, kernel: tuple[int, ...], padding: Padding) -> tuple[Tensor, int]:
    """Σ a over all windows of stride 1, ``[C · height · width]``, and their number."""
    p, q = kernel
    total = F.pad(x.sum(0), (*padding[1], *padding[0]))
    high, wide = total.shape[1] - p + 1, total.shape[2] - q + 1
    return total.unfold(1, high, 1).unfold(2, wide, 1).sum((3, 4)).flatten(), len(x) * high * wide
