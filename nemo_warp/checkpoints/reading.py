"""Read rows of tensors in logical order, and check the CRC-32 of what was read.

Rows come slab by slab and from several threads; the CRC-32s of their parts are put together
afterwards (`check_records`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from nemo_warp.checkpoints.crc import crc32
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.logical import LogicalTensor, Patch, Record
from nemo_warp.checkpoints.parts import Checksums, Part
from nemo_warp.checkpoints.slabs import Slab

PIECE = 1 << 20
_READAHEAD = 1 << 17
"""Bytes per request to read ahead; Linux cuts longer ones at the device's readahead size."""


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
        """Ask the operating system to start reading ``records`` into the page cache."""
        for record in records:
            descriptor, end = self.descriptor(record.path), record.offset + record.size
            for start in range(record.offset, end, _READAHEAD):
                size = min(_READAHEAD, end - start)
                os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_WILLNEED)

    def check_whole(self, record: Record, name: str) -> None:
        """Check a record's CRC-32 in a read of its own, once.

        Raises:
            CheckpointError: it does not match; names the tensor and file.
        """
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


def read_slab(
    files: FileCache, tensor: LogicalTensor, slab: Slab, target: np.ndarray, checked: bool = True
) -> list[Part]:
    """Read rows of a tensor.

    Args:
        files: descriptors to read from.
        tensor: what is read.
        slab: which of its rows.
        target: [slab.rows, tensor.row_bytes] uint8, filled in logical order.
        checked: take CRC-32s; not needed to read the same rows again.

    Returns:
        What was read, for `check_records`; nothing unless ``checked``.

    Raises:
        CheckpointError: a file ends early.
    """
    parts = []
    for patch in tensor.patches:
        first, last = max(slab.first, patch.row), min(slab.last, patch.row + patch.rows)
        if first < last:
            rows = target[first - slab.first : last - slab.first]
            view, start = _read_rows(files, patch, first, rows, tensor.dtype.itemsize)
            if checked:
                file, offset = str(patch.record.path), patch.record.offset
                parts.append(Part(file, offset, start, len(view), crc32(view)))
    return parts


def _read_rows(
    files: FileCache, patch: Patch, first: int, rows: np.ndarray, width: int
) -> tuple[memoryview, int]:
    """Fill a patch's columns of ``rows``; returns the bytes as stored and their start."""
    line = patch.cols * width
    start = patch.start + (first - patch.row) * line
    window = rows[:, patch.col * width : patch.col * width + line]
    stored = window if window.flags.c_contiguous else np.empty(window.shape, dtype=np.uint8)
    view = memoryview(stored.reshape(-1))
    files.read_into(patch.record, start, view)
    if stored is not window:
        window[...] = stored
    return view, start


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
        copy = np.empty_like(rows)
        read_slab(files, replace(tensor, patches=patches), slab, copy, checked=False)
        if not np.array_equal(copy, rows):
            raise CheckpointError(
                f"{patches[0].record.path}: its copy of {tensor.name} differs from the one in "
                f"{tensor.patches[0].record.path}; the ranks of this checkpoint disagree"
            )


def _check_crc(crc: int, record: Record, name: str) -> None:
    if record.crc32 is not None and crc != record.crc32:
        raise CheckpointError(
            f"{record.path}: the bytes of {name} at offset {record.offset} do not match their "
            "CRC-32; the file is damaged, copy or export it again"
        )
