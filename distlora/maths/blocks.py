"""How much of a large tensor is worked on at a time.

Some computations need their tensor once more: in a wider dtype, as a product, or as its squares. They take it
in blocks, so that only one block of the copy is in memory. Each size below is a number of elements.
"""

from collections.abc import Iterator

#: Of the exact sum `W + left @ right` that is rounded to a stored weight: 16 MiB in float32.
SUM_ELEMENTS = 1 << 22

#: Of float32 numbers that are rounded at random. The hash of all elements would take more memory than a large
#: shard: it needs several int64 tensors, 8 MiB each for a block.
ROUNDING_ELEMENTS = 1 << 20

#: Of a matrix whose squares are summed: 2 MiB in float64.
SQUARES_ELEMENTS = 1 << 18

#: Of a weight whose row norms are taken: 16 MiB in float32, and a few kernel launches a layer.
NORM_ELEMENTS = 1 << 22

#: Of the logits over a vocabulary: 64 MiB in float32, of which two or three tensors are alive. With smaller
#: blocks the head's weight would be read too often.
LOGIT_ELEMENTS = 1 << 24

#: Of a layer's gradient in the probe: 8 MiB in float32. Three blocks are alive, two of them on their way to
#: the host.
GRADIENT_ELEMENTS = 1 << 21
#: Columns of such a block at most, so that the part of the input that is cast to float32 stays small for the
#: widest layers too.
GRADIENT_COLUMNS = 1 << 12


def rows_of_block(columns: int, elements: int) -> int:
    """The most rows of so many columns that have at most `elements` elements together; at least one row."""
    return max(1, elements // columns)


def row_blocks(rows: int, columns: int, elements: int) -> Iterator[slice]:
    """Slices of `rows_of_block` rows that cover all rows, in order. The last one may reach beyond them."""
    size = rows_of_block(columns, elements)
    return (slice(start, start + size) for start in range(0, rows, size))
