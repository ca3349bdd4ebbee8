"""Seconds spent in named parts of a step; upstream's ScopedTimer refuses to add up.

The same names are NVTX ranges, for Nsight Systems, and ranges of torch's profiler.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Timings:
    """Adds up wall-clock time by name, the device's queue included."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time of the body to ``name``, even if it raises."""
        # Kernels run asynchronously: without this their time would be booked on whatever waits
        # next.
        torch.cuda.synchronize()
        started = time.perf_counter()
        torch.cuda.nvtx.range_push(name)
        try:
            with torch.profiler.record_function(name):
                yield
            torch.cuda.synchronize()
        finally:
            # No synchronize after an error: it would raise the device's error in place of the
            # body's.
            torch.cuda.nvtx.range_pop()
            self._seconds[name] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call."""
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken
