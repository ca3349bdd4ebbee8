"""What a worker thread does with one slab: read it from all inputs, measure it, combine it."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch

from nemo_warp.checkpoints.crc import crc32
from nemo_warp.checkpoints.logical import LogicalTensor
from nemo_warp.checkpoints.parts import Part
from nemo_warp.checkpoints.reading import FileCache, check_replicas, read_slab
from nemo_warp.checkpoints.slabs import Slab, rows_per_block
from nemo_warp.merge import loops
from nemo_warp.merge.plan import TensorPlan

_STORED = {
    **{torch.bfloat16: np.uint16, torch.float16: np.int16},
    **{torch.float32: np.float32, torch.float64: np.float64},
}
"""How `loops` take the elements of each dtype."""


@dataclass
class Measured:
    """A slab's first reading.

    Attributes:
        grams: [B, N, N] Gram matrices of (theta_init, delta_1 ..) over the slab's blocks.
        pieces: per input, CRC-32 of the slab's bytes in logical order, and how many they are.
        parts: per input, what was read.
    """

    grams: np.ndarray
    pieces: list[tuple[int, int]]
    parts: list[list[Part]]


@dataclass
class Combined:
    """A slab of all outputs.

    Attributes:
        rows: [K, rows, bytes] uint8, rounded; memory that the next slab reuses.
        projections: see `loops.combine`.
        changed: see `loops.combine`.
    """

    rows: np.ndarray
    projections: np.ndarray
    changed: np.ndarray


class Kernel:
    """One thread's working memory, and the arithmetic that uses it.

    Args:
        files: descriptors of the inputs, shared.
    """

    def __init__(self, files: FileCache):
        self._files = files
        self._memory: dict[str, np.ndarray] = {}

    def measure(self, tensor: TensorPlan, slab: Slab) -> Measured:
        """Read a slab for the first time.

        Raises:
            CheckpointError: a file ends early, or copies of a tensor differ.
        """
        inputs, parts, pieces = self._room(tensor, slab), [], []
        for source, rows in zip(tensor.sources, inputs, strict=True):
            read = read_slab(self._files, source, slab, rows)
            check_replicas(self._files, source, slab, rows)
            parts.append(read)
            in_order = len(read) == 1  # the stored bytes are those of the slab
            pieces.append((read[0].crc32 if in_order else crc32(rows), rows.nbytes))
        block, count = rows_per_block(tensor.target.cols), len(inputs)
        grams = np.empty((-(-slab.rows // block), count, count))
        tile = self._take("tile", (count, loops.TILE), np.float64)
        loops.gram(self._stacked(tensor, inputs), block * tensor.target.cols, tile, grams)
        return Measured(grams, pieces, parts)

    def combine(
        self, tensor: TensorPlan, slab: Slab, coefficients: np.ndarray, noise: np.ndarray | None
    ) -> Combined:
        """Read a slab again and merge it.

        Args:
            tensor: the slab's.
            slab: rows to merge.
            coefficients: [K + 1, N] over the inputs; the last row is the merged task vector.
            noise: None, or [K, length] uint16 for stochastic rounding.
        """
        rooms, count, dtype = self._room(tensor, slab), len(coefficients) - 1, tensor.target.dtype
        for source, rows in zip(tensor.sources, rooms, strict=True):
            read_slab(self._files, source, slab, rows, checked=False)
        inputs = self._stacked(tensor, rooms)
        out = self._take("out", (count, inputs.shape[1]), _STORED[dtype])
        tile = self._take("tile", (len(rooms) + 2, loops.TILE), np.float64)
        projections, changed = np.empty(count), np.empty(count, np.int64)
        loops.combine(inputs, coefficients, noise, tile, out, projections, changed)
        rows = out.view(np.uint8).reshape(count, slab.rows, -1)
        return Combined(rows, projections, changed)

    def read(self, source: LogicalTensor, slab: Slab) -> tuple[torch.Tensor, list[Part]]:
        """[rows, cols] of one input as they are stored, and what was read."""
        rows = self._take("inputs", (slab.rows, source.row_bytes), np.uint8)
        parts = read_slab(self._files, source, slab, rows)
        return torch.from_numpy(rows).view(source.dtype), parts

    def _room(self, tensor: TensorPlan, slab: Slab) -> list[np.ndarray]:
        """Per input, [rows, bytes] to read the slab into; equally far apart."""
        lines = [source.row_bytes for source in tensor.sources]
        whole = self._take("inputs", (len(lines), slab.rows * max(lines)), np.uint8)
        return [
            row[: slab.rows * line].reshape(slab.rows, line)
            for row, line in zip(whole, lines, strict=True)
        ]

    def _stacked(self, tensor: TensorPlan, rooms: list[np.ndarray]) -> np.ndarray:
        """[N, length] elements of all inputs, in one dtype that holds them exactly."""
        dtypes = [source.dtype for source in tensor.sources]
        if len(set(dtypes)) == 1:
            shape = (len(rooms), rooms[0].size)
            return self._take("inputs", shape, np.uint8).view(_STORED[dtypes[0]])
        wide = np.float64 if torch.float64 in dtypes else np.float32
        inputs = self._take("wide", (len(rooms), rooms[0].size // dtypes[0].itemsize), wide)
        for row, room, dtype in zip(inputs, rooms, dtypes, strict=True):
            torch.from_numpy(row).copy_(torch.from_numpy(room).view(dtype).flatten())
        return inputs

    def _take(self, name: str, shape: tuple[int, ...], dtype) -> np.ndarray:
        """Uninitialised memory, valid until the next of this name is taken."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if name not in self._memory or self._memory[name].nbytes < size:
            self._memory[name] = np.empty(size, np.uint8)
        return self._memory[name][:size].view(dtype).reshape(shape)


def rounding_noise(seed: int, name: str, eta: float, start: int, length: int) -> np.ndarray:
    """[length] uint16 random bits of one slab: a function of the seed and the slab's place."""
    text = f"{seed}/{name}/{eta!r}/{start}".encode()
    key = int.from_bytes(hashlib.sha256(text).digest()[:16], "little")
    generator = np.random.Generator(np.random.Philox(key=key))
    return generator.integers(0, 1 << 16, size=length, dtype=np.uint16)
