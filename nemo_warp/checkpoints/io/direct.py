"""Positional reads and writes of large pieces past the page cache (O_DIRECT).

A merge moves every byte once, so nothing reads it from the page cache later, and the page cache
costs more processor time than the arithmetic does: pages are found, copied, zeroed and thrown out
again. Where the file system has no direct access, and for small pieces and unaligned edges, the
page cache is used; Linux keeps the two views of a file the same.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

import numpy as np

ALIGNMENT = 4096
"""Direct access wants addresses, offsets and lengths in multiples of a sector: 4096 serves all."""

# Bytes copied at a time where memory is not aligned (fits a core's L2 cache), and the least for
# which going past the page cache pays.
_PIECE = 1 << 19
_MIN_BYTES = 1 << 16
_threads = threading.local()


class DirectFile:
    """A file opened twice, with and without the page cache; threads may share it.

    Args:
        path: of the file.
        flags: for `os.open`.
    """

    def __init__(self, path: Path, flags: int):
        self.descriptor = os.open(path, flags, 0o666)
        self._direct = _open_direct(path, flags)

    @property
    def is_direct(self) -> bool:
        """Whether the file system gives direct access."""
        return self._direct is not None

    def close(self) -> None:
        """Close both descriptors."""
        for descriptor in (self.descriptor, self._direct):
            if descriptor is not None:
                os.close(descriptor)

    def read(self, room: np.ndarray, size: int, offset: int) -> np.ndarray:
        """Read ``size`` bytes from byte ``offset`` on.

        Args:
            room: [`room_for` (size)] uint8, best from `pages`, to read into.

        Returns:
            The part of ``room`` that holds them; shorter only at the end of the file.
        """
        # Reading begins at the sector before; the view leaves the bytes in front of `offset` out.
        skip = offset % ALIGNMENT
        view, done = room[skip : skip + size], 0
        if self._direct is not None and size >= _MIN_BYTES and address(room) % ALIGNMENT == 0:
            with _fallback():
                wanted = room[: whole_pages(skip + size)]
                done = os.preadv(self._direct, [wanted], offset - skip) - skip
        done = min(max(done, 0), size)
        while done < size:  # direct access cannot read the last sector of a file
            count = os.preadv(self.descriptor, [view[done:]], offset + done)
            if count == 0:
                break
            done += count
        return view[:done]

    def write(self, data: np.ndarray, offset: int) -> None:
        """Write all of ``data`` [n] uint8 at ``offset``.

        It is written from where it is if its address and the offset are equal modulo `ALIGNMENT`;
        otherwise it is copied on the way.

        Raises:
            OSError: as from `os.pwrite`.
        """
        first = -offset % ALIGNMENT
        # Only whole sectors can go past the cache; the edges are written through it below.
        last = max(first, _down(offset + len(data)) - offset)
        if self._direct is None or last - first < _MIN_BYTES:
            _write_all(self.descriptor, data, offset)
            return
        done = first
        with _fallback():
            while done < last:
                piece = _on_pages(data[done:last])
                count = os.pwrite(self._direct, piece, offset + done)
                done += count
                # A short write ended inside a sector: the next one would not be aligned.
                if count % ALIGNMENT:
                    break
        _write_all(self.descriptor, data[:first], offset)
        _write_all(self.descriptor, data[done:], offset + done)


def reserve(descriptor: int, size: int) -> None:
    """Have the file system set ``size`` bytes aside for an open file, where it can (fallocate).

    The file stays in one piece, threads may write it at once, and a full disk is
    found before the first byte is written.

    Raises:
        OSError: no space.
    """
    # fallocate and not posix_fallocate, which writes zeros where the file system cannot reserve:
    # all bytes would be written twice.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(descriptor, 0, ctypes.c_long(0), ctypes.c_long(size)) != 0:
        code = ctypes.get_errno()
        # Any other error means that the file system cannot do it: the file just grows then.
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(code, os.strerror(code))


def pages(size: int) -> np.ndarray:
    """[size] uint8 of fresh memory that begins at a page, in huge pages where the system has them.

    The disk takes a huge page in one go, and the processor finds it in one.
    """
    # Anonymous memory begins at a page, which numpy's own allocator does not promise.
    memory = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, size)


def release(buffer: np.ndarray) -> None:
    """Give memory from `pages` back to the system at once, whoever still knows of it."""
    view = cast("memoryview", buffer.base)
    # Not freed, only emptied: views of the array stay valid and read as zeros.
    cast("mmap.mmap", view.obj).madvise(mmap.MADV_DONTNEED)


def scratch(name: str, size: int) -> np.ndarray:
    """[size] uint8 of this thread's, from `pages`, until it asks for memory of this name again."""
    # Kept for the thread's next piece: fresh pages would be faulted in and zeroed every time.
    memory = vars(_threads)
    if name not in memory or len(memory[name]) < size:
        memory[name] = pages(size)
    return memory[name][:size]


def whole_pages(size: int) -> int:
    """The size rounded up to a multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def room_for(size: int) -> int:
    """Bytes of memory for reading ``size`` bytes from anywhere; whole pages."""
    return whole_pages(size) + ALIGNMENT


@contextmanager
def _fallback() -> Iterator[None]:
    """Go on without direct access where there is none, or other multiples than ours are wanted."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise


def _open_direct(path: Path, flags: int) -> int | None:
    with _fallback():
        # Opened a second time: O_CREAT and O_EXCL were the first one's.
        return os.open(path, (flags & ~(os.O_CREAT | os.O_EXCL)) | os.O_DIRECT)
    return None


def _on_pages(data: np.ndarray) -> np.ndarray:
    """``data`` itself if it begins at a page, or else a copy of its first `_PIECE` bytes."""
    if address(data) % ALIGNMENT == 0:
        return data
    piece = scratch("write", min(_PIECE, len(data)))
    piece[:] = data[: len(piece)]
    return piece


def address(data: np.ndarray) -> int:
    """Where an array's first byte is in memory."""
    return data.__array_interface__["data"][0]


def _write_all(descriptor: int, data: np.ndarray, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _down(size: int) -> int:
    return size // ALIGNMENT * ALIGNMENT
