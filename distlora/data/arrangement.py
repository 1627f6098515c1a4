"""How the samples of a step become the micro-batches of all ranks: as they come, by length, or several in a
row. All ways train the same samples in a step, and differ in how much padding there is.

Each is a function of the samples' lengths alone, so that every rank knows the micro-batches of all ranks, and
a resumed run makes those that it would have made.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distlora.data.batches import micro_batches

#: Places of samples in their global batch, a list for each row of a micro-batch.
Rows = list[list[int]]


@dataclass(frozen=True)
class Arrangement:
    """ranks: for each rank its micro-batches, equally many; one without rows has weight zero."""

    ranks: list[list[Rows]]

    def padding(self, lengths: Sequence[int]) -> float:
        """The share of padding in the rows of all micro-batches, each of which is as wide as its longest row.

        lengths: of the samples of the global batch, in tokens.
        """
        cells = 0
        for rows in (rows for passes in self.ranks for rows in passes):
            cells += len(rows) * max((sum(lengths[place] for place in row) for row in rows), default=0)
        return 1 - sum(lengths) / cells


def one_by_one(count: int, world_size: int, micro_batch_size: int, accumulation: int) -> Arrangement:
    """`count` samples in their order, each in a row of its own: see `micro_batches`."""
    ranks = (
        micro_batches(range(count), rank, world_size, micro_batch_size, accumulation)
        for rank in range(world_size)
    )
    return Arrangement([[[[place] for place in part] for part in passes] for passes in ranks])


def by_length(lengths: Sequence[int], world_size: int, micro_batch_size: int) -> Arrangement:
    """The longest samples first, each in a row of its own: what is long is padded with what is long, and the
    ranks do passes of like length at the same time. Ranks take turns at the longest.
    """
    order = longest_first(lengths)
    parts = [
        [[place] for place in order[start : start + micro_batch_size]]
        for start in range(0, len(order), micro_batch_size)
    ]
    passes = -(-len(parts) // world_size)
    parts += [[]] * (passes * world_size - len(parts))
    return Arrangement(
        [
            [parts[number * world_size + (rank + number) % world_size] for number in range(passes)]
            for rank in range(world_size)
        ]
    )


def packed(lengths: Sequence[int], capacity: int, world_size: int, micro_batch_size: int) -> Arrangement:
    """Rows of whole samples, of at most `capacity` tokens, in micro-batches of at most `micro_batch_size`
    rows. No rank has more rows than an even share, rounded up, and their numbers of tokens are as even as
    that allows. There are never more micro-batches than with one sample a row.

    Raises ValueError for a sample that is longer than a row.
    """
    rows = first_fit(lengths, capacity)
    if world_size > 1:  # as many rows as the ranks need between them anyway, and alike in length
        rows = _levelled(lengths, capacity, -(-len(rows) // world_size) * world_size) or rows
    shares = _dealt(rows, lengths, world_size)
    most = max(map(len, shares))
    passes = -(-most // micro_batch_size)
    size = -(-most // passes)
    return Arrangement(
        [[share[size * number : size * (number + 1)] for number in range(passes)] for share in shares]
    )


def first_fit(lengths: Sequence[int], capacity: int) -> Rows:
    """First-fit decreasing: the longest sample that is left goes into the first row with room for it. That
    takes at most 11/9 of the fewest rows that there could be, and 6/9 of a row more (Dósa, 2007).
    """
    if max(lengths) > capacity:
        raise ValueError(f"a sample of {max(lengths)} tokens does not fit into a row of {capacity}")
    room, rows = np.full(len(lengths), capacity), [[] for _ in lengths]
    for place in longest_first(lengths):
        row = int(np.argmax(room >= lengths[place]))
        room[row] -= lengths[place]
        rows[row].append(place)
    return [row for row in rows if row]


def _levelled(lengths: Sequence[int], capacity: int, count: int) -> Rows | None:
    """At most `count` rows: the longest sample that is left goes into the shortest row. None where a sample
    does not fit so.
    """
    rows: Rows = [[] for _ in range(count)]
    filled = [(0, number) for number in range(count)]
    for place in longest_first(lengths):
        tokens, number = filled[0]
        if tokens + lengths[place] > capacity:
            return None
        heapq.heapreplace(filled, (tokens + lengths[place], number))
        rows[number].append(place)
    return [row for row in rows if row]


def _dealt(rows: Rows, lengths: Sequence[int], world_size: int) -> list[Rows]:
    """A share for each rank: the longest row that is left goes to the rank with the fewest tokens of those
    that may have one more.
    """
    sizes = [sum(lengths[place] for place in row) for row in rows]
    most = -(-len(rows) // world_size)
    shares: list[Rows] = [[] for _ in range(world_size)]
    tokens = [0] * world_size
    for number in longest_first(sizes):
        rank = min((r for r in range(world_size) if len(shares[r]) < most), key=lambda r: tokens[r])
        shares[rank].append(rows[number])
        tokens[rank] += sizes[number]
    return shares


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Places in falling order of length; equal ones in theirs."""
    return sorted(range(len(lengths)), key=lambda place: -lengths[place])
