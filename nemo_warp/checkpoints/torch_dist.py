"""Megatron-core ``torch_dist`` checkpoints: read in place, and laid out for the output.

``.metadata`` maps each key to its shards and each shard to [offset, length) of a ``.distcp`` file,
where a complete torch.save file of that shard lies (torch/distributed/checkpoint/filesystem.py,
``_write_item``). ``common.pt`` and non-tensor items are copied as bytes, never loaded.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from nemo_warp.checkpoints.archive import MAX_SMALL_FILE_BYTES, read_record
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.image import CheckpointImage, DtypeRule, FileImage, zip_image
from nemo_warp.checkpoints.logical import LogicalTensor, Record
from nemo_warp.checkpoints.names import Block, StackedTensor, logical_tensors, model_keys
from nemo_warp.checkpoints.torch_zip import TorchZip, read_torch_zip
from nemo_warp.checkpoints.unpickling import StoredTensor, load_metadata_pickle


@dataclass(frozen=True, eq=False)
class _Item:
    """One entry of a ``.distcp`` file; ``chunk`` is set for tensors."""

    key: str
    chunk: dcp.ChunkStorageMetadata | None
    file: str
    record: Record


class TorchDistStore:
    """A ``torch_dist`` directory inside an archive.

    Args:
        members: file name -> bytes, relative to the directory.
        where: the checkpoint's name for messages.

    Raises:
        CheckpointError: incomplete, damaged or hostile.
    """

    def __init__(self, members: dict[str, Record], where: str):
        self.members, self.where = members, where
        self._metadata = load_metadata_pickle(
            read_record(_member(members, ".metadata", where), MAX_SMALL_FILE_BYTES, where),
            f"{where}: .metadata",
        )
        self._shapes = _described_tensors(self._metadata, where)
        self._items = list(self._list_items())
        self.names = model_keys(item.key for item in self._items)
        self._zips: dict[tuple[str, int], TorchZip] = {}
        floating = self._stack([i for i in self._items if self._is_merged(i)])
        self.tensors = self._logical(floating)

    @property
    def foreign(self) -> list[str]:
        """Keys that are not the model's (optimizer, random states)."""
        return sorted({item.key for item in self._items if item.key not in self.names})

    def image(self, rule: DtypeRule, prefix: str, keep_foreign: bool) -> CheckpointImage:
        """Layout of an output with this checkpoint's files, keys and shards."""
        files, moved, entries = {}, {}, []
        for item in sorted(self._items, key=lambda i: (i.file, i.record.offset)):
            if item.key not in self.names and not keep_foreign:
                continue
            file = files.setdefault(item.file, FileImage(prefix + item.file))
            offset = file.size
            if self._is_merged(item):
                entries.append((item, *self._place(item, file, rule)))
            else:
                file.append(item.record)
            moved[item] = _StorageInfo(item.file, offset, file.size - offset)
        files[".metadata"] = FileImage(f"{prefix}.metadata")
        files[".metadata"].append(self._new_metadata(moved, rule))
        for name, record in self.members.items():
            if name not in files and name not in {item.file for item in self._items}:
                files[name] = FileImage(prefix + name)
                files[name].append(record)
        order = [n for n in self.members if n in files and n != "metadata.json"] + ["metadata.json"]
        return CheckpointImage([files[n] for n in order], self._logical(self._stacked(entries)))

    def _list_items(self):
        storage = self._metadata.storage_data
        if not isinstance(storage, dict):
            raise CheckpointError(f"{self.where}: .metadata locates no data")
        for index, info in storage.items():
            if not isinstance(index, dcp.MetadataIndex) or not isinstance(info, _StorageInfo):
                raise CheckpointError(f"{self.where}: .metadata has a malformed storage entry")
            if getattr(info, "transform_descriptors", None):
                raise CheckpointError(f"{self.where}: {index.fqn} is stored compressed")
            record = self._range(index.fqn, info)
            described = self._metadata.state_dict_metadata.get(index.fqn)
            if isinstance(described, dcp.TensorStorageMetadata):
                chunk = self._shapes[index.fqn].get(tuple(index.offset or ()))
                if chunk is None:
                    raise CheckpointError(f"{self.where}: {index.fqn} has an undescribed shard")
                yield _Item(index.fqn, chunk, info.relative_path, record)
            else:
                yield _Item(index.fqn, None, info.relative_path, record)

    def _range(self, key: str, info: _StorageInfo) -> Record:
        numbers = (info.offset, info.length)
        file = self.members.get(info.relative_path)
        if file is None or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise CheckpointError(
                f"{self.where}: {key} should lie in {info.relative_path!r}, which is not there"
            )
        if info.offset + info.length > file.size:
            raise CheckpointError(
                f"{self.where}: {key} ends at byte {info.offset + info.length} of "
                f"{info.relative_path}, which has {file.size}; the checkpoint is truncated"
            )
        return Record(file.path, file.offset + info.offset, info.length)

    def _is_merged(self, item: _Item) -> bool:
        """Whether the item is a floating tensor of the model, with elements."""
        if item.chunk is None or item.key not in self.names:
            return False
        described = self._metadata.state_dict_metadata[item.key]
        return described.properties.dtype.is_floating_point and described.size.numel() > 0

    def _zip(self, item: _Item) -> TorchZip:
        position = (item.file, item.record.offset)
        if position not in self._zips:
            self._zips[position] = read_torch_zip(item.record, f"{self.where}: {item.key}")
        return self._zips[position]

    def _stored(self, item: _Item) -> StoredTensor:
        tensor, described = self._zip(item).root, self._metadata.state_dict_metadata[item.key]
        dtype, sizes = described.properties.dtype, tuple(item.chunk.sizes)
        if (
            not isinstance(tensor, StoredTensor)
            or not tensor.is_contiguous
            or tensor.shape != sizes
            or tensor.storage.dtype != dtype
        ):
            raise CheckpointError(
                f"{self.where}: a shard of {item.key} is not a contiguous {dtype} tensor of shape "
                f"{list(sizes)} as .metadata says; the checkpoint is damaged"
            )
        return tensor

    def _stack(self, items: list[_Item]) -> dict[str, StackedTensor]:
        placed = []
        for item in items:
            tensor = self._stored(item)
            record = self._zip(item).storage(tensor.storage.key)
            placed.append((item, record, tensor.offset, tensor.storage.dtype))
        return self._stacked(placed)

    def _stacked(self, placed) -> dict[str, StackedTensor]:
        """Stored tensors of (item, record, element offset in it, dtype) tuples."""
        blocks, dtypes = defaultdict(list), {}
        for item, record, start, dtype in placed:
            chunk = item.chunk
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            blocks[item.key].append(Block(offsets, sizes, record, start * dtype.itemsize))
            dtypes[item.key] = dtype
        described = self._metadata.state_dict_metadata
        return {
            key: StackedTensor(key, tuple(described[key].size), dtypes[key], tuple(found))
            for key, found in blocks.items()
        }

    def _logical(self, stacked: dict[str, StackedTensor]) -> dict[str, LogicalTensor]:
        return logical_tensors(((self.names[k], v) for k, v in stacked.items()), self.where)

    def _place(self, item: _Item, file: FileImage, rule: DtypeRule):
        """Append the shard's zip to ``file``; returns (record, element offset, dtype)."""
        tensor, source = self._stored(item), self._zip(item)
        dtype = rule(tensor.storage.dtype)
        key, size = tensor.storage.key, tensor.storage.numel * dtype.itemsize
        image = zip_image(source, {key: size}, rule)
        slot = list(source.entries).index(f"{source.folder}/data/{key}")
        offset = file.append_zip(image) + image.data_offsets[slot]
        return file.hole(offset, size), tensor.offset, dtype

    def _new_metadata(self, moved: dict[_Item, _StorageInfo], rule: DtypeRule) -> bytes:
        kept = {item.key for item in moved}
        described = {}
        for key, old in self._metadata.state_dict_metadata.items():
            if key not in kept:
                continue
            if isinstance(old, dcp.TensorStorageMetadata):
                dtype = old.properties.dtype
                merged = key in self.names and dtype.is_floating_point and old.size.numel() > 0
                properties = dcp.TensorProperties(dtype=rule(dtype) if merged else dtype)
                described[key] = dcp.TensorStorageMetadata(properties, old.size, old.chunks)
            else:
                described[key] = dcp.BytesStorageMetadata()
        storage = {
            dcp.MetadataIndex(item.key, item.chunk.offsets if item.chunk else None): info
            for item, info in moved.items()
        }
        paths = {key: path for key, path in _paths(self._metadata).items() if key in kept}
        new = dcp.Metadata(described, planner_data=paths, storage_data=storage)
        new.mcore_data = {}  # describes flattened optimizer tensors, which are not kept
        return pickle.dumps(new, protocol=4)


