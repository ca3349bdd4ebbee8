"""Advisory locks (flock): one process at a time works on a stage, or drives a run.

Every process that inherited a lock's descriptor holds the lock. It is released when the last of
them ends, also if it is killed; there is nothing to clean up. On network file systems flock has to
be enabled cluster-wide (Lustre: mount option ``flock``); ``nemo-warp doctor --run-directory`` tries
it.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class LockHeldError(Exception):
    """Somebody else holds the lock."""


@contextmanager
def hold(path: Path, wait_s: float = 0.0) -> Iterator[int]:
    """Hold the lock at ``path``; yields the descriptor, to hand on to child processes.

    Raises:
        LockHeldError: it was not free within ``wait_s`` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Group-writable: a colleague's driver may continue the run. The file is never removed:
    # otherwise two processes could lock two files of the same name.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o664)
    try:
        _acquire(descriptor, path, time.monotonic() + wait_s)
        yield descriptor
    finally:
        # Closing and not LOCK_UN, which would take the lock from children that inherited it.
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether somebody holds the lock. Looks by taking a shared lock for an instant.

    That needs no permission to write, nor a file system that is mounted for writing.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        _flock(descriptor, path, fcntl.LOCK_SH)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _acquire(descriptor: int, path: Path, deadline: float) -> None:
    while True:
        try:
            _flock(descriptor, path, fcntl.LOCK_EX)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise LockHeldError(str(path)) from None
            # Polled: flock has no time-out, and interrupting it would take a signal handler of the
            # whole process.
            time.sleep(0.1)


def _flock(descriptor: int, path: Path, kind: int) -> None:
    try:
        # flock and not POSIX locks here: it has to be inherited by child processes, which hold the
        # stage when the task itself is killed.
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:  # the descriptor has no name
        error.filename = str(path)
        raise
