"""torch.save files: find the raw bytes of every tensor inside, and lay out new ones.

A torch.save file is a zip of stored (uncompressed) records: ``data.pkl`` describes the tensors,
``data/<key>`` holds one storage each. Reading needs no torch.load: the restricted unpickler gives
dtype, shape and storage of each tensor and the zip directory gives byte ranges and CRC-32s.

Writing reproduces the layout of torch's own writer (caffe2/serialize/inline_container.cc: records
aligned to 64 bytes by an ``FB`` extra field, sizes in data descriptors, zip64 end records), so
that an output of the same dtype has the same offsets and lengths as the input. All offsets are
known before any data is: tensor bytes go to their final place and CRCs are filled in last.
"""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass, replace
from typing import Any

from nemo_warp.checkpoints.containers.archive import RangeReader, read_record
from nemo_warp.checkpoints.containers.unpickling import load_tensor_pickle
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.io.crc import crc32
from nemo_warp.checkpoints.record import Record

MAX_DIRECTORY_BYTES = 1 << 24
"""For some 150 000 records; a parsed one takes ten times the memory."""
MAX_PICKLE_BYTES = 1 << 28
ALIGNMENT = 64
"""Of records in the file, as torch.save has it."""
_LIMIT32 = 0xFFFFFFFF
_LOCAL_HEADER_BYTES = 30


@dataclass(frozen=True)
class TorchZip:
    """A parsed torch.save file.

    Attributes:
        entries: name inside the zip (with its leading folder) -> bytes, in stored order.
        folder: the leading folder of all entries, ``archive`` or the file's stem.
        pickle: contents of ``data.pkl``.
        root: its object tree, with tensors as `StoredTensor`.
        what: its name for messages.
    """

    entries: dict[str, Record]
    folder: str
    pickle: bytes
    root: Any
    what: str

    def storage(self, key: str) -> Record:
        """Bytes of the storage ``key``.

        Raises:
            CheckpointError: ``data.pkl`` refers to a storage that is not there.
        """
        try:
            return self.entries[f"{self.folder}/data/{key}"]
        except KeyError:
            raise CheckpointError(f"{self.what} lacks its record data/{key}") from None


def read_torch_zip(record: Record, what: str) -> TorchZip:
    """Parse the torch.save file in ``record``.

    Raises:
        CheckpointError: truncated, damaged, compressed, big-endian or hostile.
    """
    try:
        with RangeReader(record, MAX_DIRECTORY_BYTES) as stream, zipfile.ZipFile(stream) as archive:
            infos = archive.infolist()
            entries = {info.filename: _locate(stream, record, info) for info in infos}
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from error
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
        raise CheckpointError(f"{what} is not a torch.save file ({error})") from error
    # 0 in all entries means that checksums were switched off, not that every one is 0.
    if all(entry.crc32 == 0 for entry in entries.values()):  # torch's set_crc32_options(False)
        entries = {name: replace(entry, crc32=None) for name, entry in entries.items()}
    folder = next((n[: -len("/data.pkl")] for n in entries if n.endswith("/data.pkl")), None)
    if folder is None or len(entries) != len(infos):
        raise CheckpointError(f"{what} is a zip but not one that torch.save wrote")
    pickle = _read_checked(entries[f"{folder}/data.pkl"], f"{what}: data.pkl")
    # Absent in files of older versions of torch.
    byteorder = entries.get(f"{folder}/byteorder")
    if byteorder is not None and _read_checked(byteorder, f"{what}: byteorder") != b"little":
        raise CheckpointError(f"{what} was written on a big-endian machine")
    return TorchZip(entries, folder, pickle, load_tensor_pickle(pickle, what), what)


def _locate(stream: RangeReader, record: Record, info: zipfile.ZipInfo) -> Record:
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise CheckpointError(f"{info.filename} is compressed or encrypted")
    # The central directory does not tell where data begins: the local header has an extra field of
    # its own (torch's padding).
    stream.seek(info.header_offset)
    header = stream.read(_LOCAL_HEADER_BYTES)
    if len(header) < _LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
        raise CheckpointError(f"{info.filename} has no local header; the file is damaged")
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    start = info.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    # Stored, so both sizes are equal; zipfile would notice only when it read the data.
    if info.file_size != info.compress_size or start + info.file_size > record.size:
        raise CheckpointError(f"{info.filename} ends outside the file; it is truncated or damaged")
    return Record(record.path, record.offset + start, info.file_size, info.CRC)


def _read_checked(record: Record, what: str) -> bytes:
    data = read_record(record, MAX_PICKLE_BYTES, what)
    if record.crc32 is not None and crc32(data) != record.crc32:
        raise CheckpointError(f"{what} does not match its CRC-32; the file is damaged")
    return data


