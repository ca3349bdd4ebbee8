"""Tensors as they are stored: shards of a key, and keys that are parts of one tensor.

From 0.14 on Megatron-core can store a gated ``linear_fc1`` as two keys and every expert as a key
of its own (``singleton_local_shards``: mlp.py and moe/experts.py). Here they become the one tensor
that the usual spelling has, so that both spellings are the same model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nemo_warp.checkpoints.dtypes import Dtype
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.record import Record

_HALF = re.compile(r"^(?P<whole>.*linear_fc1\.(?:weight|bias))_(?P<part>[wv])$")
_HALVES = {"w": 0, "v": 1}
"""Gate and up projection, in the order in which Megatron-core puts them together."""

_EXPERT = re.compile(r"^(?P<head>.*\.experts\.experts)\.(?P<part>\d{1,6})\.(?P<rest>.+)$")


@dataclass(frozen=True)
class Block:
    """A stored shard [offsets, offsets + sizes) of a tensor, row-major at ``start`` in a record."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    record: Record
    start: int

    def along(self, axis: int, by: int) -> Block:
        """The same shard, ``by`` further along an axis."""
        return Block(_added(self.offsets, axis, by), self.sizes, self.record, self.start)

    def within(self, axis: int, index: int) -> Block:
        """The same shard of a tensor with a further axis, at ``index`` of it."""
        offsets = (*self.offsets[:axis], index, *self.offsets[axis:])
        sizes = (*self.sizes[:axis], 1, *self.sizes[axis:])
        return Block(offsets, sizes, self.record, self.start)


@dataclass(frozen=True)
class StackedTensor:
    """A tensor as stored, possibly with an axis over layers, and its shards."""

    key: str
    shape: tuple[int, ...]
    dtype: Dtype
    blocks: tuple[Block, ...]


Named = tuple[str, StackedTensor]
"""Canonical name and tensor."""


def joined(stored: Iterable[Named], where: str) -> Iterator[Named]:
    """The same tensors, those that are stored in parts put together.

    Raises:
        CheckpointError: a part is missing, or parts have unequal shapes or dtypes.
    """
    halves: dict[str, dict[int, StackedTensor]] = defaultdict(dict)
    experts: dict[str, dict[int, StackedTensor]] = defaultdict(dict)

    def whole_or_expert(name: str, tensor: StackedTensor) -> Iterator[Named]:
        if match := _EXPERT.match(name):
            whole = f"{match['head']}.{match['rest']}"
            _take(experts[whole], int(match["part"]), tensor, where)
        else:
            yield name, tensor

    for name, tensor in stored:
        if match := _HALF.match(name):
            _take(halves[match["whole"]], _HALVES[match["part"]], tensor, where)
        else:
            yield from whole_or_expert(name, tensor)
    for name, parts in halves.items():
        yield from whole_or_expert(name, _side_by_side(name, _in_order(name, parts, 2, where)))
    for name, parts in experts.items():
        yield name, _stacked(name, _in_order(name, parts, len(parts), where))


def _take(parts: dict[int, StackedTensor], place: int, tensor: StackedTensor, where: str) -> None:
    if place in parts:
        raise CheckpointError(f"{where}: {parts[place].key} and {tensor.key} are the same part")
    parts[place] = tensor


def _in_order(
    name: str, parts: dict[int, StackedTensor], count: int, where: str
) -> list[StackedTensor]:
    if sorted(parts) != list(range(count)):
        raise CheckpointError(
            f"{where}: of {name}, which is stored in parts, only {sorted(parts)[:9]} are there; "
            "the checkpoint is incomplete"
        )
    found = [parts[place] for place in range(count)]
    for part in found:
        if (part.shape, part.dtype) != (found[0].shape, found[0].dtype):
            raise CheckpointError(
                f"{where}: {part.key} is {part.dtype} {list(part.shape)}, its fellow "
                f"{found[0].key} {found[0].dtype} {list(found[0].shape)}; expected the same"
            )
    return found


def _side_by_side(name: str, parts: list[StackedTensor]) -> StackedTensor:
    first = parts[0]
    axis = _first_own_axis(name, first)
    step = first.shape[axis]
    blocks = [b.along(axis, i * step) for i, part in enumerate(parts) for b in part.blocks]
    shape = _added(first.shape, axis, step * (len(parts) - 1))
    return StackedTensor(first.key, shape, first.dtype, tuple(blocks))


def _stacked(name: str, parts: list[StackedTensor]) -> StackedTensor:
    first = parts[0]
    axis = _first_own_axis(name, first)
    blocks = [block.within(axis, i) for i, part in enumerate(parts) for block in part.blocks]
    shape = (*first.shape[:axis], len(parts), *first.shape[axis:])
    return StackedTensor(first.key, shape, first.dtype, tuple(blocks))


def _first_own_axis(name: str, tensor: StackedTensor) -> int:
    """The first axis of the layer's own; an axis over layers may come before."""
    own = 2 if name.endswith("weight") and len(tensor.shape) > 1 else 1
    return max(0, len(tensor.shape) - own)


def _added(numbers: tuple[int, ...], axis: int, more: int) -> tuple[int, ...]:
    return tuple(n + more * (i == axis) for i, n in enumerate(numbers))
