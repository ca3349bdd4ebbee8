"""A place on disk; not in `logical`, so that code that needs no tensors imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Record:
    """A contiguous blob on disk, with the CRC-32 its container states (None if it states none)."""

    path: Path
    offset: int
    size: int
    crc32: int | None = None
