"""Checkpoints written by torch itself, for tests that must not trust the code under test."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

METADATA = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
ROW_SHARDED = (
    "linear_qkv.weight",
    "linear_qkv.bias",
    "word_embeddings.weight",
    "output_layer.weight",
)
COLUMN_SHARDED = ("linear_proj.weight", "linear_fc2.weight")
EXTRA_STATE = "decoder.layers.self_attention.core_attention._extra_state"
GATED = ("linear_fc1.weight", "linear_fc1.bias")


def tiny_weights(
    seed: int,
    *,
    layers: int = 3,
    hidden: int = 16,
    ffn: int = 24,
    vocab: int = 40,
    gated: bool = True,
    bias: bool = True,
    tied: bool = True,
    around: dict[str, torch.Tensor] | None = None,
    scale: float = 0.05,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:
    """Logical per-layer weights; with ``around``, those weights plus a random task vector."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embedding.word_embeddings.weight": (vocab, hidden)}
    for i in range(layers):
        layer = f"decoder.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        shapes[layer + "self_attention.linear_qkv.weight"] = (2 * hidden, hidden)
        shapes[layer + "self_attention.linear_proj.weight"] = (hidden, hidden)
        shapes[layer + "mlp.linear_fc1.weight"] = ((2 if gated else 1) * ffn, hidden)
        shapes[layer + "mlp.linear_fc2.weight"] = (hidden, ffn)
        if bias:
            shapes[layer + "self_attention.linear_qkv.bias"] = (2 * hidden,)
            shapes[layer + "mlp.linear_fc1.bias"] = ((2 if gated else 1) * ffn,)
            shapes[layer + "mlp.linear_fc2.bias"] = (hidden,)
    shapes["decoder.final_layernorm.weight"] = (hidden,)
    if not tied:
        shapes["output_layer.weight"] = (vocab, hidden)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        base = around[name].float() if around is not None else 0.0
        weights[name] = (base + (scale if around is not None else 1.0) * noise).to(dtype)
    return weights


def shard_axis(name: str) -> int | None:
    """The axis that tensor parallelism splits, None for replicated tensors."""
    if name.endswith(ROW_SHARDED + GATED):
        return 0
    return 1 if name.endswith(COLUMN_SHARDED) else None


def _pieces(name: str, tensor: torch.Tensor, tp: int, gated: bool):
    """(rank, offsets, part) of each shard as Megatron-core cuts it."""
    axis = shard_axis(name)
    if axis is None:
        yield 0, (0,) * tensor.dim(), tensor
        return
    parts = 2 * tp if gated and name.endswith(GATED) else tp
    for index, part in enumerate(tensor.chunk(parts, dim=axis)):
        offsets = [0] * tensor.dim()
        offsets[axis] = index * part.shape[axis]
        yield index % tp, tuple(offsets), part


def write_torch_dist(
    folder: Path,
    weights: dict[str, torch.Tensor],
    *,
    tp: int = 1,
    homogeneous: bool = True,
    gated: bool = True,
    prefix: str = "model.",
    extra_state: bool = True,
) -> None:
    """A torch_dist directory as Megatron-core lays it out, written with torch.save and pickle."""
    folder.mkdir(parents=True)
    described, storage, planner, streams = {}, {}, {}, {}
    layers = 1 + max((int(n.split(".")[2]) for n in weights if ".layers." in n), default=-1)

    def put(file, index, blob):
        stream = streams.setdefault(file, io.BytesIO())
        storage[index] = _StorageInfo(file, stream.tell(), len(blob))
        stream.write(blob)

    for name, tensor in weights.items():
        key, lead = prefix + name, ()
        if homogeneous and ".layers." in name:
            before, _, after = name.partition(".layers.")
            number, _, rest = after.partition(".")
            key, lead = f"{prefix}{before}.layers.{rest}", (int(number),)
        size = (*((layers,) if lead else ()), *tensor.shape)
        properties = dcp.TensorProperties(dtype=tensor.dtype)
        entry = described.setdefault(
            key, dcp.TensorStorageMetadata(properties, torch.Size(size), [])
        )
        for rank, offsets, part in _pieces(name, tensor, tp, gated):
            stored = part.contiguous().clone()
            stored = stored[None] if lead else stored
            where = torch.Size((*lead, *offsets))
            entry.chunks.append(dcp.ChunkStorageMetadata(where, stored.shape))
            buffer = io.BytesIO()
            torch.save(stored, buffer)
            put(
                f"__{rank}_{len(storage) % 2}.distcp",
                dcp.MetadataIndex(key, where),
                buffer.getvalue(),
            )
        planner[key] = (key,)
    if extra_state:
        for i in range(layers):
            key = f"{prefix}{EXTRA_STATE}/shard_{i}_{layers}"
            described[key], planner[key] = dcp.BytesStorageMetadata(), (key,)
            buffer = io.BytesIO()
            torch.save([io.BytesIO(b"fp8 state %d" % i)], buffer)
            put("__0_0.distcp", dcp.MetadataIndex(key), buffer.getvalue())
    for file, stream in streams.items():
        (folder / file).write_bytes(stream.getvalue())
    metadata = dcp.Metadata(described, planner_data=planner, storage_data=storage)
    metadata.mcore_data = {}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    torch.save({"hyper": [1, 2, 3]}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(METADATA))


def write_nemo(path: Path, write_weights, config: str = "activation: fast-swiglu\n") -> Path:
    """A ``.nemo`` around what ``write_weights(model_weights folder)`` writes; tar by suffix."""
    folder = path if path.suffix != ".nemo" else path.with_suffix(".unpacked")
    folder.mkdir(parents=True)
    (folder / "model_config.yaml").write_text(config)
    (folder / "0123456789abcdef0123456789abcdef_tokenizer.model").write_bytes(b"not a tokenizer")
    write_weights(folder / "model_weights")
    if folder != path:
        with tarfile.open(path, "w:") as tar:
            tar.add(folder, arcname=".")
    return path


def read_torch_dist(folder: Path) -> dict[str, torch.Tensor]:
    """Stored key -> tensor, read by torch's own distributed checkpoint reader."""
    from torch.distributed.checkpoint import FileSystemReader, load

    metadata = FileSystemReader(folder).read_metadata()
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, dcp.TensorStorageMetadata)
    }
    load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return state
