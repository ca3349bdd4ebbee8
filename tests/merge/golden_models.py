"""Models with known weights, written and read by NeMo, and their merge worked out in float64.

A weight is a function of (policy, canonical name, logical shape), so what a checkpoint must hold
is known without reading it. Nothing here uses the code under test.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from pathlib import Path

import tiny_models
import torch

VOCABULARY = 118
VOCABULARY_MULTIPLE = 24
"""Padded vocabularies: 120 rows at TP 1, 144 at TP 2, 192 at TP 4 (mixed: 128, 128, 256)."""

_COMMON = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE,
}
MODELS = {
    "llama": {
        "ffn_hidden_size": 40,
        "num_query_groups": 4,
        "activation": "fast-swiglu",
        "bias": False,
        "share_embeddings_and_output_weights": False,
    },
    "gpt": {
        "ffn_hidden_size": 64,
        "num_query_groups": 8,
        "activation": "gelu",
        "bias": True,
        "normalization": "layernorm",
        "share_embeddings_and_output_weights": True,
    },
    "mixed": {  # a list of MoE frequencies makes Megatron-core name layers one by one
        "ffn_hidden_size": 40,
        "num_query_groups": 4,
        "activation": "fast-swiglu",
        "bias": True,
        "share_embeddings_and_output_weights": True,
        "moe_layer_freq": [0, 0, 0, 0],
        "make_vocab_size_divisible_by": 64,
    },
}
POLICIES = ("init", "a", "b")
_SCALES = {"a": 0.3, "b": 0.2}


def model_options(model: str) -> dict:
    """Keys of `tiny_models.tiny_config`."""
    return {**_COMMON, **MODELS[model]}


def _noise(*parts: object, shape: tuple[int, ...]) -> torch.Tensor:
    seed = zlib.crc32("/".join(map(str, parts)).encode())
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight(policy: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The logical tensor ``name`` of a policy, one layer, vocabulary padded as ``shape`` says.

    Policies share part of their task vectors; norms of policy b have not moved at all. Padding
    rows are large and differ between policies.
    """
    true_shape = (VOCABULARY, *shape[1:]) if is_vocabulary(name) else shape
    value = _noise("init", name, shape=true_shape)
    if policy != "init" and not (policy == "b" and "norm" in name):
        shared = _noise("shared", name, shape=true_shape)
        value += _SCALES[policy] * (_noise(policy, name, shape=true_shape) + 0.7 * shared)
    padded = 100.0 * _noise("padding", policy, name, shape=shape)
    padded[: len(value)] = value
    return padded.to(dtype)


def is_vocabulary(name: str) -> bool:
    """Whether the tensor has one row per token, padded by the writer."""
    return name in ("embedding.word_embeddings.weight", "output_layer.weight")


def group_of(name: str) -> str:
    """What shares an angle."""
    layer = re.match(r"decoder\.layers\.\d+", name)
    return layer.group() if layer else name.rpartition(".")[0].partition(".word")[0]


def expected_merge(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, eta: float, out: torch.dtype
) -> dict[str, torch.Tensor]:
    """theta_init + eta * slerp(delta_a, delta_b; 1/2) of every group, in float64, rounded once."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in shapes:
        groups[group_of(name)].append(name)
    merged = {}
    for names in groups.values():
        values = {
            (p, n): weight(p, n, shapes[n], dtype).to(torch.float64)
            for p in POLICIES
            for n in names
        }
        rows = {n: VOCABULARY if is_vocabulary(n) else None for n in names}

        def task_vector(policy, values=values, names=names, rows=rows):
            parts = [(values[policy, n] - values["init", n])[: rows[n]].flatten() for n in names]
            return torch.cat(parts)

        a, b = task_vector("a"), task_vector("b")
        share_a, share_b = _slerp_shares(a, b)
        for n in names:
            init = values["init", n]
            step = share_a * (values["a", n] - init) + share_b * (values["b", n] - init)
            if rows[n] is not None:
                step[rows[n] :] = 0.0
            merged[n] = (init + eta * step).to(out)
    return merged


def _slerp_shares(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    if not a.norm() or not b.norm():
        return 0.5, 0.5
    omega = torch.arccos(a @ b / (a.norm() * b.norm()))
    share = (torch.sin(omega / 2) / torch.sin(omega)).item()
    return share, share


def shards(model):
    """(canonical name, logical shape, slices, data) of every shard that this rank holds."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    pending = [state]
    while pending:
        item = pending.pop()
        if isinstance(item, dict | list):
            pending.extend(item.values() if isinstance(item, dict) else item)
        elif isinstance(item, ShardedTensor):
            yield from _layer_shards(item)


def _layer_shards(shard):
    name, shape = shard.key.removeprefix("model."), tuple(shard.global_shape)
    slices = tuple(
        slice(o, o + n)
        for o, n in zip(shard.global_offset[-shard.data.dim() :], shard.data.shape, strict=True)
    )
    if shard.prepend_axis_num:
        name = name.replace(".layers.", f".layers.{shard.global_offset[0]}.")
        shape = shape[1:]
    yield name, shape, slices, shard.data


@torch.no_grad()
def fill(model, values) -> dict[str, tuple[int, ...]]:
    """Set every weight to ``values(name, logical shape)``; the shapes by name.

    A tied output layer on the last pipeline stage is filled as the embedding.
    """
    shapes = {}
    for name, shape, slices, data in shards(model):
        shapes[name] = shape
        data.copy_(values(name, shape)[slices])
    return shapes


def build(model: str, tokenizer: Path, tensor: int, pipeline: int, **options):
    """A model of `MODELS` on this rank."""
    config = tiny_models.tiny_config(
        tokenizer, tensor, pipeline, **{**model_options(model), **options}
    )
    return tiny_models.build_model(config, tiny_models.build_trainer(config))


def logits(model) -> torch.Tensor | None:
    """This rank's shard of the logits of fixed tokens; None before the end of the pipeline."""
    length = model.cfg.encoder_seq_length
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, VOCABULARY, (2, length), generator=generator)
    positions = torch.arange(length).expand(2, -1)
    batch = [tokens, torch.ones(1, 1, length, length, dtype=torch.bool), positions]
    return tiny_models.last_stage_logits(model, batch)


def ulps_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Number of representable values between a and b, element by element."""
    assert a.dtype == b.dtype, f"{a.dtype} is not {b.dtype}"
    kind, lowest = {
        torch.float32: (torch.int32, -(1 << 31)),
        torch.bfloat16: (torch.int16, -(1 << 15)),
    }[a.dtype]

    def ordered(values):
        bits = values.contiguous().view(kind).to(torch.int64)
        return torch.where(bits < 0, lowest - bits, bits)

    return (ordered(a) - ordered(b)).abs()
