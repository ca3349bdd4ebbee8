"""Tensors made of rows of others, in portions: memory does not depend on the model's size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.families.tensors import Joined
from nemo_warp.checkpoints.io.direct import pages
from nemo_warp.checkpoints.io.parts import Part
from nemo_warp.checkpoints.io.reading import (
    FileCache,
    check_records,
    check_replicas,
    read_slab,
    slab_room,
)
from nemo_warp.checkpoints.io.slabs import Slab
from nemo_warp.checkpoints.logical import LogicalTensor

PORTION_BYTES = 16 << 20
"""What is read and written at a time, about."""


class Rows:
    """Reads joined tensors from the tensors of a checkpoint, and checks all that it read.

    Args:
        tensors: name, as the runs call it -> tensor.
        files: to read from.
    """

    def __init__(self, tensors: Mapping[str, LogicalTensor], files: FileCache):
        self._tensors, self._files = tensors, files
        self._parts: list[Part] = []

    def portions(self, joined: Joined) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, [rows, bytes] uint8) of a joined tensor, in order.

        Raises:
            CheckpointError: a file ends early, or copies of a tensor differ.
        """
        row, width = 0, self._width(joined)
        step = max(1, PORTION_BYTES // width)
        waiting: list[np.ndarray] = []
        for run in joined.runs:
            for first in range(run.first, run.first + run.rows, step):
                last = min(first + step, run.first + run.rows)
                waiting.append(self._read(run.name, Slab(first, last)))
                # Runs may be a few rows each (one key head of a group): they are put together, so
                # that a tensor is not stored as thousands of shards.
                if sum(len(piece) for piece in waiting) >= step:
                    yield row, _joined(waiting)
                    row, waiting = row + sum(len(piece) for piece in waiting), []
        if waiting:
            yield row, _joined(waiting)

    def check(self) -> None:
        """Compare CRC-32s of everything that was read with what the files state.

        Raises:
            CheckpointError: names the tensor and file.
        """
        check_records(self._files, self._tensors.values(), self._parts)

    def _width(self, joined: Joined) -> int:
        return self._tensors[joined.runs[0].name].row_bytes

    def _read(self, name: str, slab: Slab) -> np.ndarray:
        tensor = self._tensors[name]
        found, parts = read_slab(self._files, tensor, slab, pages(slab_room(tensor, slab)))
        check_replicas(self._files, tensor, slab, found)
        self._parts += parts
        return found


def check_complete(
    joined: list[Joined], tensors: Mapping[str, LogicalTensor], where: str, padded: frozenset[str]
) -> None:
    """Raise unless a checkpoint holds exactly the tensors that are joined, in one dtype each.

    Args:
        joined: all tensors that will be made.
        tensors: what there is.
        where: the checkpoint's name for messages.
        padded: tensors that may have more rows than are used.

    Raises:
        CheckpointError: names the tensor; missing, of another shape, or not used.
    """
    needed: dict[str, tuple[int, tuple[int, ...]]] = {}
    for one in joined:
        for run in one.runs:
            # All rows of a tensor have to be used, and once: a table with a hole would lose
            # weights.
            rows = needed.get(run.name, (0, ()))[0] + run.rows
            needed[run.name] = (rows, one.shape[1:])
    for name, (rows, cols) in needed.items():
        if name not in tensors:
            raise CheckpointError(f"{where} lacks {name}, which its configuration asks for")
        shape = tensors[name].shape
        fits = shape[:1] == (rows,) or (name in padded and shape[0] > rows)
        if not fits or shape[1:] != cols:
            raise CheckpointError(
                f"{where}: {name} has shape {list(shape)}, its configuration says {[rows, *cols]}"
            )
    for name in tensors:
        if name not in needed:
            raise CheckpointError(f"{where} holds {name}, which nobody maps for this family")
    for one in joined:
        if len({tensors[run.name].dtype for run in one.runs}) > 1:
            raise CheckpointError(
                f"{where}: {one.runs[0].name} and {one.runs[1].name} differ in dtype"
            )


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def nbytes(joined: Joined, tensors: Mapping[str, LogicalTensor]) -> int:
    """Size of a joined tensor."""
    return math.prod(joined.shape) * tensors[joined.runs[0].name].dtype.itemsize
