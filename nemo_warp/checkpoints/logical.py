"""What a checkpoint is to the merger: named logical tensors, tiled by byte ranges on disk.

Whatever the format and the parallel layout, a tensor is a row-major matrix [rows, cols] (leading
axes flattened into rows), one per layer, and each stored shard is one or more `Patch`es of it:
rectangles whose bytes lie contiguous in one `Record`. Readers produce these descriptions, the
output is described by the same classes, and nothing else knows about formats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

from nemo_warp.checkpoints.dtypes import Dtype
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.record import Record


@dataclass(frozen=True)
class Patch:
    """Rectangle [row : row + rows, col : col + cols] of a tensor, ``start`` bytes into a record."""

    row: int
    col: int
    rows: int
    cols: int
    record: Record
    start: int

    def start_of(self, row: int, itemsize: int) -> int:
        """Where a row of the tensor begins in the record, in bytes."""
        return self.start + (row - self.row) * self.cols * itemsize


@dataclass(frozen=True)
class LogicalTensor:
    """One tensor of one layer, complete over all shards.

    Attributes:
        name: canonical name without wrapper prefixes, with the global layer number.
        shape: logical shape, without the axis over layers.
        patches: they tile [rows, cols] exactly.
        replicas: further copies that must be equal, each tiling the tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Dtype
    patches: tuple[Patch, ...]
    replicas: tuple[tuple[Patch, ...], ...] = field(default=(), compare=False)

    @property
    def cols(self) -> int:
        """Length of the last axis; 1 for vectors, so that they can be sharded by rows."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def rows(self) -> int:
        """Product of all other axes."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Size of a row in bytes at the stored dtype."""
        return self.cols * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Size in bytes at the stored dtype."""
        return self.numel * self.dtype.itemsize


def patches_of_block(
    shape: tuple[int, ...],
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    record: Record,
    start: int,
    itemsize: int,
) -> Iterator[Patch]:
    """Rectangles of the block [offsets, offsets + sizes) stored row-major at ``start``.

    Axes of the block that span the whole tensor stay joined, so an unsharded tensor or one
    sharded on its first axis is a single patch.
    """
    if len(shape) < 2:
        yield Patch(offsets[0] if shape else 0, 0, math.prod(sizes), 1, record, start)
        return
    inner = len(shape) - 2  # the leftmost axis that still varies within one rectangle
    # Megatron's usual shards, cut on one axis, become one rectangle, or as many as there are rows
    # in front of that axis.
    while inner > 0 and sizes[inner] == shape[inner]:
        inner -= 1
    row_strides = [math.prod(shape[axis + 1 : -1]) for axis in range(len(shape) - 1)]
    rows, cols = sizes[inner] * row_strides[inner], sizes[-1]
    for index in product(*(range(size) for size in sizes[:inner])):
        corner = (*index, 0)
        row = sum((offsets[axis] + corner[axis]) * row_strides[axis] for axis in range(inner + 1))
        yield Patch(row, offsets[-1], rows, cols, record, start)
        start += rows * cols * itemsize


def check_tiling(tensor: LogicalTensor, patches: tuple[Patch, ...], where: str) -> None:
    """Raise unless the patches lie inside the tensor, in their records, and cover it exactly once.

    Raises:
        CheckpointError: names the tensor and the checkpoint.
    """
    covered = 0
    for patch in patches:
        end = patch.start + patch.rows * patch.cols * tensor.dtype.itemsize
        inside = min(patch.row, patch.col) >= 0 and min(patch.rows, patch.cols) > 0
        inside &= patch.row + patch.rows <= tensor.rows and patch.col + patch.cols <= tensor.cols
        if not inside or patch.start < 0 or end > patch.record.size:
            raise CheckpointError(
                f"{where}: a shard of {tensor.name} lies outside the tensor {list(tensor.shape)} "
                f"or its file {patch.record.path.name}; the checkpoint is damaged"
            )
        covered += patch.rows * patch.cols
    # Equal areas and no overlap: together they mean that every element is there once. In the Gram
    # matrix an element counted twice would change the angle without any error.
    if covered != tensor.numel or _overlap(patches):
        raise CheckpointError(
            f"{where}: the shards of {tensor.name} cover {covered} of {tensor.numel} elements "
            "or overlap; the checkpoint is incomplete or damaged"
        )


def _overlap(patches: tuple[Patch, ...]) -> bool:
    """Whether two patches share an element: a sweep over rows with the column spans in force."""
    # Ends (0) sort before beginnings (1) of the same row, so neighbours do not overlap.
    events = sorted(
        [(p.row, 1, p.col, p.col + p.cols) for p in patches]
        + [(p.row + p.rows, 0, p.col, p.col + p.cols) for p in patches]
    )
    active: list[tuple[int, int]] = []
    for _, starts, left, right in events:
        if not starts:
            active.remove((left, right))
            continue
        if any(left < other_right and other_left < right for other_left, other_right in active):
            return True
        active.append((left, right))
    return False
