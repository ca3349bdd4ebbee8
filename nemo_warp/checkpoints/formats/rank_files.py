"""Legacy weights: one ``model_weights.ckpt`` per tensor and pipeline rank, or a single one.

The files do not say how they belong together. Which tensors tensor parallelism splits is known
from their names (megatron/core/tensor_parallel/layers.py), layers are numbered per pipeline stage
(transformer_block.py), SwiGLU's ``linear_fc1`` is [gate; up] on every rank (mlp.py), and a tied
output layer is a second copy of the embedding on the last stage.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from nemo_warp.checkpoints.containers.image import CheckpointImage, DtypeRule, FileImage, zip_image
from nemo_warp.checkpoints.containers.torch_zip import read_torch_zip
from nemo_warp.checkpoints.containers.unpickling import StoredTensor
from nemo_warp.checkpoints.dtypes import Dtype
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.logical import LogicalTensor, check_tiling
from nemo_warp.checkpoints.names import canonical_name, logical_tensors
from nemo_warp.checkpoints.record import Record
from nemo_warp.checkpoints.stored import Block, StackedTensor

FILE = "model_weights.ckpt"
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_RANK_FOLDER = re.compile(r"^(?:mp_rank_(\d+)|tp_rank_(\d+)_pp_rank_(\d+))/model_weights\.ckpt$")
_SPLIT_ROWS = (
    *("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias"),
    *("word_embeddings.weight", "output_layer.weight", "output_layer.bias"),
    *("query_key_value.weight", "query_key_value.bias"),  # of before Megatron-core
    *("dense_h_to_4h.weight", "dense_h_to_4h.bias"),
    *("dense_h_to_4h_2.weight", "dense_h_to_4h_2.bias"),
)
_SPLIT_COLUMNS = (
    *("linear_proj.weight", "linear_fc2.weight"),
    *("attention.dense.weight", "dense_4h_to_h.weight"),  # of before Megatron-core
)
_GATED = ("linear_fc1.weight", "linear_fc1.bias")
_GATED_BEFORE_MCORE = ("dense_h_to_4h.weight", "dense_h_to_4h.bias")  # of fast-swiglu alone
_GATED_ACTIVATIONS = ("swiglu", "geglu", "reglu")
_LAYER = re.compile(r"^(?P<stack>.*layers)\.(?P<index>\d+)\.(?P<rest>.*)$")
_EXPERT = re.compile(r"^(?P<head>.*experts)\.local_experts\.(?P<index>\d+)\.(?P<rest>.*)$")

Locate = Callable[["Shard"], tuple[Record, Dtype]]


@dataclass(frozen=True)
class Shard:
    """One floating tensor in one file.

    Attributes:
        name: canonical name with the global layer number.
        tensor: its place in the file's storages.
    """

    name: str
    file: str
    tp: int
    tensor: StoredTensor


def rank_files(members: dict[str, Record]) -> dict[tuple[int, int], str]:
    """(tensor rank, pipeline rank) -> member name of every legacy weights file."""
    if FILE in members:
        return {(0, 0): FILE}
    found = {}
    for name in members:
        if match := _RANK_FOLDER.match(name):
            mp, tp, pp = match.groups()
            # mp_rank_TT without pipeline parallelism, tp_rank_TT_pp_rank_PPP with it (NeMo's
            # app_state naming, nlp_overrides.py l.1054-1180).
            found[int(tp or mp), int(pp or 0)] = name
    return found


class RankFileStore:
    """Legacy weights inside an archive.

    Args:
        members: file name -> bytes.
        config: the model configuration, for the activation and tied embeddings.
        where: the checkpoint's name for messages.

    Raises:
        CheckpointError: ranks are missing, or a file is damaged or hostile.
    """

    def __init__(self, members: dict[str, Record], config: dict[str, Any], where: str):
        self.where, files = where, rank_files(members)
        self._num_tp = 1 + max(tp for tp, _ in files)
        self._num_pp = 1 + max(pp for _, pp in files)
        if len(files) != self._num_tp * self._num_pp:
            raise CheckpointError(
                f"{where} holds {len(files)} rank files, expected {self._num_tp} tensor x "
                f"{self._num_pp} pipeline ranks; it is incomplete"
            )
        # "fast-swiglu" is NeMo's name for one with both halves in a single matrix; before
        # Megatron-core plain swiglu had two matrices, dense_h_to_4h and dense_h_to_4h_2.
        activation = str(config.get("activation", "")).removeprefix("fast-")
        self._gated: tuple[str, ...] = _GATED if activation in _GATED_ACTIVATIONS else ()
        if self._gated and str(config.get("activation", "")).startswith("fast-"):
            self._gated += _GATED_BEFORE_MCORE
        # NeMo's default is true (megatron_gpt_model.py l.501).
        self._tied = bool(config.get("share_embeddings_and_output_weights", True))
        self._zips = {
            name: read_torch_zip(members[name], f"{where}: {name}") for name in files.values()
        }
        self.others: dict[str, Dtype] = {}
        self._shards = self._list_shards(files)
        self._check_storages()
        self.foreign: list[str] = []
        self.tensors = self._logical(
            lambda shard: (self._zips[shard.file].storage(shard.tensor.storage.key), _dtype(shard))
        )

    def masters(self) -> dict[str, LogicalTensor]:
        """Legacy weights come without optimizer state."""
        return {}

    def image(self, rule: DtypeRule, prefix: str) -> CheckpointImage:
        """Layout of an output with the same rank files."""
        files, holes = [], {}
        for name, source in self._zips.items():
            storages = {s.tensor.storage for s in self._shards if s.file == name}
            sizes = {s.key: s.numel * rule(s.dtype).itemsize for s in storages}
            image, file = zip_image(source, sizes, rule), FileImage(prefix + name)
            file.append_zip(image)
            files.append(file)
            for entry, offset in zip(image.entries, image.data_offsets, strict=True):
                key = entry.name.removeprefix(f"{source.folder}/data/")
                if entry.name != key and key in sizes:
                    holes[name, key] = file.hole(offset, entry.size)
        tensors = self._logical(
            lambda shard: (holes[shard.file, shard.tensor.storage.key], rule(_dtype(shard)))
        )
        return CheckpointImage(files, tensors)

    def _list_shards(self, files: dict[tuple[int, int], str]) -> list[Shard]:
        shards, first_layer = [], 0
        for pp in range(self._num_pp):
            named = {tp: dict(self._floating(files[tp, pp])) for tp in range(self._num_tp)}
            if any(named[tp].keys() != named[0].keys() for tp in named):
                raise CheckpointError(
                    f"{self.where}: tensor ranks of stage {pp} hold different keys"
                )
            # Megatron-core numbers layers from 0 on every stage (transformer_block.py l.636-640).
            # Some tools number them globally: a stage whose least number is that of its first layer
            # is left alone.
            layers = {int(m["index"]) for m in map(_LAYER.match, named[0]) if m}
            shift = 0 if first_layer and min(layers, default=0) >= first_layer else first_layer
            for tp, tensors in named.items():
                for name, tensor in tensors.items():
                    shards.append(Shard(_shifted(name, shift), files[tp, pp], tp, tensor))
            first_layer += len(layers)
        return shards

    def _floating(self, file: str) -> Iterator[tuple[str, StoredTensor]]:
        root = self._zips[file].root
        if not isinstance(root, dict):
            raise CheckpointError(f"{self.where}: {file} is not a state dict")
        # Their chunks are interleaved over the stages in an order that the files do not tell.
        if "model0" in root:
            raise CheckpointError(
                f"{self.where}: {file} comes from virtual pipeline stages; resave it without them"
            )
        for key, value in root.get("state_dict", root).items():
            if not isinstance(value, StoredTensor) or 0 in value.shape:
                continue
            if not value.storage.dtype.is_floating_point:
                self.others[canonical_name(key)] = value.storage.dtype
            else:
                if not value.is_contiguous:
                    raise CheckpointError(f"{self.where}: {key} in {file} is not contiguous")
                yield canonical_name(key), value

    def _check_storages(self) -> None:
        """Two tensors of one file must not share bytes, or a merge would write them twice."""
        places = defaultdict(list)
        for shard in self._shards:
            size = math.prod(shard.tensor.shape)
            start = shard.tensor.offset
            places[shard.file, shard.tensor.storage.key].append((start, start + size, shard.name))
        for (file, _), ranges in places.items():
            ranges.sort()
            for (_, end, one), (start, _, other) in itertools.pairwise(ranges):
                if start < end:
                    raise CheckpointError(f"{self.where}: {one} and {other} share memory in {file}")

    def _logical(self, locate: Locate) -> dict[str, LogicalTensor]:
        by_name: dict[str, list[Shard]] = defaultdict(list)
        for shard in self._shards:
            by_name[shard.name].append(shard)
        # The last stage's copy is checked to be equal and written again; in the Gram matrix the
        # embedding must count once.
        tied = self._num_pp > 1 and self._tied and OUTPUT in by_name and EMBEDDING in by_name
        copies = {OUTPUT: by_name.pop(OUTPUT)} if tied else {}
        experts = [
            (
                f"{match['head']}.experts.{match['index']}.{match['rest']}",
                self._stacked(name, by_name.pop(name), locate),
            )
            for name in list(by_name)
            if (match := _EXPERT.match(name))
        ]
        tensors = {name: self._tensor(name, found, locate) for name, found in by_name.items()}
        tensors |= logical_tensors(experts, self.where)
        for name, found in copies.items():
            copy = self._tensor(name, found, locate)
            tensors[EMBEDDING] = replace(tensors[EMBEDDING], replicas=(copy.patches,))
        for tensor in tensors.values():
            for patches in tensor.replicas:
                check_tiling(tensor, patches, self.where)
        return tensors

    def _tensor(self, name: str, shards: list[Shard], locate: Locate) -> LogicalTensor:
        stacked = self._stacked(name, shards, locate)
        tensor = logical_tensors([(name, stacked)], self.where)[name]
        if len(shards) == 1 or _split_axis(name) is not None:
            return tensor
        copies = [self._stacked(name, [shard], locate) for shard in shards[1:]]
        replicas = [logical_tensors([(name, c)], self.where)[name].patches for c in copies]
        return replace(tensor, replicas=tuple(replicas))

    def _stacked(self, name: str, shards: list[Shard], locate: Locate) -> StackedTensor:
        axis = _split_axis(name)
        shards = sorted(shards, key=lambda shard: shard.tp)
        shape, dtype = list(shards[0].tensor.shape), locate(shards[0])[1]
        if any(
            s.tensor.shape != shards[0].tensor.shape or _dtype(s) != _dtype(shards[0])
            for s in shards
        ):
            raise CheckpointError(f"{self.where}: ranks disagree on the shape or dtype of {name}")
        # Replicated tensors are read from rank 0; the other ranks' copies are compared with it.
        if axis is None or len(shards) == 1:
            shards = shards[:1]
        else:
            shape[axis] *= len(shards)
        # Each rank holds [its gates; its ups] (mlp.py): joined rank by rank the rows would be in no
        # order that another layout has. The Gram matrix would not mind, resharding would.
        halves = 2 if axis == 0 and name.endswith(self._gated) else 1
        blocks = [
            block
            for index, shard in enumerate(shards)
            for block in _blocks(shard, index, len(shards), axis or 0, halves, *locate(shard))
        ]
        return StackedTensor(name, tuple(shape), dtype, tuple(blocks))


def _blocks(
    shard: Shard,
    index: int,
    count: int,
    axis: int,
    halves: int,
    record: Record,
    dtype: Dtype,
) -> Iterator[Block]:
    """The shard's place in the whole tensor; [gate; up] is two places."""
    sizes, start = list(shard.tensor.shape), shard.tensor.offset * dtype.itemsize
    if sizes and count > 1:
        sizes[axis] //= halves
    else:
        halves = 1
    for half in range(halves):
        offsets = [0] * len(sizes)
        if sizes:
            # All ranks' gates come first, then all ups: the order that distributed checkpoints
            # have.
            offsets[axis] = (half * count + index) * sizes[axis]
        yield Block(tuple(offsets), tuple(sizes), record, start)
        start += math.prod(sizes) * dtype.itemsize


def _split_axis(name: str) -> int | None:
    if name.endswith(_SPLIT_ROWS):
        return 0
    return 1 if name.endswith(_SPLIT_COLUMNS) else None


def _shifted(name: str, shift: int) -> str:
    match = _LAYER.match(name)
    return f"{match['stack']}.{int(match['index']) + shift}.{match['rest']}" if match else name


def _dtype(shard: Shard) -> Dtype:
    return shard.tensor.storage.dtype
