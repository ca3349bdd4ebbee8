"""The canonical order of a tensor's elements, in which everything is reduced and rounded.

A tensor [rows, cols] is cut into blocks of at most `BLOCK` elements that depend on its logical
shape alone: whole rows, or parts of a row longer than a block. Every block is copied into scratch
of one fixed size before anything is computed, so an element always meets the same instructions,
whatever the layout of the inputs, the number of workers and the order of the work. Blocks are
handed out in slabs of whole rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BLOCK = 1 << 15
"""Elements per block: the float64 scratch of three models (768 KiB) stays in a core's cache."""

SLAB = 1 << 19
"""Elements per slab, about: enough to make a task and a write worth their overhead."""


@dataclass(frozen=True)
class Slab:
    """Rows [first, last) of a tensor."""

    first: int
    last: int


def slabs_of(rows: int, cols: int) -> Iterator[Slab]:
    """Slabs of a tensor's first ``rows`` rows, in order."""
    per_block = max(1, BLOCK // cols)
    per_slab = max(1, SLAB // (cols * per_block)) * per_block
    for first in range(0, rows, per_slab):
        yield Slab(first, min(rows, first + per_slab))


def blocks_of(slab: Slab, cols: int) -> Iterator[tuple[int, int]]:
    """(start, stop) element ranges of the slab's blocks, relative to the slab, in order."""
    if cols > BLOCK:
        for row in range(slab.last - slab.first):
            for start in range(0, cols, BLOCK):
                yield row * cols + start, row * cols + min(cols, start + BLOCK)
        return
    size, total = BLOCK // cols * cols, (slab.last - slab.first) * cols
    for start in range(0, total, size):
        yield start, min(total, start + size)
