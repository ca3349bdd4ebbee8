"""Megatron-core ``zarr`` checkpoints (up to 0.15): one folder per key, one raw file per shard.

Each folder holds ``.zarray`` (shape, chunk shape, dtype; never compressed) and chunk files named
by their grid position, ``0.1.0``. bfloat16 is written literally, which stock zarr cannot read, so
the few fields are parsed here. The format has no checksums: damage is seen only in sizes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

from nemo_warp.checkpoints.containers.archive import read_record
from nemo_warp.checkpoints.containers.image import CheckpointImage, DtypeRule, FileImage
from nemo_warp.checkpoints.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, INT8, UINT8, Dtype
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.logical import LogicalTensor
from nemo_warp.checkpoints.names import DROPPED, MAX_PATCHES, logical_tensors, model_keys
from nemo_warp.checkpoints.record import Record
from nemo_warp.checkpoints.stored import Block, StackedTensor

DESCRIPTION = ".zarray"
_MAX_DESCRIPTION_BYTES = 1 << 16
_FLOATS = {
    # numpy has no bfloat16: Megatron-core writes its name over numpy's "<V2" (strategies/zarr.py
    # l.168-171), some writers left it.
    **{"bfloat16": BFLOAT16, "<V2": BFLOAT16, "<f2": FLOAT16},
    **{"<f4": FLOAT32, "<f8": FLOAT64},
}
_BYTES = {"|i1": INT8, "|u1": UINT8}
_NAMES = {BFLOAT16: "bfloat16", FLOAT16: "<f2", FLOAT32: "<f4"}

Locate = Callable[[str, str, Record, Dtype], tuple[Record, Dtype]]


class ZarrStore:
    """A ``zarr`` directory inside an archive.

    Args:
        members: file name -> bytes, relative to the directory.
        where: the checkpoint's name for messages.

    Raises:
        CheckpointError: incomplete or damaged.
    """

    def __init__(self, members: dict[str, Record], where: str):
        self.members, self.where = members, where
        keys = [
            name[: -len(DESCRIPTION) - 1] for name in members if name.endswith(f"/{DESCRIPTION}")
        ]
        self._described = {key: self._describe(key) for key in keys}
        self.names = model_keys(keys)
        self.tensors = self._logical(lambda key, name, record, dtype: (record, dtype))

    @property
    def foreign(self) -> list[str]:
        """Keys that are not the model's."""
        return sorted(self._described.keys() - self.names.keys())

    @property
    def others(self) -> dict[str, Dtype]:
        """Canonical name -> dtype of the model's tensors that are not floating."""
        dtypes = {key: self._described[key]["dtype"] for key in self.names}
        return {self.names[key]: _BYTES[dtype] for key, dtype in dtypes.items() if dtype in _BYTES}

    def masters(self) -> dict[str, LogicalTensor]:
        """None are read from this format: its optimizer tensors are flattened per rank."""
        return {}

    def image(self, rule: DtypeRule, prefix: str) -> CheckpointImage:
        """Layout of an output with this checkpoint's files, keys and shards."""
        files: dict[str, FileImage] = {}

        def hole(key: str, name: str, record: Record, dtype: Dtype) -> tuple[Record, Dtype]:
            # A chunk is a file of nothing but elements: the hole is the whole of it.
            new = rule(dtype)
            file = FileImage(prefix + name, record.size // dtype.itemsize * new.itemsize)
            files[name] = file
            return file.hole(0, file.size), new

        tensors = self._logical(hole)
        for key in self._merged():
            name = f"{key}/{DESCRIPTION}"
            files[name] = FileImage(prefix + name)
            files[name].append(self._new_description(key, rule))
        for name, record in self.members.items():
            if name not in files and not DROPPED.match(name):
                files[name] = FileImage(prefix + name)
                files[name].append(record)
        # metadata.json last: Megatron-core takes a directory without it for unfinished.
        order = [name for name in self.members if name in files and name != "metadata.json"]
        return CheckpointImage([files[name] for name in [*order, "metadata.json"]], tensors)

    def _merged(self) -> Iterator[str]:
        for key in self.names:
            described = self._described[key]
            if described["dtype"] in _FLOATS and math.prod(described["shape"]) > 0:
                yield key

    def _logical(self, locate: Locate) -> dict[str, LogicalTensor]:
        return logical_tensors(
            ((self.names[key], self._stacked(key, locate)) for key in self._merged()), self.where
        )

    def _stacked(self, key: str, locate: Locate) -> StackedTensor:
        described, blocks = self._described[key], []
        shape, sizes = tuple(described["shape"]), tuple(described["chunks"])
        stored = dtype = _FLOATS[described["dtype"]]
        # A tensor of no dimensions has one chunk, called "0".
        for index in product(*(range(n // size) for n, size in zip(shape, sizes, strict=True))):
            name = f"{key}/{described['dimension_separator'].join(map(str, index)) or '0'}"
            record = self.members.get(name)
            size = math.prod(sizes) * stored.itemsize
            if record is None or record.size != size:
                found = "is missing" if record is None else f"has {record.size} bytes"
                raise CheckpointError(f"{self.where}: {name} {found}, expected {size} bytes")
            place, dtype = locate(key, name, record, stored)
            offsets = tuple(i * size for i, size in zip(index, sizes, strict=True))
            blocks.append(Block(offsets, sizes, place, 0))
        return StackedTensor(key, shape, dtype, tuple(blocks))

    def _describe(self, key: str) -> dict[str, Any]:
        what = f"{self.where}: {key}/{DESCRIPTION}"
        data = read_record(self.members[f"{key}/{DESCRIPTION}"], _MAX_DESCRIPTION_BYTES, what)
        try:
            described = {"dimension_separator": ".", **json.loads(data)}
            shape, sizes = described["shape"], described["chunks"]
            plain = all(isinstance(n, int) and n >= 0 for n in [*shape, *sizes])
            plain &= isinstance(described["dtype"], str)
            # zarr would pad chunks at the edge; Megatron-core's shards divide their tensor.
            even = len(shape) == len(sizes) and all(map(_divides, sizes, shape))
            raw = described["order"] == "C" and not (
                described["compressor"] or described["filters"]
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{what} cannot be understood ({error!r})") from error
        if not (plain and even and raw and described["dimension_separator"] in (".", "/")):
            raise CheckpointError(f"{what} is compressed, uneven or malformed")
        count = math.prod(n // size for n, size in zip(shape, sizes, strict=True))
        # No more chunks than there are files, however large the numbers in the JSON are.
        if count > min(MAX_PATCHES, len(self.members)):
            raise CheckpointError(f"{what} claims an absurd number of chunks")
        return described

    def _new_description(self, key: str, rule: DtypeRule) -> bytes | Record:
        described = self._described[key]
        stored = _FLOATS[described["dtype"]]
        record = self.members[f"{key}/{DESCRIPTION}"]
        if rule(stored) == stored:
            return record
        old = json.loads(read_record(record, _MAX_DESCRIPTION_BYTES, key))
        return json.dumps({**old, "dtype": _NAMES[rule(stored)]}, indent=4, sort_keys=True).encode()


def _divides(size: int, whole: int) -> bool:
    return size > 0 and whole % size == 0
