"""One output on disk while it is being written: a tar, or a folder of files at their final size.

Bytes go to their final offsets in any order; checksums and provenance follow, and everything that
was written is fsynced. How it comes to its name is `transaction`'s business.
"""

from __future__ import annotations

import os
import tarfile
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nemo_warp.checkpoints.containers.archive import read_record
from nemo_warp.checkpoints.containers.image import CheckpointImage, FileImage
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.io.crc import crc32
from nemo_warp.checkpoints.io.direct import reserve
from nemo_warp.checkpoints.io.open_files import OpenFiles
from nemo_warp.checkpoints.io.parts import Checksums, Part
from nemo_warp.checkpoints.record import Record
from nemo_warp.records import fsync_directory

_COPY_BYTES = 1 << 22
_TAR_RECORD = tarfile.RECORDSIZE
_SYNC_THREADS = 8


class Output:
    """One output under construction.

    Args:
        content: where it is written.
        image: its layout.
        is_tar: whether ``content`` is a tar, or a folder.
        files: opens the output's files.
    """

    def __init__(self, content: Path, image: CheckpointImage, is_tar: bool, files: OpenFiles):
        self.content, self.image, self.is_tar = content, image, is_tar
        self._files = files
        self._written: set[Path] = set()
        self._lock = threading.Lock()
        self._bases: dict[str, int] = {}
        self._headers: list[tuple[int, bytes]] = []
        self._tar_end = self._lay_out_tar() if is_tar else 0

    def _lay_out_tar(self) -> int:
        cursor = 0
        for file in self.image.files:
            header = _tar_header(file.name, file.size)
            self._headers.append((cursor, header))
            self._bases[file.name] = cursor + len(header)
            # A tar pads each member to 512 bytes.
            cursor += len(header) + file.size + -file.size % tarfile.BLOCKSIZE
        return cursor

    def create(self) -> None:
        """Make the files at their final size; only the process that leads the merge does."""
        if self.is_tar:
            self._create("", self._tar_end)
            for offset, header in self._headers:
                self._pwrite("", header, offset)
            return
        for folder in {self._path(file.name).parent for file in self.image.files}:
            folder.mkdir(parents=True, exist_ok=True)
        for file in self.image.files:
            self._create(file.name, file.size)

    def _create(self, name: str, size: int) -> None:
        with self._files.use(self._path(name), os.O_CREAT | os.O_EXCL) as file:
            # At its final size at once, so that threads and processes can write anywhere in it.
            os.ftruncate(file.descriptor, size)
            reserve(file.descriptor, size)
        self._written.add(self._path(name))

    @property
    def size(self) -> int:
        """Bytes of disk space it takes, its provenance left out."""
        return self._tar_end if self.is_tar else sum(file.size for file in self.image.files)

    def write_fixed(self) -> dict[tuple[str, int], int]:
        """Write headers and copied bytes; returns (file, offset) -> CRC-32 of each."""
        crcs = {}
        for file in self.image.files:
            for offset, content in file.pieces:
                crcs[file.name, offset] = self._write_content(file, offset, content)
            for offset, image in file.zips:
                for header_offset, header in image.headers():
                    self._pwrite(file.name, header, offset + header_offset)
        return crcs

    def _write_content(self, file: FileImage, offset: int, content: bytes | Record) -> int:
        if isinstance(content, bytes):
            self._pwrite(file.name, content, offset)
            return crc32(content)
        crc = 0
        for start in range(0, content.size, _COPY_BYTES):
            size = min(_COPY_BYTES, content.size - start)
            part = Record(content.path, content.offset + start, size)
            data = read_record(part, _COPY_BYTES, str(content.path))
            self._pwrite(file.name, data, offset + start)
            crc = crc32(data, crc)
        # Copied bytes are checked like merged ones: a damaged _extra_state would load, too.
        if content.crc32 not in (None, crc):
            raise CheckpointError(
                f"{content.path}: bytes of {file.name} at offset {content.offset} do not match "
                "their CRC-32; the file is damaged, copy or export it again"
            )
        return crc

    def write(self, record: Record, start: int, data: np.ndarray) -> Part:
        """Write bytes of a merged tensor at ``start`` in one of the image's holes."""
        name = str(record.path)
        self._pwrite(name, data, record.offset + start)
        return Part(name, record.offset, start, len(data), crc32(data))

    def place(self, record: Record, start: int) -> int:
        """Offset in the file on disk of a byte of a merged tensor."""
        return self._bases.get(str(record.path), 0) + record.offset + start

    def sync(self) -> None:
        """Make everything that this process has written so far durable."""

        def sync_one(path: Path) -> None:
            with self._files.use(path) as file:
                # Sizes were set before, and fdatasync writes a size that data needs; times are left
                # out.
                os.fdatasync(file.descriptor)

        with self._lock:
            # Swapped under the lock: what other threads write from now on belongs to the next sync.
            written, self._written = self._written, set()
        with ThreadPoolExecutor(_SYNC_THREADS, "sync") as pool:
            _exhaust(pool.map(sync_one, sorted(written)))

    def complete(self, parts: list[Part], notes: dict[str, bytes]) -> None:
        """Write everything that is not merged and make the output durable and complete.

        Args:
            parts: all merged bytes.
            notes: name -> contents of files about the merge.
        """
        # Trailers come after all data, since they hold the CRC-32s.
        crcs = self.write_fixed() | self._record_crcs(parts)
        for file in self.image.files:
            for offset, image in file.zips:
                found = [crcs[file.name, offset + data] for data in image.data_offsets]
                for trailer_offset, trailer in image.trailers(found):
                    self._pwrite(file.name, trailer, offset + trailer_offset)
        if self.is_tar:
            self._append_to_tar(notes)
        for name, content in () if self.is_tar else notes.items():
            self._create(name, len(content))
            self._pwrite(name, content, 0)
        self.sync()
        for folder in {path.parent for path in self.content.rglob("*")} | {self.content.parent}:
            fsync_directory(folder)

    def _record_crcs(self, parts: list[Part]) -> dict[tuple[str, int], int]:
        """(file, offset) -> CRC-32 of each merged record."""
        written, crcs = Checksums(parts), {}
        for tensor in self.image.tensors.values():
            for patch in (*tensor.patches, *(p for copy in tensor.replicas for p in copy)):
                record, key = patch.record, (str(patch.record.path), patch.record.offset)
                if key in crcs:
                    continue
                crc = written.of(record)
                if crc is None:  # a storage with gaps between its tensors
                    crc = self._crc_on_disk(*key, record.size)
                crcs[key] = crc
        return crcs

    def _crc_on_disk(self, name: str, offset: int, size: int) -> int:
        crc = 0
        for start in range(0, size, _COPY_BYTES):
            data = self._pread(name, min(_COPY_BYTES, size - start), offset + start)
            crc = crc32(data, crc)
        return crc

    def _append_to_tar(self, notes: dict[str, bytes]) -> None:
        end = self._tar_end
        for name, content in notes.items():
            block = _tar_header(name, len(content)) + content
            self._pwrite("", block, end)
            end += len(block) + -len(block) % tarfile.BLOCKSIZE
        # A tar ends with two blocks of zeros, and is padded to a record of 20 blocks, as NeMo's
        # are.
        end += 2 * tarfile.BLOCKSIZE
        with self._files.use(self.content) as file:
            os.ftruncate(file.descriptor, end + -end % _TAR_RECORD)

    def _path(self, name: str) -> Path:
        return self.content if self.is_tar else self.content / name

    def _pread(self, name: str, size: int, offset: int) -> bytes:
        with self._files.use(self._path(name)) as file:
            return os.pread(file.descriptor, size, offset + self._bases.get(name, 0))

    def _pwrite(self, name: str, data: bytes | np.ndarray, offset: int) -> None:
        path = self._path(name)
        with self._files.use(path) as file:
            file.write(np.frombuffer(data, np.uint8), offset + self._bases.get(name, 0))
        with self._lock:
            self._written.add(path)


def _exhaust(results: Iterable) -> None:
    for _ in results:
        pass


def _tar_header(name: str, size: int) -> bytes:
    """A header that depends on nothing but name and size: no owner, no time."""
    info = tarfile.TarInfo(f"./{name}")
    info.size, info.mode, info.mtime = size, 0o644, 0
    return info.tobuf(tarfile.PAX_FORMAT)
