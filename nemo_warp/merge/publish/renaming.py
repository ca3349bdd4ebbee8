"""Renames that never lose anything, by Linux' renameat2; what file systems lack is made up for."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def rename_to_free_name(source: Path, target: Path) -> None:
    """Rename, but never over something.

    Where the file system cannot do both at once (NFS), a look comes just before.

    Raises:
        FileExistsError: the target exists.
    """
    # By the kernel in one step: os.rename replaces silently, and a look before it is a race.
    code = _renameat2(source, target, _NOREPLACE)
    if code in _UNSUPPORTED:
        if os.path.lexists(target):
            code = errno.EEXIST
        else:
            os.rename(source, target)
            return
    if code:
        raise OSError(code, os.strerror(code), str(source), None, str(target))


def exchange(first: Path, second: Path) -> None:
    """Swap two paths in one step, so that no moment lacks either.

    Raises:
        OSError: says what to do where the file system cannot.
    """
    if code := _renameat2(first, second, _EXCHANGE):
        raise OSError(
            code,
            f"cannot replace {second} ({os.strerror(code)}); move it away and run the same again",
        )


def _renameat2(first: Path, second: Path, flags: int) -> int:
    """0, or the error's number."""
    # glibc has it from 2.28 on; Python has no binding.
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(first), os.fsencode(second)
    done = libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], flags) == 0
    return 0 if done else ctypes.get_errno()
