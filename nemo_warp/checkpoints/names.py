"""From stored keys to logical tensors: wrapper prefixes, layers, groups.

Megatron-core stores a homogeneous model's layers stacked, ``decoder.layers.<rest>`` with an axis
over layers in front, and others one by one, ``decoder.layers.7.<rest>``. Both become one logical
tensor per layer, named the second way, so that the two give the same merge.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from nemo_warp.checkpoints.dtypes import Dtype
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.logical import LogicalTensor, check_tiling, patches_of_block
from nemo_warp.checkpoints.stored import Block, StackedTensor, joined

WRAPPERS = ("model.module.module.", "model.module.", "model.", "module.")
"""Prefixes that wrappers put before the model's own names (NeMo 1, AMP O2, NeMo 2)."""

BEFORE_MCORE = "language_model."
"""What NeMo's own Megatron, before Megatron-core, puts before embedding, encoder and output."""

MAX_PATCHES = 1 << 20
MAX_PATCHES_OF_TENSOR = 1 << 16
MAX_LAYERS = 1 << 13
DROPPED = re.compile(r"^(chained_\d+\.)?optimizer\.|^anchor\.")
"""Keys that outputs do not carry over: optimizer state, and the KL reference of our members."""

_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Names of the same norms without and with Transformer Engine (mcore gpt_layer_specs.py)."""

_HF_OUTSIDE = (
    ("model.embed_tokens.", "embedding.word_embeddings."),
    ("model.norm.", "decoder.final_layernorm."),
    ("lm_head.", "output_layer."),
)
_HF_LAYER = re.compile(r"^(?P<stack>[a-z_.]*?)\.?(layers|layer|blocks|block|h)\.(?P<rest>\d+\..+)$")
_HF_DECODERS = ("", "model", "transformer", "gpt_neox", "model.decoder", "decoder")

_LAYER = re.compile(r"^(?P<stack>(?:.*\.)?layers)\.(?P<index>\d+)\.(?P<rest>.+)$")
_STACKED = re.compile(r"^(?P<stack>(?:.*\.)?layers)\.(?P<rest>(?!\d+\.).+)$")
_NOT_MODEL = re.compile(r"^(optimizer|chained_\d+|rng_state|rerun_state_machine_state)\b")


def model_keys(keys: Iterable[str]) -> dict[str, str]:
    """Stored key -> canonical name, for the keys that belong to the model.

    Optimizer state, random states and other tenants of a training checkpoint are left out: they
    lack the wrapper prefix that the model's own keys carry.
    """
    keys = list(keys)
    # Megatron-LM writes no prefix: then everything but what is known to be none is the model's.
    wrapped = any(key.startswith(WRAPPERS) for key in keys)
    if not wrapped:
        return {key: canonical_name(key) for key in keys if not _NOT_MODEL.match(key)}
    return {key: canonical_name(key) for key in keys if key.startswith(WRAPPERS)}


def strip_wrapper(key: str) -> str:
    """``key`` without the first wrapper prefix that matches."""
    prefix = next((wrapper for wrapper in WRAPPERS if key.startswith(wrapper)), "")
    return key[len(prefix) :]


def canonical_name(key: str) -> str:
    """The name of a stored key that all formats and layer implementations share."""
    name = strip_wrapper(key).removeprefix(BEFORE_MCORE)
    # Transformer Engine fuses a norm into the linear layer behind it and names it so;
    # Megatron-core's local layers map to the same key in sharded checkpoints (gpt_layer_specs.py
    # l.237-240), legacy files do not.
    for local, fused in _NORMS.items():
        head, found, tail = name.partition(f".{local}")
        if found and ".layers." in f"{head}.":
            return f"{head}.{fused}{tail}"
    return name


def hugging_face_name(key: str) -> str:
    """The name of a Hugging Face tensor: in Megatron's groups, so that the same layers are angles.

    What a layer holds keeps its own name: queries, keys and values stay three tensors.
    """
    if match := _HF_LAYER.match(key):
        stack = "decoder" if match["stack"] in _HF_DECODERS else match["stack"]
        return f"{stack}.layers.{match['rest']}"
    for theirs, ours in _HF_OUTSIDE:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def group_of(name: str) -> str:
    """The group that shares one angle: a layer, the embedding, the final norm, the output layer."""
    if match := _LAYER.match(name):
        return f"{match['stack']}.{match['index']}"
    head, _, rest = name.partition(".")
    return f"{head}.{rest.partition('.')[0]}" if head in ("decoder", "encoder") else head


def group_order(group: str) -> tuple[int, str, int]:
    """Sort key: embedding, layers by number, then everything after them by name."""
    stack, _, index = group.rpartition(".")
    if stack.endswith("layers") and index.isdigit():
        return 1, stack, int(index)
    return (0 if group == "embedding" else 2), group, 0


def depth_of(group: str) -> int | None:
    """Layer number of a group, None for the groups outside the stack."""
    rank, _, index = group_order(group)
    return index if rank == 1 else None


def logical_tensors(
    stored: Iterable[tuple[str, StackedTensor]], where: str
) -> dict[str, LogicalTensor]:
    """Logical tensors of (canonical name, stored tensor) pairs, stacked ones split into layers.

    Raises:
        CheckpointError: shards are missing, overlap, or two keys mean the same tensor.
    """
    tensors: dict[str, LogicalTensor] = {}
    for name, entry in joined(stored, where):
        for tensor in _layers(name, entry, where):
            if tensor.name in tensors:
                raise CheckpointError(f"{where}: two entries mean {tensor.name}")
            check_tiling(tensor, tensor.patches, where)
            tensors[tensor.name] = tensor
    return tensors


def _layers(name: str, entry: StackedTensor, where: str) -> Iterator[LogicalTensor]:
    _check_blocks(entry, where)
    # The axis over layers is no part of the tensor: each layer has its own angle.
    match = _STACKED.match(name)
    if match is None:
        yield _tensor(name, entry.shape, entry.dtype, entry.blocks, where)
        return
    if len(entry.shape) < 2:
        raise CheckpointError(f"{where}: {entry.key} is stacked over layers but has no layer axis")
    if entry.shape[0] > MAX_LAYERS:
        raise CheckpointError(f"{where}: {entry.key} claims to have {entry.shape[0]} layers")
    layers: list[list[Block]] = [[] for _ in range(entry.shape[0])]
    for block in entry.blocks:
        for layer, piece in _slices(block, entry.dtype.itemsize):
            layers[layer].append(piece)
    for index, blocks in enumerate(layers):
        layer_name = f"{match['stack']}.{index}.{match['rest']}"
        yield _tensor(layer_name, entry.shape[1:], entry.dtype, blocks, where)


def _slices(block: Block, itemsize: int) -> Iterator[tuple[int, Block]]:
    """The block cut along its first axis; each cut is contiguous in the file."""
    sizes, stride = block.sizes[1:], itemsize
    for size in sizes:
        stride *= size
    for i in range(block.sizes[0]):
        start = block.start + i * stride
        yield block.offsets[0] + i, Block(block.offsets[1:], sizes, block.record, start)


def _tensor(
    name: str, shape: tuple[int, ...], dtype: Dtype, blocks: Iterable[Block], where: str
) -> LogicalTensor:
    found = chain.from_iterable(
        patches_of_block(
            shape, block.offsets, block.sizes, block.record, block.start, dtype.itemsize
        )
        for block in blocks
    )
    patches = tuple(islice(found, MAX_PATCHES_OF_TENSOR + 1))
    if len(patches) > MAX_PATCHES_OF_TENSOR:
        raise CheckpointError(f"{where}: {name} is cut into an absurd number of pieces")
    return LogicalTensor(name, tuple(shape), dtype, patches)


def _check_blocks(entry: StackedTensor, where: str) -> None:
    """Bounds that keep later loops short, before anything is expanded.

    What the shape claims is stored: so no claim is larger than the files.
    """
    covered = 0
    for block in entry.blocks:
        numel = 1
        for offset, size, whole in zip(block.offsets, block.sizes, entry.shape, strict=True):
            if offset < 0 or size < 1 or offset + size > whole:
                raise CheckpointError(
                    f"{where}: a shard of {entry.key} at {list(block.offsets)} of size "
                    f"{list(block.sizes)} lies outside its shape {list(entry.shape)}"
                )
            numel *= size
        if block.start + numel * entry.dtype.itemsize > block.record.size:
            raise CheckpointError(f"{where}: a shard of {entry.key} is larger than its file")
        covered += numel
    if covered != math.prod(entry.shape):
        raise CheckpointError(
            f"{where}: the shards of {entry.key} cover {covered} of {math.prod(entry.shape)} "
            "elements or overlap; the checkpoint is incomplete or damaged"
        )
    if len(entry.blocks) > MAX_PATCHES:
        raise CheckpointError(f"{where}: {entry.key} has {len(entry.blocks)} shards")
