"""Read tensors' bytes into memory in logical order, checking the CRC-32 of what is read.

Records are read once, front to back in pieces that fit the cache, and each piece is scattered to
the rectangles it holds. All functions may be called from several threads.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nemo_warp.checkpoints.checksum import crc32
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.logical import LogicalTensor, Patch, Record

PIECE = 1 << 20


class FileCache:
    """Open descriptors, one per file, shared by threads (reads are positional)."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._whole: set[Record] = set()

    def __enter__(self) -> FileCache:
        return self

    def __exit__(self, *_exc: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def descriptor(self, path: Path) -> int:
        """The read-only descriptor of ``path``."""
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            return self._descriptors[path]

    def read_into(self, record: Record, start: int, target: memoryview) -> None:
        """Fill ``target`` from byte ``start`` of the record.

        Raises:
            CheckpointError: the file ends early.
        """
        descriptor, offset, done = self.descriptor(record.path), record.offset + start, 0
        while done < len(target):
            count = os.preadv(descriptor, [target[done:]], offset + done)
            if count == 0:
                raise CheckpointError(f"{record.path} ends at {offset + done}; it was truncated")
            done += count

    def prefetch(self, records: Iterable[Record]) -> None:
        """Ask the kernel to start reading ``records`` into the page cache."""
        for record in records:
            descriptor = self.descriptor(record.path)
            os.posix_fadvise(descriptor, record.offset, record.size, os.POSIX_FADV_WILLNEED)

    def check_whole(self, record: Record, name: str) -> None:
        """Check a record's CRC-32 on its own, once, for records that no single read covers."""
        with self._lock:
            if record.crc32 is None or record in self._whole:
                return
            self._whole.add(record)
        crc, piece = 0, memoryview(bytearray(PIECE))
        for start in range(0, record.size, PIECE):
            part = piece[: min(PIECE, record.size - start)]
            self.read_into(record, start, part)
            crc = crc32(part, crc)
        _check_crc(crc, record, name)


def records_of(tensor: LogicalTensor) -> dict[Record, list[Patch]]:
    """The tensor's patches by record, in stored order."""
    patches: dict[Record, list[Patch]] = defaultdict(list)
    for patch in sorted(tensor.patches, key=lambda p: p.start):
        patches[patch.record].append(patch)
    return patches


def read_patches(
    files: FileCache,
    tensor: LogicalTensor,
    record: Record,
    patches: list[Patch],
    target: np.ndarray,
) -> None:
    """Read the ``patches`` of one record into ``target``.

    Args:
        files: descriptors to read from.
        tensor: what is read, for its dtype and name.
        record: where the bytes are.
        patches: rectangles of the tensor in this record, in stored order.
        target: [rows, cols * itemsize] uint8, the whole tensor in logical order.

    Raises:
        CheckpointError: truncated, or the CRC-32 does not match; names the tensor and file.
    """
    width = tensor.dtype.itemsize
    sizes = [patch.rows * patch.cols * width for patch in patches]
    ends = [patch.start + size for patch, size in zip(patches, sizes, strict=True)]
    whole = [0, *ends[:-1]] == [patch.start for patch in patches] and ends[-1] == record.size
    if not whole:
        files.check_whole(record, tensor.name)
    crc = 0
    for patch in patches:
        crc = _read_patch(files, patch, width, target, crc if whole else None)
    if whole:
        _check_crc(crc, record, tensor.name)


def _read_patch(
    files: FileCache, patch: Patch, width: int, target: np.ndarray, crc: int | None
) -> int | None:
    """Read one rectangle; returns the running CRC-32, or None if it is not wanted."""
    line = patch.cols * width
    window = target[
        patch.row : patch.row + patch.rows, patch.col * width : patch.col * width + line
    ]
    direct = window.flags.c_contiguous
    step = max(1, PIECE // line)
    buffer = None if direct else np.empty((min(step, patch.rows), line), dtype=np.uint8)
    for first in range(0, patch.rows, step):
        rows = window[first : first + step]
        piece = rows if direct else buffer[: len(rows)]
        view = memoryview(piece.reshape(-1))
        files.read_into(patch.record, patch.start + first * line, view)
        if not direct:
            rows[...] = piece
        if crc is not None:
            crc = crc32(view, crc)
    return crc


def check_replica(
    files: FileCache, tensor: LogicalTensor, patches: tuple[Patch, ...], target: np.ndarray
) -> None:
    """Compare a further stored copy of a tensor with what was read into ``target``.

    Raises:
        CheckpointError: they differ; names both files.
    """
    width = tensor.dtype.itemsize
    for patch in patches:
        line, left = patch.cols * width, patch.col * width
        step = max(1, PIECE // line)
        buffer = np.empty((min(step, patch.rows), line), dtype=np.uint8)
        for first in range(0, patch.rows, step):
            piece = buffer[: min(step, patch.rows - first)]
            files.read_into(patch.record, patch.start + first * line, memoryview(piece.reshape(-1)))
            row = patch.row + first
            if not np.array_equal(piece, target[row : row + len(piece), left : left + line]):
                raise CheckpointError(
                    f"{patch.record.path}: its copy of {tensor.name} differs from the one in "
                    f"{tensor.patches[0].record.path}; the ranks of this checkpoint disagree"
                )


def _check_crc(crc: int, record: Record, name: str) -> None:
    if record.crc32 is not None and crc != record.crc32:
        raise CheckpointError(
            f"{record.path}: the bytes of {name} at offset {record.offset} do not match their "
            "CRC-32; the file is damaged, copy or export it again"
        )
