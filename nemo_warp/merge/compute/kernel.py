"""What a worker thread does with one slab: read it from all inputs, measure it, combine it."""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass

import numpy as np

from nemo_warp.checkpoints.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Dtype
from nemo_warp.checkpoints.io.crc import crc32
from nemo_warp.checkpoints.io.direct import address, pages, room_for, scratch
from nemo_warp.checkpoints.io.parts import Part
from nemo_warp.checkpoints.io.reading import FileCache, check_replicas, read_slab, slab_room
from nemo_warp.checkpoints.io.slabs import Slab, rows_per_block
from nemo_warp.checkpoints.logical import LogicalTensor
from nemo_warp.merge.compute import loops
from nemo_warp.merge.compute.writer import Piece
from nemo_warp.merge.plan import TensorPlan

_STORED = {
    **{BFLOAT16: np.uint16, FLOAT16: np.int16},
    **{FLOAT32: np.float32, FLOAT64: np.float64},
}
"""How `loops` take the elements of each dtype."""

_NOISE_PER_STEP = 16
"""Random uint16 per step of Philox's counter: four words of 64 bits."""


@dataclass
class Inputs:
    """A slab of all inputs in memory.

    Attributes:
        slab: which.
        buffer: [`room_bytes`] uint8 that holds it.
        elements: [N, ...] the buffer as stored elements of one dtype.
        first: [N] int64, where the slab begins in each row.
    """

    slab: Slab
    buffer: np.ndarray
    elements: np.ndarray
    first: np.ndarray


@dataclass
class Measured:
    """What the first reading of a slab finds.

    Attributes:
        inputs: the slab; None once its memory was given back.
        grams: [B, N, N] Gram matrices of (theta_init, delta_1 ..) over the slab's blocks.
        pieces: per input, CRC-32 of the slab's bytes in logical order, and how many they are.
        parts: per input, what was read.
    """

    inputs: Inputs | None
    grams: np.ndarray
    pieces: list[tuple[int, int]]
    parts: list[list[Part]]


@dataclass
class Combined:
    """A merged piece of all outputs.

    Attributes:
        values: [K, bytes] uint8, rounded.
        projections: see `loops.combine`.
        changed: see `loops.combine`.
    """

    values: np.ndarray
    projections: np.ndarray
    changed: np.ndarray


