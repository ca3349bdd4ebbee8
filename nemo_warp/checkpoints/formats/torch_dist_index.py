"""The contents of a ``torch_dist`` directory: every item, checked, with its place on disk.

``.metadata`` maps each key to its shards and each shard to [offset, length) of a ``.distcp`` file,
where a complete torch.save file of that shard lies (torch/distributed/checkpoint/filesystem.py,
``_write_item``). It is a pickle and read with the restricted unpickler.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from nemo_warp.checkpoints.containers import dcp_metadata as dcp
from nemo_warp.checkpoints.containers.archive import MAX_SMALL_FILE_BYTES, read_record
from nemo_warp.checkpoints.containers.torch_zip import TorchZip, read_torch_zip
from nemo_warp.checkpoints.containers.unpickling import StoredTensor, load_metadata_pickle
from nemo_warp.checkpoints.dtypes import Dtype
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.record import Record

_MAX_AXES = 16


@dataclass(frozen=True, eq=False)
class Item:
    """One entry of a ``.distcp`` file; ``chunk`` is set for tensors."""

    key: str
    chunk: dcp.ChunkStorageMetadata | None
    file: str
    record: Record


class TorchDistIndex:
    """Items of a ``torch_dist`` directory.

    Args:
        members: file name -> bytes, relative to the directory.
        where: the checkpoint's name for messages.

    Raises:
        CheckpointError: incomplete, damaged or hostile.
    """

    def __init__(self, members: dict[str, Record], where: str):
        self.members, self.where = members, where
        if ".metadata" not in members:
            raise CheckpointError(f"{where} holds no .metadata; the checkpoint is incomplete")
        pickled = read_record(members[".metadata"], MAX_SMALL_FILE_BYTES, f"{where}: .metadata")
        self.metadata = load_metadata_pickle(pickled, f"{where}: .metadata")
        self._chunks = _described_chunks(self.metadata, where)
        self.items = list(self._list_items())
        self._refuse_overlaps()
        self._zips: dict[Item, TorchZip] = {}

    def described(self, key: str) -> dcp.TensorStorageMetadata:
        """Shape and dtype of a tensor's key."""
        return cast("dcp.TensorStorageMetadata", self.metadata.state_dict_metadata[key])

    def is_floating(self, item: Item) -> bool:
        """Whether the item is a shard of a floating tensor that has elements."""
        if item.chunk is None:
            return False
        described = self.described(item.key)
        return described.properties.dtype.is_floating_point and math.prod(described.size) > 0

    def zip(self, item: Item) -> TorchZip:
        """The item's torch.save file."""
        # Items compare by identity (eq=False), so this is one parse for each stored shard.
        if item not in self._zips:
            self._zips[item] = read_torch_zip(item.record, f"{self.where}: {item.key}")
        return self._zips[item]

    def stored(self, item: Item) -> StoredTensor:
        """The tensor in the item's file.

        Raises:
            CheckpointError: it is not what ``.metadata`` says.
        """
        tensor, dtype = self.zip(item).root, self.described(item.key).properties.dtype
        assert item.chunk is not None, item.key
        sizes = tuple(item.chunk.sizes)
        # dtype and shape are stored twice, in .metadata and in the item: bytes are read by one of
        # them, so the two must agree.
        is_tensor = isinstance(tensor, StoredTensor) and tensor.is_contiguous
        if not is_tensor or tensor.shape != sizes or tensor.storage.dtype != dtype:
            raise CheckpointError(
                f"{self.where}: a shard of {item.key} is not a contiguous {dtype} tensor of shape "
                f"{list(sizes)} as .metadata says; the checkpoint is damaged"
            )
        return tensor

    def _list_items(self) -> Iterator[Item]:
        storage = self.metadata.storage_data
        if not isinstance(storage, dict):
            raise CheckpointError(f"{self.where}: .metadata locates no data")
        for index, info in storage.items():
            if not isinstance(index, dcp.MetadataIndex) or not _is_place(info):
                raise CheckpointError(f"{self.where}: .metadata has a malformed storage entry")
            # torch 2.7 and later can compress items; byte ranges of those are no tensors.
            if getattr(info, "transform_descriptors", None):
                raise CheckpointError(f"{self.where}: {index.fqn} is stored compressed")
            chunk = None
            if index.fqn in self._chunks:
                # offset is None for a tensor of no dimensions and for objects that are no tensors.
                chunk = self._chunks[index.fqn].get(tuple(index.offset or ()))
                if chunk is None:
                    raise CheckpointError(f"{self.where}: {index.fqn} has an undescribed shard")
            yield Item(index.fqn, chunk, info.relative_path, self._range(index.fqn, info))

    def _refuse_overlaps(self) -> None:
        """Items that share bytes could claim more than the files have, any number of times."""
        by_place = sorted(self.items, key=lambda item: (item.file, item.record.offset))
        for one, other in itertools.pairwise(by_place):
            end = one.record.offset + one.record.size
            if one.file == other.file and other.record.offset < end:
                raise CheckpointError(
                    f"{self.where}: {one.key} and {other.key} share bytes of {one.file}; "
                    "the checkpoint is damaged"
                )

    def _range(self, key: str, info: dcp.StorageInfo) -> Record:
        name = info.relative_path
        if (file := self.members.get(name)) is None:
            raise CheckpointError(f"{self.where}: {key} lies in {name!r}, which is not there")
        if info.offset + info.length > file.size:
            raise CheckpointError(
                f"{self.where}: {key} ends at byte {info.offset + info.length} of {name}, which "
                f"has {file.size}; the checkpoint is truncated"
            )
        return Record(file.path, file.offset + info.offset, info.length)


def _is_place(info: object) -> bool:
    """Whether a storage entry names a file and a range; unpickling fills in anything at all."""
    place = vars(info) if isinstance(info, dcp.StorageInfo) else {}
    numbers = place.get("offset"), place.get("length")
    whole = all(isinstance(number, int) and number >= 0 for number in numbers)
    return whole and isinstance(place.get("relative_path"), str)


def _described_chunks(
    metadata: dcp.Metadata, where: str
) -> dict[str, dict[tuple, dcp.ChunkStorageMetadata]]:
    """Key -> shard offsets -> chunk, after checking that every description is well formed."""
    if not isinstance(metadata.state_dict_metadata, dict):
        raise CheckpointError(f"{where}: .metadata describes nothing")
    result: dict[str, dict[tuple, dcp.ChunkStorageMetadata]] = {}
    for key, described in metadata.state_dict_metadata.items():
        if isinstance(described, dcp.BytesStorageMetadata):
            continue
        if not isinstance(key, str) or not _is_well_formed(described):
            raise CheckpointError(f"{where}: .metadata describes {key!r} in a malformed way")
        result[key] = {tuple(chunk.offsets): chunk for chunk in described.chunks}
    return result


def _is_well_formed(described: Any) -> bool:
    try:
        dims = len(described.size)
        shapes = [described.size]
        for chunk in described.chunks:
            shapes += [chunk.offsets, chunk.sizes]
        plain = all(isinstance(shape, dcp.Size) and len(shape) == dims for shape in shapes)
        positive = all(size >= 0 for shape in shapes for size in shape)
        is_dtype = isinstance(described.properties.dtype, Dtype)
    except (AttributeError, TypeError):
        return False
    return plain and positive and is_dtype and dims <= _MAX_AXES
