"""Legacy rank files and zarr folders, written from logical weights as NeMo's modules cut them."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import torch
from synthetic_checkpoints import GATED, METADATA, shard_axis

FUSED, LOCAL = "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"
"""The same norm with and without Transformer Engine; distributed checkpoints use the first."""


def rank_weights(weights, tp: int, pp: int, gated: bool, tied: bool):
    """(tensor rank, pipeline rank) -> state dict with stage-local layer numbers."""
    layers = 1 + max(int(name.split(".")[2]) for name in weights if ".layers." in name)
    per_stage = layers // pp
    assert per_stage * pp == layers
    ranks = {(t, p): OrderedDict() for t in range(tp) for p in range(pp)}
    for name, tensor in weights.items():
        stage = 0 if name.startswith("embedding") else pp - 1
        stored = name
        if ".layers." in name:
            number = int(name.split(".")[2])
            stage, local = divmod(number, per_stage)
            stored = name.replace(f".layers.{number}.", f".layers.{local}.").replace(FUSED, LOCAL)
        for rank in range(tp):
            part = rank_part(name, tensor, rank, tp, gated)
            ranks[rank, stage]["model." + stored] = part
            if tied and pp > 1 and name.startswith("embedding.word"):
                ranks[rank, pp - 1]["model.output_layer.weight"] = part.clone()
    for state in ranks.values():
        state["model.decoder.layers.0.self_attention.core_attention._extra_state"] = None
    return ranks


def rank_part(name: str, tensor: torch.Tensor, rank: int, tp: int, gated: bool) -> torch.Tensor:
    """What tensor rank ``rank`` holds; SwiGLU's fc1 is [gate; up] on each rank."""
    axis = shard_axis(name)
    if axis is None:
        return tensor.clone()
    if gated and name.endswith(GATED):
        gate, up = tensor.chunk(2)
        return torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]])
    return tensor.chunk(tp, dim=axis)[rank].clone()


def write_rank_files(
    folder: Path, weights, *, tp: int = 1, pp: int = 1, gated: bool = True, tied: bool = True
) -> None:
    """``model_weights.ckpt`` alone, per ``mp_rank_XX``, or per ``tp_rank_XX_pp_rank_XXX``."""
    for (t, p), state in rank_weights(weights, tp, pp, gated, tied).items():
        place = folder / (f"tp_rank_{t:02d}_pp_rank_{p:03d}" if pp > 1 else f"mp_rank_{t:02d}")
        place = folder if tp * pp == 1 else place
        place.mkdir(parents=True, exist_ok=True)
        torch.save(state, place / "model_weights.ckpt")


def read_rank_files(folder: Path) -> dict[str, OrderedDict]:
    """Relative path -> state dict, as torch loads it."""
    return {
        path.relative_to(folder).as_posix(): torch.load(path, weights_only=True)
        for path in sorted(folder.rglob("model_weights.ckpt"))
    }


def write_zarr(folder: Path, weights, *, tp: int = 1, gated: bool = True) -> None:
    """Stacked zarr folders as Megatron-core writes them: ``.zarray`` and raw chunk files."""
    folder.mkdir(parents=True)
    layers = 1 + max(int(name.split(".")[2]) for name in weights if ".layers." in name)
    for name, tensor in weights.items():
        key, lead = name, []
        if ".layers." in name:
            number = int(name.split(".")[2])
            key, lead = name.replace(f".layers.{number}.", ".layers."), [number]
        place = folder / f"model.{key}"
        place.mkdir(exist_ok=True)
        axis = shard_axis(name)
        parts = 1 if axis is None else 2 * tp if gated and name.endswith(GATED) else tp
        chunk = list(tensor.shape)
        if axis is not None:
            chunk[axis] //= parts
        for index, part in enumerate(tensor.chunk(parts, dim=axis or 0)):
            grid = [0] * tensor.dim()
            grid[axis or 0] = index
            file = place / ".".join(str(i) for i in [*lead, *grid])
            file.write_bytes(part.contiguous().view(torch.uint8).numpy().tobytes())
        description = {
            "shape": [*([layers] if lead else []), *tensor.shape],
            "chunks": [*([1] if lead else []), *chunk],
            "dtype": {torch.bfloat16: "bfloat16", torch.float32: "<f4"}[tensor.dtype],
            **{"compressor": None, "filters": None, "fill_value": None},
            **{"order": "C", "zarr_format": 2},
        }
        (place / ".zarray").write_text(json.dumps(description, indent=4))
    state = folder / "model.decoder.layers.self_attention.core_attention._extra_state"
    state.mkdir()
    torch.save([None], state / f"shard_0_{layers}.pt")
    torch.save({"hyper": [1]}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({**METADATA, "sharded_backend": "zarr"}))


def read_zarr(folder: Path) -> dict[str, torch.Tensor]:
    """Key -> whole tensor, assembled chunk by chunk."""
    result = {}
    for file in sorted(folder.glob("*/.zarray")):
        described = json.loads(file.read_text())
        dtype = {"bfloat16": torch.bfloat16, "<f4": torch.float32}[described["dtype"]]
        whole = torch.empty(described["shape"], dtype=dtype)
        for chunk in file.parent.glob("[0-9]*"):
            index = [int(i) for i in chunk.name.split(".")]
            where = tuple(
                slice(i * n, (i + 1) * n) for i, n in zip(index, described["chunks"], strict=True)
            )
            data = torch.frombuffer(bytearray(chunk.read_bytes()), dtype=dtype)
            whole[where] = data.view(described["chunks"])
        result[file.parent.name] = whole
    return result
