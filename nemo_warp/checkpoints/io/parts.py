"""Parts of records that were read or written, each with its CRC-32, joined where they meet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from nemo_warp.checkpoints.io.crc import crc32_combine
from nemo_warp.checkpoints.record import Record


class Part(NamedTuple):
    """Bytes of the record at ``offset`` in ``file``: where they start in it, how many, CRC-32."""

    file: str
    offset: int
    start: int
    size: int
    crc32: int


def coalesce(parts: Iterable[Part]) -> list[Part]:
    """The same bytes in as few parts as possible, sorted: neighbours become one."""
    joined: list[Part] = []
    for part in sorted(parts):
        if joined:
            file, offset, start, size, crc = joined[-1]
            # Only neighbours: parts that overlap (a tensor read twice) or leave gaps are not
            # joined, and the record is then read once more as a whole.
            if (file, offset, start + size) == part[:3]:
                crc = crc32_combine(crc, part.crc32, part.size)
                joined[-1] = Part(file, offset, start, size + part.size, crc)
                continue
        joined.append(part)
    return joined


def joined_crc32(pieces: Iterable[tuple[int, int]]) -> int:
    """CRC-32 of all pieces one after the other, from the (CRC-32, length) of each."""
    whole = 0
    for crc, num_bytes in pieces:
        whole = crc32_combine(whole, crc, num_bytes)
    return whole


class Checksums:
    """CRC-32s of the records that a set of parts covers from end to end."""

    def __init__(self, parts: Iterable[Part]):
        self._whole = {(p.file, p.offset): p for p in coalesce(parts) if p.start == 0}

    def of(self, record: Record) -> int | None:
        """CRC-32 of a record, or None where the parts leave gaps."""
        part = self._whole.get((str(record.path), record.offset))
        return part.crc32 if part is not None and part.size == record.size else None
