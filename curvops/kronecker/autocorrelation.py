"""Second moments of a convolution's windows from the map's autocorrelation, without forming the windows.

Two places of a window that are (dy, dx) apart see the map's autocorrelation at that displacement, but for rows
and columns near the border that their window never reaches. So a k × k kernel needs some 2 k² products of
channels instead of k⁴; or k³, in larger products, where only the displacement from row to row is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRIPS = 16 * 2**20  # bytes that are written out at once


def window_moment(x: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Σ a aᵀ over all windows of stride 1.

    Args:
        x: The padded map, ``[N, C, H, W]``.
        kernel: Height and width of the windows; the map has at least as many windows each way.

    Returns:
        ``[C · height · width, C · height · width]``.
    """
    n, channels, height, width = x.shape
    p, q = kernel
    # multiplications, those of larger products taking 0.6 times as long, and the cost of many small operations in
    # the same unit (measured on a CPU)
    pairs = n * height * width * channels**2
    if (2 * p * q - p - q + 1) * pairs + 3e5 * (p * q) ** 2 < 0.6 * p * q**2 * pairs:
        return moment_by_places(x, kernel)
    some = max(1, STRIPS // (q * x[:1].numel() * x.itemsize))
    return torch.stack([moment_by_strips(part, kernel) for part in x.split(some)]).sum(0)


def moment_by_strips(x: Tensor, kernel: tuple[int, int]) -> Tensor:
    """The moment from products of rows of windows: a row's places are written out, those below it are not."""
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


def moment_by_places(x: Tensor, kernel: tuple[int, int]) -> Tensor:
    """The moment from products of single places: fewest multiplications, but in small products."""
    n, channels, _, width = x.shape
    p, q = kernel
    columns = width - q + 1
    # [H, W · N, C]: a range of columns is a view whose rows can be multiplied in one batch
    rows = x.permute(2, 3, 0, 1).reshape(x.shape[2], width * n, channels)
    moment = torch.empty(channels, p, q, channels, p, q, dtype=x.dtype, device=x.device)
    for dy in range(p):
        top, bottom = rows[: len(rows) - dy], rows[dy:]
        for dx in range(-(q - 1) if dy else 0, q):
            first, last = max(0, -dx), min(q - 1, q - 1 - dx)  # columns of the window that have a partner

            def strip(v: int, end: int, top: Tensor = top, bottom: Tensor = bottom, dx: int = dx) -> Tensor:
                """Products of columns v … end − 1 with those dx to the right, for each row."""
                left = top[:, v * n : end * n]
                return left.mT @ bottom[:, (v + dx) * n : (end + dx) * n]

            core = strip(last, first + columns)
            before = [strip(v, v + 1) for v in range(first, last)]
            after = [strip(v, v + 1) for v in range(first + columns, last + columns)]
            for j in range(first, last + 1):
                each = core
                for part in (*before[j - first :], *after[: j - first]):
                    each = each + part
                for i, total in enumerate(_over_rows(each, p - dy, x.shape[2] - p + 1)):
                    moment[:, i, j, :, i + dy, j + dx] = total
                    moment[:, i + dy, j + dx, :, i, j] = total.mT
    size = channels * p * q
    return moment.view(size, size)


def _over_rows(each: Tensor, starts: int, height: int) -> list[Tensor]:
    """Sums of ``height`` consecutive rows from each of the first ``starts`` ones."""
    last = starts - 1
    core = each[last:height].sum(0)
    totals = []
    for i in range(starts):
        total = core
        for border in (each[i:last], each[height : height + i]):
            if len(border):
                total = total + border.sum(0)
        totals.append(total)
    return totals


def window_sum(x: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Σ a over all windows of stride 1, ``[C · height · width]``."""
    p, q = kernel
    total = x.sum(0)
    return total.unfold(1, total.shape[1] - p + 1, 1).unfold(2, total.shape[2] - q + 1, 1).sum((3, 4)).flatten()


WORTH = 8e6  # multiplications from which the work saved outweighs the many small operations; measured on a CPU


def worthwhile(x: Tensor, kernel: tuple[int, ...]) -> bool:
    """Whether the autocorrelation of a map ``[N, C, H, W]`` takes less time than its windows."""
    n, channels, height, width = x.shape
    p, q = kernel
    work = n * height * width * (channels * p * q) ** 2
    return min(p, q) > 1 and height >= 2 * p and width >= 2 * q and work >= WORTH
