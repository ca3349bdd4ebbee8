"""Blocks and slabs: the pieces in which tensors are summed up and read.

A tensor [rows, cols] is cut into blocks of rows that depend on its logical shape alone. Sums are
taken over blocks, so an element is always added up with the same others in the same order,
whatever the layout of the files, the number of workers and the order of the work. A slab is some
blocks that are read and written together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BLOCK = 1 << 14
"""Elements per block, about: whole rows, at least one."""

SLAB = 1 << 22
"""Elements per slab, about: enough for what Python does per task to be 0.1 ns of each."""


@dataclass(frozen=True)
class Slab:
    """Rows [first, last) of a tensor."""

    first: int
    last: int

    @property
    def rows(self) -> int:
        """How many rows."""
        return self.last - self.first


def rows_per_block(cols: int) -> int:
    """Rows of ``cols`` elements in a block."""
    # A row is never cut, whatever its length: an embedding of 8192 has 2 rows in a block.
    return max(1, BLOCK // cols)


def slabs_of(first: int, last: int, cols: int, elements: int | None = None) -> Iterator[Slab]:
    """Slabs of rows [first, last) of a tensor with rows of ``cols`` elements, in order.

    Args:
        elements: per slab, about; `SLAB` by default.
    """
    block = rows_per_block(cols)
    # A multiple of whole blocks, so that the size of slabs cannot change a sum.
    step = max(1, (elements or SLAB) // (block * cols)) * block
    for row in range(first, last, step):
        yield Slab(row, min(last, row + step))
