"""Read rows of tensors in logical order, and check the CRC-32 of what was read.

Rows come slab by slab and from several threads; the CRC-32s of their parts are put together
afterwards (`check_records`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.io.crc import crc32
from nemo_warp.checkpoints.io.direct import pages, room_for, scratch
from nemo_warp.checkpoints.io.open_files import OpenFiles
from nemo_warp.checkpoints.io.parts import Checksums, Part
from nemo_warp.checkpoints.io.slabs import Slab
from nemo_warp.checkpoints.logical import LogicalTensor, Patch
from nemo_warp.checkpoints.record import Record

_PIECE = 1 << 20


class FileCache:
    """The inputs' files, shared by threads, and which of their records were checked."""

    def __init__(self) -> None:
        self._files = OpenFiles(os.O_RDONLY)
        self._lock = threading.Lock()
        self._whole: set[Record] = set()

    def __enter__(self) -> FileCache:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._files.close()

    def read(self, record: Record, start: int, size: int, room: np.ndarray) -> np.ndarray:
        """Read ``size`` bytes from byte ``start`` of the record on.

        Args:
            room: [`room_for` (size)] uint8 from `pages`.

        Returns:
            The part of ``room`` that holds them.

        Raises:
            CheckpointError: the file ends early.
        """
        offset = record.offset + start
        with self._files.use(record.path) as file:
            found = file.read(room, size, offset)
        if len(found) < size:
            raise CheckpointError(f"{record.path} ends at {offset + len(found)}; it was truncated")
        return found

    def check_whole(self, record: Record, name: str) -> None:
        """Check a record's CRC-32 in a read of its own, once.

        Raises:
            CheckpointError: it does not match; names the tensor and file.
        """
        with self._lock:
            if record.crc32 is None or record in self._whole:
                return
            # Before the read: other threads with a tensor of the same record need not wait for it.
            self._whole.add(record)
        # 1 MiB at a time, since a record may be larger than the memory that is left.
        crc, room = 0, scratch("check", room_for(_PIECE))
        for start in range(0, record.size, _PIECE):
            crc = crc32(self.read(record, start, min(_PIECE, record.size - start), room), crc)
        _check_crc(crc, record, name)


def read_slab(
    files: FileCache, tensor: LogicalTensor, slab: Slab, room: np.ndarray
) -> tuple[np.ndarray, list[Part]]:
    """Read rows of a tensor.

    Args:
        files: to read from.
        tensor: what is read.
        slab: which of its rows.
        room: [`slab_room`] uint8 from `pages`.

    Returns:
        The part of ``room`` that holds them in logical order, [slab.rows, tensor.row_bytes] uint8,
        and what was read, for `check_records`.

    Raises:
        CheckpointError: a file ends early.
    """
    for patch in tensor.patches:
        below = patch.row <= slab.first and slab.last <= patch.row + patch.rows
        if below and patch.cols == tensor.cols:  # one piece of the file
            found, part = _read_patch(files, tensor, patch, slab, room)
            return found, [part]
    # Several patches lie in these rows, as column shards of tensor-parallel ranks do: each is read
    # aside and copied to its columns.
    rows = room[: slab.rows * tensor.row_bytes].reshape(slab.rows, -1)
    parts, width = [], tensor.dtype.itemsize
    for patch in tensor.patches:
        some = Slab(max(slab.first, patch.row), min(slab.last, patch.row + patch.rows))
        if some.first < some.last:
            size = some.rows * patch.cols * width
            aside = scratch("patch", room_for(size))
            found, part = _read_patch(files, tensor, patch, some, aside)
            window = rows[some.first - slab.first : some.last - slab.first]
            window[:, patch.col * width : (patch.col + patch.cols) * width] = found
            parts.append(part)
    return rows, parts


def slab_room(tensor: LogicalTensor, slab: Slab) -> int:
    """Bytes of memory that `read_slab` wants; whole pages."""
    return room_for(slab.rows * tensor.row_bytes)


def _read_patch(
    files: FileCache, tensor: LogicalTensor, patch: Patch, rows: Slab, room: np.ndarray
) -> tuple[np.ndarray, Part]:
    """[rows, bytes] of a patch as they are stored, somewhere in ``room``."""
    line = patch.cols * tensor.dtype.itemsize
    start = patch.start_of(rows.first, tensor.dtype.itemsize)
    stored = files.read(patch.record, start, rows.rows * line, room)
    part = Part(str(patch.record.path), patch.record.offset, start, len(stored), crc32(stored))
    return stored.reshape(rows.rows, line), part


def check_records(
    files: FileCache, tensors: Iterable[LogicalTensor], parts: Iterable[Part]
) -> None:
    """Compare the CRC-32s of what was read with those that the records state.

    Args:
        files: descriptors to read from where the parts leave gaps in a record.
        tensors: whose records are checked.
        parts: from `read_slab`.

    Raises:
        CheckpointError: a CRC-32 does not match; names the tensor and file.
    """
    found = Checksums(parts)
    for tensor in tensors:
        # Once each: halves of a gated layer are two patches of one record.
        for record in dict.fromkeys(patch.record for patch in tensor.patches):
            crc = found.of(record)
            if crc is None:
                files.check_whole(record, tensor.name)
            else:
                _check_crc(crc, record, tensor.name)


def check_replicas(files: FileCache, tensor: LogicalTensor, slab: Slab, rows: np.ndarray) -> None:
    """Compare further stored copies of a tensor with ``rows``, which `read_slab` filled.

    Raises:
        CheckpointError: they differ; names both files.
    """
    for patches in tensor.replicas:
        # Fresh memory and not scratch: `rows` may itself be in this thread's scratch.
        room = pages(slab_room(tensor, slab))
        copy, _ = read_slab(files, replace(tensor, patches=patches), slab, room)
        if not np.array_equal(copy, rows):
            raise CheckpointError(
                f"{patches[0].record.path}: its copy of {tensor.name} differs from the one in "
                f"{tensor.patches[0].record.path}; either the ranks of this checkpoint disagree, "
                "or tensor parallelism splits a tensor of a name that is not Megatron's"
            )


def _check_crc(crc: int, record: Record, name: str) -> None:
    if record.crc32 is not None and crc != record.crc32:
        raise CheckpointError(
            f"{record.path}: the bytes of {name} at offset {record.offset} do not match their "
            "CRC-32; the file is damaged, copy or export it again"
        )
