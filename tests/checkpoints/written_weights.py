"""The weights in tests/checkpoints/written: functions of policy, canonical name and shape.

So what a file of another writer must hold is known without reading it. numpy only, and of it the
generator that never changes.
"""

from __future__ import annotations

import zlib

import numpy as np

LAYERS, HIDDEN, FFN, HEADS, VOCABULARY, EXPERTS = 2, 8, 12, 2, 24, 4
TOKENS = 22  # of Megatron-Bridge: the other rows are padding
ITERATION = 20
POLICIES = ("init", "a", "b")


def weight(policy: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32; policies a and b are theta_init plus task vectors that share a part."""
    value = _noise("init", name, shape)
    if policy != "init":
        value += 0.2 * (_noise(policy, name, shape) + 0.5 * _noise("shared", name, shape))
    return value.astype(np.float32)


def shapes(experts: bool) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor of the model."""
    found: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (VOCABULARY, HIDDEN),
        "output_layer.weight": (VOCABULARY, HIDDEN),
        "decoder.final_layernorm.weight": (HIDDEN,),
        "decoder.final_layernorm.bias": (HIDDEN,),
    }
    for layer in (f"decoder.layers.{i}." for i in range(LAYERS)):
        found[layer + "self_attention.linear_qkv.layer_norm_weight"] = (HIDDEN,)
        found[layer + "self_attention.linear_qkv.layer_norm_bias"] = (HIDDEN,)
        found[layer + "self_attention.linear_qkv.weight"] = (3 * HIDDEN, HIDDEN)
        found[layer + "self_attention.linear_proj.weight"] = (HIDDEN, HIDDEN)
        found[layer + "mlp.linear_fc1.layer_norm_weight"] = (HIDDEN,)
        found[layer + "mlp.linear_fc1.layer_norm_bias"] = (HIDDEN,)
        first = layer + ("mlp.experts.experts." if experts else "mlp.")
        if experts:
            found[layer + "mlp.router.weight"] = (EXPERTS, HIDDEN)
        lead = (EXPERTS,) if experts else ()
        found[first + "linear_fc1.weight"] = (*lead, 2 * FFN, HIDDEN)
        found[first + "linear_fc2.weight"] = (*lead, HIDDEN, FFN)
    return found


def _noise(policy: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    seed = zlib.crc32(f"{policy}/{name}".encode())
    return np.random.RandomState(seed).standard_normal(shape)
