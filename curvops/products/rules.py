"""Which way serves for which work: rules by shapes and counts. `make calibrate` prints the measurements behind them."""

from __future__ import annotations

from curvops.products.record import Recorder

FEW = 2  # data that a proof looks at
JOINED = 128  # data up to which small batches go together, after a proof
TOGETHER = 4  # columns from which it is asked whether they go together
CHUNK = 96  # columns that go together at most
LAYERED = 64  # columns of the dense Hessian up to which small layers go together
LARGEST_TANGENTS = 2**25  # entries that the results of all operations may have for the columns that go together
SMALL = 4_000_000  # multiplications and additions of a batch below which the operations' overhead rules
LARGEST_MATRIX = 4096  # parameters up to which a dense matrix may serve many columns
LARGEST_ROWS = 2**25  # entries that the rows Sᵀ J of some data may have
TRACED = 4  # times the memory of a batch's graph that it takes to make a program of its tangents
PART = 2**24  # entries, of rows and of what they are made with, that are squared together
FEW_ROWS = 2**20  # entries of rows that are read in no time
MADE = 200  # multiplications and additions that take as long as to write, arrange and read an entry of many rows


def matrix_pays(columns: int, parameters: int) -> bool:
    """Whether the dense matrix takes less than products with so many columns."""
    return columns >= TOGETHER and 4 * columns >= 3 * parameters and parameters <= LARGEST_MATRIX


def together_pays(columns: int, record: Recorder, jacobian: bool = False) -> bool:
    """Whether columns go together, rather than one by one over a batch's graph.

    Convolutions, norms and attention do so in larger batches, too, and still larger ones for products with J and Jᵀ:
    their second backward passes are dear.
    """
    dear = record.convolves or record.dear
    return columns >= TOGETHER and record.work <= ((64 if jacobian else 16) * SMALL if dear else SMALL)


def columns_together(entries: int, room: int | None) -> int:
    """How many columns go together where a batch's operations give so many entries, and there is room for so many.

    A column's tangents of the backward pass, too, take about as much as four of the results.
    """
    most = min(CHUNK, max(TOGETHER, LARGEST_TANGENTS // max(entries, 1)))
    return most if room is None else min(most, room // (4 * max(entries, 1)))


def rows_pay(columns: int, rows: int, parameters: int, data: int, work: int, matrix: bool = False) -> bool:
    """Whether the rows Sᵀ J of a batch and products with them take less than products over its graph.

    A product over the graph takes about 8 · work operations, where overhead rules as long as those of a small batch, or
    half of them if columns go together; one with the rows 4 · rows · parameters, of the ``matrix`` itself a fourth, as it
    is symmetric; and making the rows 4 · work for each of a datum's, or what it takes to write them. For the matrix they
    are made and squared a part at a time.
    """
    if columns < 2 or (rows * parameters > LARGEST_ROWS and not matrix):
        return False
    if work <= SMALL:
        # overhead rules: a batched backward pass for the rows of a datum against one for each column
        if rows <= columns or rows > 2 * data * columns:
            return rows <= columns
        if rows * parameters <= FEW_ROWS:
            return True
    made = max(4 * work * (rows // data), MADE * rows * parameters)
    one, least = (1, SMALL) if matrix else (4, SMALL // 2)
    return columns * one * rows * parameters + made < columns * 8 * max(work, least)


def pulls_pay(columns: int, rows: int, parameters: int, work: int) -> bool:
    """Whether the rows Sᵀ J of a batch, by a backward pass for each, take less than products one by one.

    A pass takes about 4 · work operations, half of a product over the graph, and a product with the rows 4 · rows ·
    parameters; where overhead rules, a product over the graph takes as long as that of so many operations.
    """
    if columns < 2 or rows > 2 * columns:
        return False
    return columns * 4 * rows * parameters + 4 * work * rows <= columns * 8 * max(work, SMALL)


def kept_rows_pay(rows: int, parameters: int, work: int) -> bool:
    """Whether the rows Sᵀ J of a batch are kept for many products instead of its graph.

    A product with one vector reads them twice, which takes as long as about five times as many operations of a graph.
    """
    size = rows * parameters
    return size <= LARGEST_ROWS and (size <= FEW_ROWS or 5 * size < work)


def jacobian_pays(columns: int, rows: int, parameters: int) -> bool:
    """Whether the rows of J of a batch, by `vmap` over its data, take less than so many products J v, or twice as many Jᵀ u.

    A few entries take next to nothing; of many, a row takes about half of a product.
    """
    size = rows * parameters
    return columns >= TOGETHER and size <= LARGEST_ROWS and rows <= (16 if size <= 4 * FEW_ROWS else 2) * columns


def forward_mode_pays(record: Recorder) -> bool:
    """Whether J v by forward mode takes less than by reverse over reverse, its proof included.

    That is so where convolutions dominate, whose second backward pass is dear.
    """
    return record.convolves and not record.dear and record.work > SMALL and record.size > 2 * FEW
