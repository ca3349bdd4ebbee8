"""Outputs on disk while they are being written, and their publication.

Each output grows in a hidden folder beside its final path (same file system), as one tar or a
folder of files at their final size. Bytes go to their final offsets, checksums and provenance
follow, everything is fsynced, and one rename publishes it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np

from nemo_warp.checkpoints.checkpoint import PROVENANCE
from nemo_warp.checkpoints.containers.archive import read_record
from nemo_warp.checkpoints.containers.image import CheckpointImage, FileImage
from nemo_warp.checkpoints.io.crc import crc32
from nemo_warp.checkpoints.io.direct import DirectFile, reserve
from nemo_warp.checkpoints.io.parts import Checksums, Part
from nemo_warp.checkpoints.logical import Record
from nemo_warp.records import fsync_directory

_COPY_BYTES = 1 << 22
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_TAR_RECORD = tarfile.RECORDSIZE


class Output:
    """One output under construction.

    Args:
        final: the path it will have; a ``.nemo`` suffix makes it a tar.
        image: its layout.
    """

    def __init__(self, final: Path, image: CheckpointImage):
        self.final, self.image = final, image
        self.is_tar = final.suffix == ".nemo"
        self.folder = final.with_name(f".{final.name}.merging")
        self.content = self.folder / "content"
        self._files = {file.name: file for file in image.files}
        self._bases: dict[str, int] = {}
        self._headers: list[tuple[int, bytes]] = []
        self._tar_end = self._lay_out_tar() if self.is_tar else 0
        self._opened: dict[str, DirectFile] = {}
        self._opening = threading.Lock()

    def _lay_out_tar(self) -> int:
        cursor = 0
        for file in self.image.files:
            header = _tar_header(file.name, file.size)
            self._headers.append((cursor, header))
            self._bases[file.name] = cursor + len(header)
            cursor += len(header) + file.size + -file.size % tarfile.BLOCKSIZE
        return cursor

    def create(self) -> None:
        """Make the files at their final size and write everything that is not merged."""
        self.content.parent.mkdir(parents=True, exist_ok=True)
        for file in self.image.files:
            opened = self._file(file.name)
            if not self.is_tar:
                _set_size(opened.descriptor, file.size)
        if self.is_tar:
            for offset, header in self._headers:
                self._tar.write(np.frombuffer(header, np.uint8), offset)
            _set_size(self._tar.descriptor, self._tar_end)

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
        return crc

    def write(self, record: Record, start: int, data: np.ndarray) -> Part:
        """Write bytes of a merged tensor at ``start`` in one of the image's holes."""
        name = str(record.path)
        self._pwrite(name, data, record.offset + start)
        return Part(name, record.offset, start, len(data), crc32(data))

    def place(self, record: Record, start: int) -> int:
        """Offset in the file on disk of a byte of a merged tensor."""
        return self._bases.get(str(record.path), 0) + record.offset + start

    def missing_bytes(self) -> int:
        """Bytes of disk space the output still needs."""
        total = self._tar_end if self.is_tar else sum(file.size for file in self.image.files)
        present = [path for path in self.folder.rglob("*") if path.is_file()]
        return max(0, total - sum(512 * path.stat().st_blocks for path in present))

    def holds(self, part: Part) -> bool:
        """Whether these bytes are on disk, by their CRC-32."""
        return self._crc_on_disk(part.file, part.offset + part.start, part.size) == part.crc32

    def sync(self) -> None:
        """Make everything written so far durable."""
        with self._opening:
            files = list(self._opened.values())
        for file in files:
            os.fdatasync(file.descriptor)

    def seal(self, parts: list[Part], provenance: bytes) -> None:
        """Write everything that is not merged and make the output durable and complete.

        Args:
            provenance: contents of ``warp_merge.json``.
            parts: all merged bytes.
        """
        crcs = self.write_fixed() | self._record_crcs(parts)
        for file in self.image.files:
            for offset, image in file.zips:
                found = [crcs[file.name, offset + data] for data in image.data_offsets]
                for trailer_offset, trailer in image.trailers(found):
                    self._pwrite(file.name, trailer, offset + trailer_offset)
        if self.is_tar:
            self._append_to_tar(provenance)
        else:
            (self.content / PROVENANCE).write_bytes(provenance)
        self.sync()
        self.close()
        for folder in {path.parent for path in self.content.rglob("*")} | {self.folder}:
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

    def _append_to_tar(self, provenance: bytes) -> None:
        header = _tar_header(PROVENANCE, len(provenance))
        end = self._tar_end + len(header) + len(provenance)
        self._tar.write(np.frombuffer(header + provenance, np.uint8), self._tar_end)
        end += -end % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE
        os.ftruncate(self._tar.descriptor, end + -end % _TAR_RECORD)

    def publish(self) -> None:
        """Give the sealed output its final name in one step; what had the name moves here."""
        if self.final.is_dir() or (self.final.exists() and self.content.is_dir()):
            exchange(self.content, self.final)
        else:
            self.content.replace(self.final)
        fsync_directory(self.final.parent)

    def close(self) -> None:
        """Close all files."""
        for file in self._opened.values():
            file.close()
        self._opened.clear()

    def clear(self) -> None:
        """Remove what another merge left in the hidden folder."""
        for path in self.folder.glob("*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def discard(self) -> None:
        """Remove everything that was written."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _tar(self) -> DirectFile:
        return self._file("")

    def _file(self, name: str) -> DirectFile:
        key = "" if self.is_tar else name
        with self._opening:
            if key not in self._opened:
                path = self.content if self.is_tar else self.content / name
                path.parent.mkdir(parents=True, exist_ok=True)
                self._opened[key] = DirectFile(path, os.O_RDWR | os.O_CREAT)
            return self._opened[key]

    def _pread(self, name: str, size: int, offset: int) -> bytes:
        return os.pread(self._file(name).descriptor, size, offset + self._bases.get(name, 0))

    def _pwrite(self, name: str, data: bytes | np.ndarray, offset: int) -> None:
        self._file(name).write(np.frombuffer(data, np.uint8), offset + self._bases.get(name, 0))


def _set_size(descriptor: int, size: int) -> None:
    os.ftruncate(descriptor, size)
    reserve(descriptor, size)


def check_space(outputs: list[Output]) -> None:
    """Raise before the first write if the outputs do not fit.

    Raises:
        OSError: says how much is missing where.
    """
    needed: dict[int, int] = {}
    for output in outputs:
        folder = next(path for path in output.final.absolute().parents if path.is_dir())
        device = folder.stat().st_dev
        needed[device] = needed.get(device, 0) + output.missing_bytes()
        free = shutil.disk_usage(folder).free
        if needed[device] > free:
            raise OSError(
                f"{folder} has {free / 1e9:.2f} GB free, the outputs need "
                f"{needed[device] / 1e9:.2f} GB; free some space or write elsewhere"
            )


def exchange(first: Path, second: Path) -> None:
    """Swap two paths atomically (Linux renameat2), so that no moment lacks either."""
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(first), os.fsencode(second)
    if libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot replace {second} ({os.strerror(code)}); remove it first")


def _tar_header(name: str, size: int) -> bytes:
    """A header that depends on nothing but name and size: no owner, no time."""
    info = tarfile.TarInfo(f"./{name}")
    info.size, info.mode, info.mtime = size, 0o644, 0
    return info.tobuf(tarfile.PAX_FORMAT)
