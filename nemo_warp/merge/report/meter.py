"""What a merge cost: seconds, bytes, peak memory, and how close it came to the disk's own speed."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nemo_warp.checkpoints.io.direct import DirectFile, pages, room_for
from nemo_warp.merge.plan import MergePlan

MIN_BYTES = 4 << 30
"""A merge that moves less is over before a disk shows its speed."""

STEADY = 1.5
"""Rates of one disk, before and after the merge, that differ by more say nothing about it."""

_PROBE_SHARE, _MAX_PROBE = 400, 1 << 28
_PIECE, _THREADS = 4 << 20, 8


class Meter:
    """Measures from its creation on.

    The floor is the time that reading the inputs and writing and fsyncing the outputs takes, one
    after the other, at rates measured on a four-hundredth of the bytes before the merge and after
    it, past the page cache. There is none (None) where it cannot be measured: for small merges,
    without direct access to the disk, and where the rates differ because others use it, too.

    Args:
        plan: says how many bytes have to move.
    """

    def __init__(self, plan: MergePlan):
        self._plan, self._start = plan, time.perf_counter()
        self._written = len(plan.options.outputs) * plan.output_bytes
        self._moved = plan.input_bytes + self._written
        self._before = self._probe()
        self._probed = time.perf_counter() - self._start

    def read(self) -> dict[str, Any]:
        """Seconds, bytes, peak resident memory of this process, and the floor."""
        plan, seconds = self._plan, time.perf_counter() - self._start - self._probed
        floor = self._floor(self._before, self._probe() if self._before else None)
        passes = 2 if plan.options.granularity == "model" else 1
        return {
            "seconds": seconds,
            "floor_seconds": floor,
            "floor_fraction": None if floor is None else floor / seconds,
            "bytes_read": passes * plan.input_bytes,
            "bytes_written": self._written,
            "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "largest_group_bytes": max(g.input_bytes // len(plan.inputs) for g in plan.groups),
        }

    def _floor(self, *rates: tuple[float, float] | None) -> float | None:
        """Seconds, from two pairs of seconds per byte read and written."""
        known = [pair for pair in rates if pair is not None]
        if len(known) < len(rates):
            return None
        total = 0.0
        for size, found in (
            (self._plan.input_bytes, [read for read, _ in known]),
            (self._written, [written for _, written in known]),
        ):
            # Another user of the disk would make the floor, and so the merge's share of it,
            # meaningless.
            if max(found) > STEADY * min(found):
                return None
            total += size * sum(found) / len(found)
        return total

    def _probe(self) -> tuple[float, float] | None:
        """Seconds per byte of reading the init's largest file and of writing beside the outputs."""
        if self._moved < MIN_BYTES:
            return None
        count = min(_MAX_PROBE, self._moved // _PROBE_SHARE) // _PIECE
        record = max(self._plan.inputs[0].archive.members.values(), key=lambda r: r.size)
        final = next(iter(self._plan.options.outputs.values())).absolute()
        folder = next(parent for parent in final.parents if parent.is_dir())
        try:
            return _read_rate(record.path, count), _write_rate(folder, count)
        except OSError:  # the merge itself will say what is wrong
            return None


def _read_rate(path: Path, count: int) -> float:
    """Seconds per byte of ``count`` pieces, spread over the file."""
    file = DirectFile(path, os.O_RDONLY)
    stride = max(1, path.stat().st_size // _PIECE // count)
    try:
        return _rate(file, count, lambda room, n: file.read(room, _PIECE, n * stride * _PIECE))
    finally:
        file.close()


def _write_rate(folder: Path, count: int) -> float:
    """Seconds per byte of ``count`` pieces and an fsync, in a file without a name."""
    descriptor, name = tempfile.mkstemp(prefix=".speed_", dir=folder)
    os.close(descriptor)
    file = DirectFile(Path(name), os.O_RDWR)
    os.unlink(name)
    try:
        return _rate(file, count, lambda room, n: file.write(room[:_PIECE], n * _PIECE))
    finally:
        file.close()


def _rate(file: DirectFile, count: int, move: Callable) -> float:
    if not file.is_direct:
        raise OSError("no direct access: the page cache would be measured")
    with ThreadPoolExecutor(_THREADS) as pool:
        rooms = [pages(room_for(_PIECE)) for _ in range(_THREADS)]
        began = time.perf_counter()
        of_thread = [range(first, count, _THREADS) for first in range(_THREADS)]
        moving = [
            pool.submit(lambda room, numbers: [move(room, n) for n in numbers], room, numbers)
            for room, numbers in zip(rooms, of_thread, strict=True)
        ]
        for one in moving:
            one.result()
        os.fsync(file.descriptor)
    return (time.perf_counter() - began) / (count * _PIECE)


def summary(timing: dict[str, Any]) -> str:
    """One line for the end of a merge."""
    moved = timing["bytes_read"] + timing["bytes_written"]
    share = ""
    if timing["floor_seconds"] is not None:
        share = (
            f" ({100 * timing['floor_fraction']:.0f} % of the speed of reading and writing alone, "
            f"{timing['floor_seconds']:.1f} s)"
        )
    return (
        f"{moved / 1e9:.2f} GB in {timing['seconds']:.1f} s{share}; "
        f"peak memory {timing['peak_memory_bytes'] / 1e6:.0f} MB, "
        f"largest group {timing['largest_group_bytes'] / 1e6:.0f} MB per model"
    )
