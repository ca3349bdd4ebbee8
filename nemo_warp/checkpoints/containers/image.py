"""The output checkpoint before it exists: files, sizes, fixed bytes, and holes for tensors.

An image mirrors the init's files. Everything except merged tensor bytes and checksums is known in
advance, so tensors can be written by anyone, in any order, at their final offsets.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nemo_warp.checkpoints.containers.archive import read_record
from nemo_warp.checkpoints.containers.torch_zip import (
    MAX_PICKLE_BYTES,
    TorchZip,
    ZipEntry,
    ZipImage,
)
from nemo_warp.checkpoints.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Dtype
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.logical import LogicalTensor
from nemo_warp.checkpoints.record import Record

DtypeRule = Callable[[Dtype], Dtype]
"""Output dtype of a floating tensor, given its dtype in the init."""

_STORAGE_NAMES = {
    FLOAT64: "DoubleStorage",
    FLOAT32: "FloatStorage",
    FLOAT16: "HalfStorage",
    BFLOAT16: "BFloat16Storage",
}


@dataclass
class FileImage:
    """One output file.

    Attributes:
        name: path relative to the checkpoint.
        pieces: (offset, literal bytes or bytes to copy from the init).
        zips: (offset, torch.save zip whose checksums are filled in at the end).
    """

    name: str
    size: int = 0
    pieces: list[tuple[int, bytes | Record]] = field(default_factory=list)
    zips: list[tuple[int, ZipImage]] = field(default_factory=list)

    def align(self, size: int) -> int:
        """Go on at a multiple of ``size`` bytes, after zeros; returns the offset."""
        # -n % m is what is missing to the next multiple.
        self.size += -self.size % size
        return self.size

    def append(self, content: bytes | Record) -> int:
        """Add bytes at the end; returns their offset."""
        offset = self.size
        self.pieces.append((offset, content))
        self.size += content.size if isinstance(content, Record) else len(content)
        return offset

    def append_zip(self, image: ZipImage) -> int:
        """Add a torch.save zip at the end; returns its offset."""
        offset = self.size
        self.zips.append((offset, image))
        # Entries without content are the holes: merged bytes are written there later.
        for data_offset, entry in zip(image.data_offsets, image.entries, strict=True):
            if entry.content is not None:
                self.pieces.append((offset + data_offset, entry.content))
        self.size += image.size
        return offset

    def hole(self, offset: int, size: int) -> Record:
        """The place of merged bytes in this file, as a record with a relative path."""
        return Record(Path(self.name), offset, size)


@dataclass
class CheckpointImage:
    """All output files, and where each logical tensor goes in them."""

    files: list[FileImage]
    tensors: dict[str, LogicalTensor]


def zip_image(source: TorchZip, holes: dict[str, int], rule: DtypeRule) -> ZipImage:
    """Image of a torch.save file whose storages ``holes`` (key -> bytes) are rewritten.

    Everything else is copied; ``data.pkl`` is copied with floating storages renamed to the
    dtype that ``rule`` gives them.
    """
    entries = []
    for name, record in source.entries.items():
        key = name.removeprefix(f"{source.folder}/data/")
        # "data/<key>" are storages; all else (version, byteorder, .data/serialization_id) is
        # copied.
        if key != name and key in holes:
            entries.append(ZipEntry(name, holes[key]))
        elif name == f"{source.folder}/data.pkl":
            content = retype_pickle(source.pickle, rule)
            entries.append(ZipEntry(name, len(content), content))
        elif key != name:
            entries.append(ZipEntry(name, record.size, record))
        else:
            content = read_record(record, MAX_PICKLE_BYTES, name)
            entries.append(ZipEntry(name, len(content), content))
    return ZipImage(entries)


def retype_pickle(pickle: bytes, rule: DtypeRule) -> bytes:
    """``data.pkl`` with its floating storage classes renamed according to ``rule``.

    Raises:
        CheckpointError: the pickle names storages in an unusual way.
    """
    changed = {
        # Opcode "c" (GLOBAL) with two lines, module and name: torch.save writes protocol 2, where a
        # storage's class is all that tells its dtype.
        f"torch {name}": f"ctorch\n{_STORAGE_NAMES[rule(dtype)]}\n".encode()
        for dtype, name in _STORAGE_NAMES.items()
        if rule(dtype) != dtype
    }
    if not changed:
        return pickle
    parts, end = [], 0
    for opcode, argument, position in pickletools.genops(pickle):
        assert position is not None  # as bytes are read, not a stream that cannot tell
        if opcode.name == "STACK_GLOBAL":
            # From protocol 4 on names lie on the stack and are memoised: text cannot be replaced in
            # place.
            raise CheckpointError("a data.pkl of this pickle protocol cannot change its dtype")
        if opcode.name == "GLOBAL" and argument in changed:
            # GLOBAL has no length or address in it, and nothing in a pickle counts bytes from its
            # start, so its parts may change their length.
            parts += [pickle[end:position], changed[argument]]
            end = position + len(f"c{argument}\n".encode())
    return b"".join([*parts, pickle[end:]])
