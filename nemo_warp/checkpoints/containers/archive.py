"""A ``.nemo`` as a set of named byte ranges: an uncompressed tar read in place, or a directory.

Nothing is extracted. Tar members that NeMo would never write (links, devices, absolute or ``..``
paths, sparse files, ranges past the end) are refused by name.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.record import Record

MAX_HEADER_BYTES = 1 << 20
"""Far more than any tar header that NeMo writes (pax and long names included)."""

_MAX_NAME = 1024

MAX_FILES = 1 << 18
"""In a folder; a 512-GPU save has some thousands."""

MAX_SMALL_FILE_BYTES = 1 << 28
"""Limit for files read whole: configuration, metadata, pickles."""


@dataclass(frozen=True)
class Archive:
    """Members of one checkpoint.

    Attributes:
        path: the tar or the directory.
        is_tar: whether ``path`` is a tar.
        members: normalised relative name -> where its bytes are, in stored order.
    """

    path: Path
    is_tar: bool
    members: dict[str, Record]

    def read(self, name: str, limit: int = MAX_SMALL_FILE_BYTES) -> bytes:
        """All bytes of a small member.

        Raises:
            CheckpointError: it is missing, larger than ``limit`` or cut short.
        """
        if name not in self.members:
            raise CheckpointError(f"{self.path} holds no {name}")
        return read_record(self.members[name], limit, f"{self.path}: {name}")

    def under(self, directory: str) -> dict[str, Record]:
        """Members below ``directory``, with names relative to it ('' is everything)."""
        prefix = f"{directory}/" if directory else ""
        return {n[len(prefix) :]: r for n, r in self.members.items() if n.startswith(prefix)}


def open_archive(path: Path) -> Archive:
    """List a ``.nemo`` tar or directory without extracting it.

    Raises:
        CheckpointError: it does not exist, is not such an archive, or is unsafe.
    """
    if path.is_dir():
        members = dict(_directory_members(path))
        if len(members) > MAX_FILES:
            raise CheckpointError(f"{path} holds more than {MAX_FILES} files; is it a checkpoint?")
        return Archive(path, False, members)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    return Archive(path, True, dict(_tar_members(path)))


def read_record(record: Record, limit: int, what: str) -> bytes:
    """All bytes of a record of at most ``limit`` bytes.

    Raises:
        CheckpointError: too large, or the file ends early.
    """
    if record.size > limit:
        raise CheckpointError(f"{what} has {record.size} bytes, more than the {limit} expected")
    with record.path.open("rb") as stream:
        stream.seek(record.offset)
        data = stream.read(record.size)
    if len(data) != record.size:
        raise CheckpointError(f"{what} ends after {len(data)} of {record.size} bytes")
    return data


class RangeReader(io.RawIOBase):
    """A read-only, seekable view of one record, refusing single reads above ``max_read`` bytes.

    Parsers from the standard library run on it, so a forged length inside a file cannot make them
    read outside their member or allocate more than the limit.
    """

    def __init__(self, record: Record, max_read: int):
        self._record, self._max_read, self._position = record, max_read, 0
        self._stream = record.path.open("rb", buffering=0)

    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:  # noqa: D102
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._record.size}
        position = base[whence] + offset
        if position < 0:
            raise CheckpointError(f"{self._record.path}: a header points before its file")
        self._position = position
        return position

    def tell(self) -> int:  # noqa: D102
        return self._position

    def read(self, size: int = -1) -> bytes:  # noqa: D102
        left = max(0, self._record.size - self._position)
        size = left if size is None or size < 0 else min(size, left)
        if size > self._max_read:
            raise CheckpointError(
                f"{self._record.path}: a header claims {size} bytes; the file is damaged or hostile"
            )
        data = os.pread(self._stream.fileno(), size, self._record.offset + self._position)
        self._position += len(data)
        return data

    def close(self) -> None:  # noqa: D102
        self._stream.close()
        super().close()


def _directory_members(path: Path) -> Iterator[tuple[str, Record]]:
    """Files below a folder; nothing outside it is read, so links must stay inside."""
    root = path.resolve()
    # islice before sorted: a folder of millions of files must not be listed to be refused.
    for file in sorted(islice(path.rglob("*"), MAX_FILES + 1)):
        name = file.relative_to(path).as_posix()
        if file.is_symlink():
            target = file.resolve()
            if not target.is_file():
                raise CheckpointError(f"{path}: {name} is a broken or directory link")
            if not target.is_relative_to(root):
                raise CheckpointError(
                    f"{path}: {name} is a link to {target}, outside the checkpoint; refused: if "
                    "you trust it, make a copy without links (cp -rL)"
                )
        if file.is_file():
            yield name, Record(file, 0, file.stat().st_size)


def _tar_members(path: Path) -> Iterator[tuple[str, Record]]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        # gzip's first two bytes. NeMo reads both kinds by trying (save_restore_connector.py
        # l.652-670); but byte ranges of a compressed tar are no tensors.
        if stream.read(2) == b"\x1f\x8b":
            raise CheckpointError(
                f"{path} is gzip-compressed (NeMo before 1.7), so it cannot be read in place: "
                f"unpack it with `mkdir DIR && tar -xzf {path.name} -C DIR` and pass DIR"
            )
    # tarfile reads extended headers whole, of the length that they claim: the limit holds here.
    reader = RangeReader(Record(path, 0, size), MAX_HEADER_BYTES)
    seen = set()
    try:
        with reader, tarfile.open(fileobj=reader, mode="r:") as tar:
            for member in tar:
                name = _safe_name(path, member)
                if member.isdir():
                    continue
                # Base-256 sizes of GNU tar can be negative, which tarfile does not refuse.
                if member.size < 0 or member.offset_data < 0:
                    raise CheckpointError(f"{path}: {name} claims {member.size} bytes; refused")
                if member.offset_data + member.size > size:
                    raise CheckpointError(
                        f"{path}: {name} claims {member.size} bytes but the tar ends at {size}; "
                        "it is truncated"
                    )
                # tar takes the last one of a name when it unpacks, other readers the first.
                if name in seen:
                    raise CheckpointError(f"{path}: {name} appears twice")
                seen.add(name)
                yield name, Record(path, member.offset_data, member.size)
    # What tarfile raises on forged headers is not TarError alone.
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable tar ({error})") from error
    if not seen:
        raise CheckpointError(f"{path} is an empty tar")
    for name in seen:
        if any(parent.as_posix() in seen for parent in PurePosixPath(name).parents):
            raise CheckpointError(f"{path}: {name} lies below a file; the tar cannot be unpacked")


def _safe_name(path: Path, member: tarfile.TarInfo) -> str:
    if len(member.name) > _MAX_NAME:
        raise CheckpointError(f"{path}: a member is called {member.name[:60]!r}...; refused")
    # Also drops a leading "./", with which NeMo writes members.
    pure = PurePosixPath(member.name)
    if pure.is_absolute() or ".." in pure.parts or "\0" in member.name:
        raise CheckpointError(f"{path}: member {member.name!r} points outside the archive; refused")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise CheckpointError(
            f"{path}: member {member.name!r} is a link, device or sparse file; refused"
        )
    return pure.as_posix()
