"""Cut merged rows into pieces, and put each where every output has it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from nemo_warp.checkpoints.io.direct import ALIGNMENT, room_for, whole_pages
from nemo_warp.checkpoints.io.parts import Part
from nemo_warp.checkpoints.io.slabs import SLAB, Slab, slabs_of
from nemo_warp.checkpoints.logical import LogicalTensor, Patch
from nemo_warp.merge.compute.memory import Memory
from nemo_warp.merge.publish.output import Output

THREADS = 24
"""They do nothing but write: a disk is as fast as it has requests to choose from."""

PIECE_BYTES = 8 << 20
"""A piece of all outputs, about: what is in memory does not depend on their number."""

WAITING_PIECES = 4
"""Pieces on their way to disk beside those that the workers merge."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a tensor in logical order.

    Attributes:
        skip: elements between the beginning of a page and the piece's place in the outputs.
    """

    start: int
    stop: int
    skip: int = 0

    @property
    def length(self) -> int:
        """How many elements."""
        return self.stop - self.start

    def within(self, room: np.ndarray, outputs: int, width: int) -> np.ndarray:
        """[outputs, bytes] uint8, where elements of ``width`` bytes go in `Writer.room`."""
        begin = self.skip * width
        return room.reshape(outputs, -1)[:, begin : begin + self.length * width]


class Writer:
    """Writes to all outputs at once, while the next pieces are merged.

    Args:
        outputs: one per eta; all have the same layout.
        workers: threads that merge.
        progress: called with a number of bytes written, from any thread.
    """

    def __init__(self, outputs: list[Output], workers: int, progress: Callable[[int], Any]):
        self._outputs, self._progress = outputs, progress
        self._pool = ThreadPoolExecutor(THREADS, "write")
        room = PIECE_BYTES + len(outputs) * ALIGNMENT
        self._memory = Memory((workers + WAITING_PIECES) * room)

    def close(self) -> None:
        """Stop the threads."""
        self._memory.close()
        self._pool.shutdown(cancel_futures=True)

    def pieces(self, target: LogicalTensor, slab: Slab) -> Iterator[Piece]:
        """Pieces of about `PIECE_BYTES` in order.

        Whole rows where the outputs split the tensor by columns. Elsewhere a slab is cut where a
        page of the outputs ends: a page that two pieces share goes through the page cache.
        """
        width, cols, length = target.dtype.itemsize, target.cols, self._length(target)
        if not all(patch.cols == cols for patch in _all_patches(target)):
            # Column patches: every row of a piece goes to as many places as there are tensor ranks.
            for rows in slabs_of(slab.first, slab.last, cols, length):
                yield Piece(rows.first * cols, rows.last * cols)
            return
        start, end, skip = slab.first * cols, slab.last * cols, self._skip(target, slab.first)
        while start < end:
            fits = (skip + end - start) * width <= self._room(target)
            stop = end if fits else start + length - skip
            yield Piece(start, stop, skip)
            start, skip = stop, 0

    def _length(self, target: LogicalTensor) -> int:
        """Elements of a piece, about; whole pages."""
        width = target.dtype.itemsize
        page = ALIGNMENT // width
        return max(page, min(SLAB, PIECE_BYTES // width // len(self._outputs)) // page * page)

    def _room(self, target: LogicalTensor) -> int:
        """Bytes per output for a piece, from the beginning of its first page on."""
        return room_for(self._length(target) * target.dtype.itemsize)

    def _skip(self, target: LogicalTensor, row: int) -> int:
        """Elements between the beginning of a page and a row's place in the outputs."""
        width = target.dtype.itemsize
        # All outputs have the init's layout, so the first output's offsets are those of all.
        patch = next(p for p in target.patches if p.row <= row < p.row + p.rows)
        place = self._outputs[0].place(patch.record, patch.start_of(row, width))
        return place % ALIGNMENT // width

    def room(self, target: LogicalTensor, piece: Piece) -> np.ndarray:
        """[K * n] uint8 to merge a piece into, for `write`; waits until there is some."""
        needed = whole_pages((piece.skip + piece.length) * target.dtype.itemsize)
        size = max(needed, self._room(target))  # one size, so that it is used again
        return self._memory.take(len(self._outputs) * size)

    def write(
        self, target: LogicalTensor, piece: Piece, values: np.ndarray, room: np.ndarray
    ) -> list[Future[list[Part]]]:
        """Start to write a piece.

        Args:
            target: the piece's tensor.
            piece: which.
            values: [K, bytes] uint8, its elements.
            room: holds the values, is given back when they are written.

        Returns:
            Per output, the parts written; raises OSError as from `os.pwrite`.
        """

        def write(output: Output, of_output: np.ndarray) -> list[Part]:
            patches = _all_patches(target)
            written = [_write_patch(output, target, patch, piece, of_output) for patch in patches]
            self._progress(of_output.nbytes)
            return [part for part in written if part is not None]

        ended = itertools.count(1)

        def end(_: Future) -> None:
            # Callbacks run in writer threads; itertools.count is atomic under the GIL.
            if next(ended) == len(self._outputs):
                self._memory.give(room)

        outputs = zip(self._outputs, values, strict=True)
        started = [self._pool.submit(write, *one) for one in outputs]
        for one in started:
            one.add_done_callback(end)
        return started


def _all_patches(target: LogicalTensor) -> Iterator[Patch]:
    return chain(target.patches, *target.replicas)


def _write_patch(
    output: Output, target: LogicalTensor, patch: Patch, piece: Piece, values: np.ndarray
) -> Part | None:
    """Write what a piece and a patch have in common."""
    width, cols = target.dtype.itemsize, target.cols
    start = max(piece.start, patch.row * cols)
    stop = min(piece.stop, (patch.row + patch.rows) * cols)
    if start >= stop:
        return None
    data = values[(start - piece.start) * width : (stop - piece.start) * width]
    row, within = divmod(start, cols)
    if patch.cols < cols:  # pieces are whole rows then
        window = data.reshape(-1, cols * width)
        left = patch.col * width
        data = np.ascontiguousarray(window[:, left : left + patch.cols * width]).reshape(-1)
    return output.write(patch.record, patch.start_of(row, width) + within * width, data)
