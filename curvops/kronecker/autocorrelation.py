"""Second moments of a convolution's windows from the map's autocorrelation, without forming the windows.

Two places of a window that are (dy, dx) apart see the map's autocorrelation at that displacement, but for rows
and columns near the border that their window never reaches. So a k × k kernel needs some 2 k² products of
channels instead of k⁴; or k³, in larger products, where only the displacement from row to row is used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 2e6  # multiplications that take as long as the small operations of one displacement
STRIPS = 16 * 2**20  # bytes that are written out at once


Padding = tuple[tuple[int, int], ...]  # rows above and below, columns left and right


def window_moment(x: Tensor, kernel: tuple[int, int], padding: Padding) -> Tensor:
    """Σ a aᵀ over all windows of stride 1.

    Args:
        x: The map, ``[N, C, H, W]``.
        kernel: Height and width of the windows; the padded map has at least as many windows each way.
        padding: Zeros around the map.

    Returns:
        ``[C · height · width, C · height · width]``.
    """
    n, channels, height, width = _padded_shape(x, padding)
    p, q = kernel
    # multiplications, those of larger products taking 0.6 times as long, and the cost of many small operations in
    # the same unit (measured on a CPU)
    pairs = n * height * width * channels**2
    displacements = 2 * p * q - p - q + 1
    if displacements * (pairs + SMALL) < 0.6 * p * q**2 * pairs:
        return moment_by_places(x, kernel, padding)
    some = max(1, STRIPS // (q * channels * height * width * x.itemsize))
    return torch.stack([moment_by_strips(part, kernel, padding) for part in x.split(some)]).sum(0)


def moment_by_strips(x: Tensor, kernel: tuple[int, int], padding: Padding) -> Tensor:
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


def moment_by_places(x: Tensor, kernel: tuple[int, int], padding: Padding) -> Tensor:
    """The moment from products of single places: fewest multiplications, but in small products."""
    p, q = kernel
    # [H, W, N, C]: a range of columns is a view whose rows can be multiplied in one batch
    rows = F.pad(x.permute(2, 3, 0, 1), (0, 0, 0, 0, *padding[1], *padding[0])).contiguous()
    height, width, _, channels = rows.shape
    high, wide = height - p + 1, width - q + 1
    # columns left and right that some windows do not reach, one beside the other: [H, 2, N, (q − 1) C]
    edges = torch.stack([rows[:, : q - 1], rows[:, wide:]], 1).transpose(2, 3).flatten(3)
    moment = torch.empty(channels, p, q, channels, p, q, dtype=x.dtype, device=x.device)
    for dy in range(p):
        top, bottom = slice(0, height - dy), slice(dy, height)
        down = _ranges(p - dy, height - dy, high).to(x)
        outer = (edges[top].mT @ edges[bottom]).unflatten(3, (q - 1, channels)).unflatten(2, (q - 1, channels))
        for dx in range(-(q - 1) if dy else 0, q):
            first, last = max(0, -dx), min(q - 1, q - 1 - dx)  # columns of the window that have a partner
            left, right = rows[top, last : first + wide], rows[bottom, last + dx : first + wide + dx]
            core = left.flatten(1, 2).mT @ right.flatten(1, 2)
            beside = outer.diagonal(dx, 2, 4).movedim(-1, 2)
            # products of each row: of the columns before those of all windows, of those, of the columns after
            each = torch.cat([beside[:, 0], core[:, None], beside[:, 1]], 1)
            across = _ranges(last - first + 1, each.shape[1], last - first + 1).to(x)
            total = across @ (down @ each.flatten(1)).view(p - dy, each.shape[1], channels**2)
            total = total.view(p - dy, last - first + 1, channels, channels).permute(2, 3, 0, 1)
            moment.diagonal(dy, 1, 4).diagonal(dx, 1, 3).copy_(total)
            moment.diagonal(-dy, 1, 4).diagonal(-dx, 1, 3).copy_(total.transpose(0, 1))
    size = channels * p * q
    return moment.view(size, size)


def _ranges(count: int, entries: int, length: int) -> Tensor:
    """Ones at the entries ``k … k + length − 1`` of row k, zeros elsewhere: ``[count, entries]``."""
    return torch.ones(count, entries).triu().tril(length - 1)


def window_sum(x: Tensor, kernel: tuple[int, int], padding: Padding) -> Tensor:
    """Σ a over all windows of stride 1, ``[C · height · width]``."""
    p, q = kernel
    total = F.pad(x.sum(0), (*padding[1], *padding[0]))
    return total.unfold(1, total.shape[1] - p + 1, 1).unfold(2, total.shape[2] - q + 1, 1).sum((3, 4)).flatten()


def _padded_shape(x: Tensor, padding: Padding) -> tuple[int, int, int, int]:
    n, channels, height, width = x.shape
    return n, channels, height + sum(padding[0]), width + sum(padding[1])


WORTH = 8e6  # multiplications from which the work saved outweighs the many small operations; measured on a CPU


def worthwhile(x: Tensor, kernel: tuple[int, ...]) -> bool:
    """Whether the autocorrelation of a map ``[N, C, H, W]`` takes less time than its windows."""
    n, channels, height, width = x.shape
    p, q = kernel
    work = n * height * width * (channels * p * q) ** 2
    return min(p, q) > 1 and height >= 2 * p and width >= 2 * q and work >= WORTH
