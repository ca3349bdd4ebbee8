"""Megatron-core ``torch_dist`` checkpoints: logical tensors, fp32 masters, output layout.

``common.pt`` and all items that are not floating tensors of the model are copied as bytes, never
loaded; optimizer state is left out of outputs.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from nemo_warp.checkpoints.containers import dcp_metadata as dcp
from nemo_warp.checkpoints.containers.image import CheckpointImage, DtypeRule, FileImage, zip_image
from nemo_warp.checkpoints.containers.torch_zip import ALIGNMENT
from nemo_warp.checkpoints.dtypes import Dtype
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.formats.torch_dist_index import Item, TorchDistIndex
from nemo_warp.checkpoints.logical import LogicalTensor
from nemo_warp.checkpoints.names import DROPPED, logical_tensors, model_keys
from nemo_warp.checkpoints.record import Record
from nemo_warp.checkpoints.stored import Block, StackedTensor

MASTERS = re.compile(r"^(?:chained_\d+\.)?optimizer\.state\.(?:fp32_)?param\.")
"""Prefix of fp32 copies of parameters (megatron/core/optimizer/distrib_optimizer.py).

``fully_reshardable`` says ``param``; several optimizers (MoE) come before it as ``chained_N``.
"""

# integrity.json (Megatron-core from 0.18) holds hashes of the files as they were.
_REMADE = ("metadata.json", ".metadata", "integrity.json")
_FLATTENED = "nd_reformulated_orig_global_shape"

Placed = tuple[Item, Record, int, Dtype]
"""An item, where its tensor's bytes are, the tensor's first element there, its dtype."""


class TorchDistStore:
    """A ``torch_dist`` directory inside an archive.

    Attributes:
        tensors: canonical name -> floating tensor of the model.

    Raises:
        CheckpointError: incomplete, damaged or hostile.
    """

    def __init__(self, members: dict[str, Record], where: str):
        self.where, self._index = where, TorchDistIndex(members, where)
        self.names = model_keys({item.key for item in self._index.items})
        merged = [item for item in self._index.items if self._is_merged(item)]
        self.tensors = self._logical(self._place_stored(merged), self.names)

    @property
    def foreign(self) -> list[str]:
        """Keys that are not the model's (optimizer, random states)."""
        return sorted({item.key for item in self._index.items} - self.names.keys())

    @property
    def others(self) -> dict[str, Dtype]:
        """Canonical name -> dtype of the model's tensors that are not floating."""
        keys = {item.key for item in self._index.items if item.chunk is not None}
        dtypes = {key: self._index.described(key).properties.dtype for key in keys}
        named = {self.names[key]: dtype for key, dtype in dtypes.items() if key in self.names}
        return {name: dtype for name, dtype in named.items() if not dtype.is_floating_point}

    def masters(self) -> dict[str, LogicalTensor]:
        """Canonical name -> fp32 copy in the optimizer state, for the parameters that have one."""
        items = [i for i in self._index.items if MASTERS.match(i.key) and i.chunk is not None]
        full = {item.key: MASTERS.sub("", item.key) for item in items}
        names = model_keys(set(full.values()))
        named = {key: names[bare] for key, bare in full.items() if bare in names}
        return self._logical(self._place_stored(i for i in items if i.key in named), named)

    def image(self, rule: DtypeRule, prefix: str) -> CheckpointImage:
        """Layout of an output with this checkpoint's files, keys and shards."""
        files: dict[str, FileImage] = {}
        moved: dict[Item, dcp.StorageInfo] = {}
        placed: list[Placed] = []
        kept = [item for item in self._index.items if not DROPPED.match(item.key)]
        for item in sorted(kept, key=lambda i: (i.file, i.record.offset)):
            file = files.setdefault(item.file, FileImage(prefix + item.file))
            offset = file.align(ALIGNMENT)  # so that no element lies across two pages
            if self._is_merged(item):
                placed.append(self._append(item, file, rule))
            else:
                file.append(item.record)
            moved[item] = dcp.StorageInfo(item.file, offset, file.size - offset)
        data_files = {item.file for item in self._index.items}
        for name, record in self._index.members.items():
            if name not in data_files and name not in _REMADE:
                files[name] = FileImage(prefix + name)
                files[name].append(record)
        files[".metadata"] = FileImage(f"{prefix}.metadata")
        files[".metadata"].append(self._new_metadata(moved, rule))
        files["metadata.json"] = FileImage(f"{prefix}metadata.json")  # last: marks completeness
        files["metadata.json"].append(self._index.members["metadata.json"])
        return CheckpointImage(list(files.values()), self._logical(placed, self.names))

    def _is_merged(self, item: Item) -> bool:
        return item.key in self.names and self._index.is_floating(item)

    def _place_stored(self, items: Iterable[Item]) -> Iterator[Placed]:
        for item in items:
            tensor = self._index.stored(item)
            record = self._index.zip(item).storage(tensor.storage.key)
            yield item, record, tensor.offset, tensor.storage.dtype

    def _append(self, item: Item, file: FileImage, rule: DtypeRule) -> Placed:
        tensor, source = self._index.stored(item), self._index.zip(item)
        dtype, key = rule(tensor.storage.dtype), tensor.storage.key
        size = tensor.storage.numel * dtype.itemsize
        image = zip_image(source, {key: size}, rule)
        slot = list(source.entries).index(f"{source.folder}/data/{key}")
        offset = file.append_zip(image) + image.data_offsets[slot]
        return item, file.hole(offset, size), tensor.offset, dtype

    def _logical(self, placed: Iterable[Placed], names: dict[str, str]) -> dict[str, LogicalTensor]:
        blocks: dict[str, list[Block]] = defaultdict(list)
        dtypes: dict[str, Dtype] = {}
        for item, record, start, dtype in placed:
            blocks[item.key].extend(self._blocks(item, record, start * dtype.itemsize, dtype))
            dtypes[item.key] = dtype
        stacked = (
            (names[key], StackedTensor(key, self._shape(key), dtypes[key], tuple(found)))
            for key, found in blocks.items()
        )
        return logical_tensors(stacked, self.where)

    def _shape(self, key: str) -> tuple[int, ...]:
        """The tensor's shape, also if it is stored flattened for the distributed optimizer."""
        mcore = getattr(self._index.metadata, "mcore_data", None)
        # mcore_data is Megatron-core's addition to torch's Metadata (strategies/torch.py
        # l.281).
        entry = mcore.get(key) if isinstance(mcore, dict) else None
        original = entry.get(_FLATTENED) if isinstance(entry, dict) else None
        stored = tuple(self._index.described(key).size)
        if original is None:
            return stored
        shape = tuple(original)
        fits = len(stored) == len(shape) + 1 and all(isinstance(n, int) and n > 0 for n in shape)
        if not fits or any(g < 1 or n % g for n, g in zip(shape, stored, strict=False)):
            raise CheckpointError(
                f"{self.where}: {key} is flattened in a way that is not understood"
            )
        return shape

    def _blocks(self, item: Item, record: Record, start: int, dtype: Dtype) -> Iterator[Block]:
        assert item.chunk is not None, item.key
        offsets, sizes = tuple(item.chunk.offsets), tuple(item.chunk.sizes)
        shape, stored = self._shape(item.key), tuple(self._index.described(item.key).size)
        if len(shape) == len(stored):
            yield Block(offsets, sizes, record, start)
            return
        # [X, Y] cut into a grid of [x, y] parts is stored as [X/x, Y/y, x*y], ranges of the last
        # axis going to different ranks (megatron/core/dist_checkpointing/strategies/torch.py).
        local = tuple(n // grid for n, grid in zip(shape, stored, strict=False))
        corner = tuple(n * part for n, part in zip(local, offsets, strict=False))
        begin, end = offsets[-1], offsets[-1] + sizes[-1]
        if any(size != 1 for size in sizes[:-1]) or end > math.prod(local):
            raise CheckpointError(f"{self.where}: a flattened shard of {item.key} is malformed")
        for inner, extent in boxes_of_range(local, begin, end):
            place = tuple(c + i for c, i in zip(corner, inner, strict=True))
            yield Block(place, extent, record, start)
            start += math.prod(extent) * dtype.itemsize

    def _new_metadata(self, moved: dict[Item, dcp.StorageInfo], rule: DtypeRule) -> bytes:
        """``.metadata`` built afresh from what was understood of the old one."""
        # Built afresh and not edited: nothing of an untrusted pickle goes into the output.
        described: dict[str, dcp.TensorStorageMetadata | dcp.BytesStorageMetadata] = {}
        for item in moved:
            if item.chunk is None:
                described[item.key] = dcp.BytesStorageMetadata()
                continue
            old = self._index.described(item.key)
            dtype = old.properties.dtype
            properties = dcp.TensorProperties(dtype=rule(dtype) if self._is_merged(item) else dtype)
            described[item.key] = dcp.TensorStorageMetadata(properties, old.size, old.chunks)
        storage = {
            dcp.MetadataIndex(item.key, dcp.Size(item.chunk.offsets) if item.chunk else None): info
            for item, info in moved.items()
        }
        # torch's planner wants the path of each key in the state dict, also where the old one had
        # none.
        paths = {key: (key,) for key in described} | _paths(self._index.metadata, described)
        # mcore_data describes flattened optimizer tensors, which are not kept.
        new = dcp.Metadata(described, planner_data=paths, storage_data=storage, mcore_data={})
        return dcp.dump(new)


def boxes_of_range(
    shape: tuple[int, ...], begin: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes (offsets, sizes) that make up flat elements [begin, end) of a shape, in order."""
    if len(shape) == 1:
        yield (begin,), (end - begin,)
        return
    inner = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(begin, inner), divmod(end, inner)
    # A range is a ragged first row, whole rows, and a ragged last row: at most 2 dims - 1 boxes.
    if first == last:
        for offsets, sizes in boxes_of_range(shape[1:], head, tail):
            yield (first, *offsets), (1, *sizes)
        return
    if head:
        for offsets, sizes in boxes_of_range(shape[1:], head, inner):
            yield (first, *offsets), (1, *sizes)
        first += 1
    if last > first:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if tail:
        for offsets, sizes in boxes_of_range(shape[1:], 0, tail):
            yield (last, *offsets), (1, *sizes)


def _paths(metadata: dcp.Metadata, keys: Iterable[str]) -> dict[str, tuple]:
    """The planner's paths of ``keys`` in the state dict, if they are plain text and numbers."""
    data = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    found = {key: data[key] for key in keys if isinstance(data.get(key), tuple)}
    return {k: path for k, path in found.items() if all(isinstance(p, str | int) for p in path)}
