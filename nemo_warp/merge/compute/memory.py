"""A bounded amount of memory that threads take in turn and give back."""

from __future__ import annotations

import threading
from collections import defaultdict

import numpy as np

from nemo_warp.checkpoints.io.direct import pages, release


class Memory:
    """Buffers that never add up to more than a limit; whoever asks for more waits.

    Whoever has the earlier ticket is served first, so that later work never takes what earlier work
    needs to come to its end.

    Buffers are kept for the next one who wants their size: layers look alike, and fresh memory
    costs as much time as reading into it.

    Args:
        limit: bytes; a single buffer that is larger is served when no other is out.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._allocated, self._tickets, self._served = 0, 0, 0
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)
        self._lock = threading.Lock()
        self._waiting: dict[int, threading.Condition] = {}
        self._closed = False

    def ticket(self) -> int:
        """A place in the queue; it must be used, or those behind it wait for ever."""
        with self._lock:
            self._tickets += 1
            return self._tickets - 1

    def take(self, size: int, ticket: int | None = None) -> np.ndarray:
        """[size] uint8 that begins at a page, uninitialised; to be given back.

        Args:
            size: bytes.
            ticket: a place that was kept; None is the end of the queue.

        Raises:
            RuntimeError: the memory was closed.
        """
        ticket = self.ticket() if ticket is None else ticket
        with self._lock:
            # A condition for each who waits, so that a buffer that comes back wakes the one whose
            # turn it is and not all of them.
            changed = self._waiting[ticket] = threading.Condition(self._lock)
            while not self._closed:
                if ticket == self._served and (buffer := self._find(size)) is not None:
                    del self._waiting[ticket]
                    self._served += 1
                    # There may be room for the next one as well.
                    self._wake_first()
                    return buffer
                changed.wait()
        raise RuntimeError("the merge was stopped")

    def give(self, buffer: np.ndarray) -> None:
        """Return a buffer."""
        with self._lock:
            self._free[len(buffer)].append(buffer)
            self._wake_first()

    def close(self) -> None:
        """Nobody waits any longer."""
        with self._lock:
            self._closed = True
            for changed in self._waiting.values():
                changed.notify()

    def _wake_first(self) -> None:
        if self._served in self._waiting:
            self._waiting[self._served].notify()

    def _find(self, size: int) -> np.ndarray | None:
        if self._free[size]:
            return self._free[size].pop()
        self._drop_others(self._allocated + size - self.limit)
        # A buffer larger than the limit is given when nothing else is out: to refuse would be for
        # ever.
        if self._allocated > 0 and self._allocated + size > self.limit:
            return None
        self._allocated += size
        return pages(size)

    def _drop_others(self, size: int) -> None:
        """Free up to ``size`` bytes of buffers that nobody holds."""
        for free in self._free.values():
            while free and size > 0:
                buffer = free.pop()
                release(buffer)
                self._allocated -= len(buffer)
                size -= len(buffer)