@dataclass(frozen=True)
class ZipEntry:
    """An entry of a zip to be written: its name, and its bytes or, if written later, its size."""

    name: str
    size: int
    content: bytes | Record | None = None


class ZipImage:
    """Byte layout of a torch.save zip before its data exists.

    Attributes:
        size: total bytes.
        data_offsets: where each entry's data begins, in order.
    """

    def __init__(self, entries: list[ZipEntry]):
        self.entries = entries
        self.header_offsets: list[int] = []
        self.data_offsets: list[int] = []
        self._headers: list[bytes] = []
        cursor = 0
        for entry in entries:
            header = _local_header(entry, cursor)
            self.header_offsets.append(cursor)
            self._headers.append(header)
            self.data_offsets.append(cursor + len(header))
            # The length of what comes last does not depend on the CRC-32, so 0 stands for it.
            cursor += len(header) + entry.size + len(_descriptor(entry, cursor, 0))
        self._directory_offset = cursor
        self.size = cursor + len(self._directory([0] * len(entries)))

    def headers(self) -> list[tuple[int, bytes]]:
        """(offset, bytes) of everything that does not depend on data."""
        return list(zip(self.header_offsets, self._headers, strict=True))

    def trailers(self, crcs: list[int]) -> list[tuple[int, bytes]]:
        """(offset, bytes) of data descriptors and central directory, given each entry's CRC-32."""
        pieces = [
            (data + entry.size, _descriptor(entry, header, crc))
            for entry, header, data, crc in zip(
                self.entries, self.header_offsets, self.data_offsets, crcs, strict=True
            )
        ]
        return [*pieces, (self._directory_offset, self._directory(crcs))]

    def _directory(self, crcs: list[int]) -> bytes:
        items = zip(self.entries, self.header_offsets, crcs, strict=True)
        central = b"".join(_central_header(*item) for item in items)
        return central + _end_records(len(self.entries), len(central), self._directory_offset)


def _zip64_values(entry: ZipEntry, header_offset: int) -> list[int]:
    # Only fields that overflow 32 bits are in the zip64 extra field, in this order (APPNOTE 4.5.3).
    sizes = [entry.size, entry.size] if entry.size >= _LIMIT32 else []
    return sizes + ([header_offset] if header_offset >= _LIMIT32 else [])


def _zip64_extra(values: list[int]) -> bytes:
    return struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""


def _local_header(entry: ZipEntry, cursor: int) -> bytes:
    name = entry.name.encode()
    zip64 = _zip64_extra(_zip64_values(entry, cursor))
    # 4 bytes for the padding field's own head, "FB" and its length.
    start = cursor + _LOCAL_HEADER_BYTES + len(name) + len(zip64) + 4
    padding = -start % ALIGNMENT
    extra = zip64 + b"FB" + struct.pack("<H", padding) + b"Z" * padding
    # Flags 0x0808: sizes and CRC-32 follow the data (bit 3), the name is UTF-8 (bit 11).
    fixed = struct.pack(
        "<4s5H3L2H", b"PK\x03\x04", 0, 0x0808, 0, 0, 0, 0, 0, 0, len(name), len(extra)
    )
    return fixed + name + extra


def _descriptor(entry: ZipEntry, header_offset: int, crc: int) -> bytes:
    kind = "<4sLQQ" if _zip64_values(entry, header_offset) else "<4sLLL"
    return struct.pack(kind, b"PK\x07\x08", crc, entry.size, entry.size)


def _central_header(entry: ZipEntry, header_offset: int, crc: int) -> bytes:
    name = entry.name.encode()
    zip64 = _zip64_extra(_zip64_values(entry, header_offset))
    size, offset = min(entry.size, _LIMIT32), min(header_offset, _LIMIT32)
    fixed = struct.pack(
        "<4s6H3L5H2L",
        *(b"PK\x01\x02", 0, 0, 0x0808, 0, 0, 0, crc, size, size),
        *(len(name), len(zip64), 0, 0, 0, 0, offset),
    )
    return fixed + name + zip64


def _end_records(count: int, directory_bytes: int, directory_offset: int) -> bytes:
    end = directory_offset + directory_bytes
    # torch writes zip64 end records always, also for small files: 0x031E is version 3.0 on UNIX,
    # 0x2D is version 4.5, the first with zip64; 44 is what is left of the record after this field.
    zip64_end = struct.pack(
        "<4sQHHLLQQQQ",
        *(b"PK\x06\x06", 44, 0x031E, 0x2D, 0, 0, count, count, directory_bytes, directory_offset),
    )
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
    short = min(count, 0xFFFF)
    sizes = min(directory_bytes, _LIMIT32), min(directory_offset, _LIMIT32)
    return (
        zip64_end + locator + struct.pack("<4s4HLLH", b"PK\x05\x06", 0, 0, short, short, *sizes, 0)
    )