def _member(members: dict[str, Record], name: str, where: str) -> Record:
    if name not in members:
        raise CheckpointError(f"{where} holds no {name}; the checkpoint is incomplete")
    return members[name]


def _paths(metadata: dcp.Metadata) -> dict[str, tuple]:
    """The planner's key -> path in the state dict, entries of plain text and numbers only."""
    data = metadata.planner_data
    if not isinstance(data, dict):
        return {}
    plain = {k: v for k, v in data.items() if isinstance(k, str) and isinstance(v, tuple)}
    return {k: v for k, v in plain.items() if all(isinstance(part, str | int) for part in v)}


def _described_tensors(metadata: dcp.Metadata, where: str) -> dict[str, dict[tuple, object]]:
    """Key -> shard offsets -> chunk, after checking that every description is well formed."""
    if not isinstance(metadata.state_dict_metadata, dict):
        raise CheckpointError(f"{where}: .metadata describes nothing")
    result: dict[str, dict[tuple, object]] = {}
    for key, described in metadata.state_dict_metadata.items():
        if isinstance(described, dcp.BytesStorageMetadata):
            continue
        try:
            dims = len(described.size)
            chunks = {tuple(chunk.offsets): chunk for chunk in described.chunks}
            ok = isinstance(described.size, torch.Size) and isinstance(key, str)
            ok &= isinstance(described.properties.dtype, torch.dtype)
            ok &= all(s >= 0 for s in described.size) and dims <= 16
            ok &= all(len(c.offsets) == len(c.sizes) == dims for c in described.chunks)
            ok &= all(isinstance(c.sizes, torch.Size) for c in described.chunks)
        except (AttributeError, TypeError):
            ok = False
        if not ok:
            raise CheckpointError(f"{where}: .metadata describes {key!r} in a malformed way")
        result[key] = chunks
    return result
