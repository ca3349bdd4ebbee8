"""What a merge cost: seconds, bytes, peak memory, and how close it came to the disk's own speed."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from nemo_warp.merge.plan import MergePlan

_MIN_PROBE, _MAX_PROBE = 1 << 20, 1 << 28
_PROBE_SHARE = 400
_PIECE = 1 << 22


class Meter:
    """Measures from its creation on.

    The floor is the time that reading the inputs and writing and fsyncing the outputs takes, one
    after the other, at rates measured on a four-hundredth of the bytes: of the init at the start
    (through the page cache), and into the output folder at the end.

    Args:
        plan: says how many bytes have to move.
    """

    def __init__(self, plan: MergePlan):
        self._plan, self._start = plan, time.perf_counter()
        self._written = len(plan.options.outputs) * plan.output_bytes
        share = (plan.input_bytes + self._written) // _PROBE_SHARE
        self._probe_bytes = max(_MIN_PROBE, min(_MAX_PROBE, share))
        self._read_seconds = plan.input_bytes * self._probe_read()

    def read(self, folder: Path) -> dict[str, Any]:
        """Seconds, bytes, peak resident memory of this process, and the floor.

        Args:
            folder: where the outputs are; a probe is written there and removed.
        """
        plan, seconds = self._plan, time.perf_counter() - self._start
        floor = self._read_seconds + self._written * self._probe_write(folder)
        passes = 2 if plan.options.granularity == "model" else 1
        return {
            "seconds": seconds,
            "floor_seconds": floor,
            "floor_fraction": floor / seconds,
            "bytes_read": passes * plan.input_bytes,
            "bytes_written": self._written,
            "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "largest_group_bytes": max(g.input_bytes // len(plan.inputs) for g in plan.groups),
        }

    def _probe_read(self) -> float:
        """Seconds per byte of reading the init's largest file."""
        record = max(self._plan.inputs[0].archive.members.values(), key=lambda r: r.size)
        size = min(self._probe_bytes, record.size)
        piece = memoryview(bytearray(_PIECE))
        began = time.perf_counter()
        with record.path.open("rb", buffering=0) as stream:
            stream.seek(record.offset)
            for start in range(0, size, _PIECE):
                stream.readinto(piece[: min(_PIECE, size - start)])
        return (time.perf_counter() - began) / size

    def _probe_write(self, folder: Path) -> float:
        """Seconds per byte of writing and fsyncing a file."""
        piece, began = bytes(_PIECE), time.perf_counter()
        with tempfile.TemporaryFile(dir=folder, buffering=0) as stream:  # it has no name
            for start in range(0, self._probe_bytes, _PIECE):
                stream.write(piece[: self._probe_bytes - start])
            os.fsync(stream.fileno())
        return (time.perf_counter() - began) / self._probe_bytes


def summary(timing: dict[str, Any]) -> str:
    """One line for the end of a merge."""
    moved = timing["bytes_read"] + timing["bytes_written"]
    return (
        f"{moved / 1e9:.2f} GB in {timing['seconds']:.1f} s, "
        f"{100 * timing['floor_fraction']:.0f} % of the I/O floor's speed "
        f"({timing['floor_seconds']:.1f} s); "
        f"peak memory {timing['peak_memory_bytes'] / 1e6:.0f} MB, "
        f"largest group {timing['largest_group_bytes'] / 1e6:.0f} MB per model"
    )
