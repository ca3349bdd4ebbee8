"""Files that are opened when they are wanted, a limited number of them at a time.

A checkpoint of a 512-GPU job has thousands of files, a process often 1024 descriptors
(``ulimit -n``) for all it does, and a `DirectFile` takes two.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nemo_warp.checkpoints.io.direct import DirectFile

LIMIT = 64
"""Files kept open; more only while that many threads use different ones at the same moment."""


@dataclass
class _Open:
    file: DirectFile
    users: int = 0


class OpenFiles:
    """Open files, shared by threads (reads and writes are positional); a context manager.

    Args:
        flags: for `os.open`.
    """

    def __init__(self, flags: int):
        self._flags = flags
        self._open: OrderedDict[Path, _Open] = OrderedDict()  # the least recently used first
        self._lock = threading.Lock()

    @contextmanager
    def use(self, path: Path, flags: int = 0) -> Iterator[DirectFile]:
        """The file, open until the end of the block at least.

        Args:
            path: of the file.
            flags: further ones, if it has to be opened.

        Raises:
            OSError: it cannot be opened.
        """
        with self._lock:
            entry = self._open.get(path)
            if entry is None:
                self._make_room()
                entry = self._open[path] = _Open(DirectFile(path, self._flags | flags))
            self._open.move_to_end(path)
            # Counted, because a file that another thread still reads from must not be closed.
            entry.users += 1
        try:
            yield entry.file
        finally:
            with self._lock:
                entry.users -= 1

    def _make_room(self) -> None:
        idle = [path for path, entry in self._open.items() if entry.users == 0]
        for path in idle[: max(0, len(self._open) + 1 - LIMIT)]:
            self._open.pop(path).file.close()

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all of them."""
        with self._lock:
            for entry in self._open.values():
                entry.file.close()
            self._open.clear()