class Kernel:
    """Reads slabs and does the arithmetic; threads may share it.

    Args:
        files: of the inputs.
    """

    def __init__(self, files: FileCache):
        self._files = files

    def measure(self, tensor: TensorPlan, slab: Slab, buffer: np.ndarray) -> Measured:
        """Read a slab.

        Args:
            tensor: the slab's.
            slab: rows to read.
            buffer: [`room_bytes`] uint8 from `pages`, to read into.

        Raises:
            CheckpointError: a file ends early, or copies of a tensor differ.
        """
        # Inputs of one dtype stay as they are stored, and are widened tile by tile in `loops`: half
        # the memory of fp32 copies, and less to move.
        dtype, count = _common_dtype(tensor), len(tensor.sources)
        elements = buffer.view(_STORED[dtype]).reshape(count, -1)
        first, parts, pieces = np.zeros(count, np.int64), [], []
        for n, source in enumerate(tensor.sources):
            here = source.dtype == dtype
            size = slab_room(source, slab)
            room = buffer.reshape(count, -1)[n] if here else scratch("narrow", size)
            rows, read = read_slab(self._files, source, slab, room)
            check_replicas(self._files, source, slab, rows)
            parts.append(read)
            in_order = len(read) == 1  # the stored bytes are those of the slab
            # Its CRC-32 is known from reading; rows that were put together from patches need one of
            # their own.
            pieces.append((read[0].crc32 if in_order else crc32(rows), rows.nbytes))
            if here:
                first[n] = _settle(rows, room, dtype.itemsize) // dtype.itemsize
            else:
                values = numbers(rows, source.dtype).reshape(-1)
                with np.errstate(invalid="ignore"):  # a NaN is refused when its row was measured
                    elements[n, : len(values)] = values
        inputs = Inputs(slab, buffer, elements, first)
        return Measured(inputs, self._gram(tensor, inputs), pieces, parts)

    def _gram(self, tensor: TensorPlan, inputs: Inputs) -> np.ndarray:
        block, count = rows_per_block(tensor.target.cols), len(tensor.sources)
        grams = np.empty((-(-inputs.slab.rows // block), count, count))
        tile = scratch("tile", count * loops.TILE * 8).view(np.float64)
        cut = inputs.slab.rows * tensor.target.cols, block * tensor.target.cols
        loops.gram(inputs.elements, inputs.first, *cut, tile.reshape(count, -1), grams)
        return grams

    def combine(
        self,
        tensor: TensorPlan,
        piece: Piece,
        inputs: Inputs,
        coefficients: np.ndarray,
        noise: np.ndarray | None,
        room: np.ndarray,
    ) -> Combined:
        """Merge a piece.

        Args:
            tensor: its tensor.
            piece: what to merge, and where in a page the result goes.
            inputs: a slab that has it.
            coefficients: [K + 1, N] over the inputs; the last row is the merged task vector.
            noise: None, or [K, length] uint16 for stochastic rounding.
            room: [K * n] uint8 for the result.
        """
        dtype, count, length = tensor.target.dtype, len(coefficients) - 1, piece.length
        out = room.view(_STORED[dtype]).reshape(count, -1)
        tile = scratch("tile", (len(inputs.first) + 2) * loops.TILE * 8).view(np.float64)
        projections, changed = np.empty(count), np.empty(count, np.int64)
        start = inputs.first + (piece.start - inputs.slab.first * tensor.target.cols)
        loops.combine(
            *(inputs.elements, start, coefficients, noise, tile.reshape(-1, loops.TILE)),
            *(out, piece.skip, length, projections, changed),
        )
        return Combined(piece.within(room, count, dtype.itemsize), projections, changed)

    def read(self, source: LogicalTensor, slab: Slab) -> tuple[np.ndarray, list[Part]]:
        """[rows, bytes] uint8 of one input as they are stored, and what was read."""
        return read_slab(self._files, source, slab, pages(slab_room(source, slab)))


def room_bytes(tensor: TensorPlan, slab: Slab) -> int:
    """Bytes that a slab of all inputs takes in memory, as elements of one dtype."""
    size = slab.rows * tensor.target.cols * _common_dtype(tensor).itemsize
    return len(tensor.sources) * room_for(size)


def _common_dtype(tensor: TensorPlan) -> Dtype:
    """One that holds the elements of all inputs exactly."""
    # float32 holds every bfloat16 and float16 exactly; one dtype for both halves would not.
    dtypes = {source.dtype for source in tensor.sources}
    if len(dtypes) == 1:
        return dtypes.pop()
    return FLOAT64 if FLOAT64 in dtypes else FLOAT32


def numbers(stored: np.ndarray, dtype: Dtype) -> np.ndarray:
    """The values of stored elements [..., bytes] uint8, exactly; bfloat16 as float32."""
    if dtype == BFLOAT16:  # the upper half of a float32
        return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return stored.view(np.float16 if dtype == FLOAT16 else _STORED[dtype])


def converted(stored: np.ndarray, dtype: Dtype, wanted: Dtype) -> np.ndarray:
    """Stored elements [..., bytes] uint8 of ``dtype`` as those of ``wanted``, rounded like torch's.

    Args:
        wanted: ``dtype`` itself, float32 or bfloat16.
    """
    if dtype == wanted:
        return stored
    with np.errstate(all="ignore"):  # padding may be anything
        values = numbers(stored, dtype).astype(np.float32)
    if wanted == FLOAT32:
        return values.view(np.uint8)
    assert wanted == BFLOAT16, wanted
    bits = values.view(np.uint32)
    # Half of the last place less one, and one more if that place is odd: ties go to even.
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16).view(np.uint8)


def _settle(rows: np.ndarray, room: np.ndarray, width: int) -> int:
    """Where ``rows`` begin in ``room``, moved to its start if elements lie across their places.

    They do where a writer put items of odd length one after the other (torch's DCP). numpy would
    make a copy on the way, because source and target overlap.
    """
    start, place = address(room), address(rows)
    if (place - start) % width == 0:
        return place - start
    ctypes.memmove(start, place, rows.nbytes)
    return 0


def rounding_noise(seed: int, name: str, eta: float, start: int, length: int) -> np.ndarray:
    """[length] uint16 random bits for a tensor's elements from ``start`` on.

    A function of the seed and each element's place alone.
    """
    text = f"{seed}/{name}/{eta!r}".encode()
    # Philox is a counter: the bits of element n can be computed without those before it, so any
    # split into pieces and threads draws the same.
    key = int.from_bytes(hashlib.sha256(text).digest()[:16], "little")
    skip = start % _NOISE_PER_STEP
    steps = -(-(skip + length) // _NOISE_PER_STEP)
    words = np.random.Philox(key=key).advance(start // _NOISE_PER_STEP).random_raw(4 * steps)
    return words.view(np.uint16)[skip : skip + length]
