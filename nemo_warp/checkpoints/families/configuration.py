"""From a Hugging Face ``config.json`` to NeMo's ``model_config.yaml``, key by key.

A key that decides what the model computes is mapped, or must have the one value that is named
here. An unknown key is refused, since it may change what the model computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

_NOT_OURS = {
    *("architectures", "auto_map", "_name_or_path", "transformers_version", "torch_dtype", "dtype"),
    *("model_type", "use_cache", "initializer_range", "bos_token_id", "eos_token_id"),
    *("pad_token_id", "attention_dropout", "max_window_layers", "unsloth_version"),
    *("_attn_implementation_autoset", "cache_implementation", "hidden_activation", "hidden_act"),
    *("sliding_window", "use_sliding_window", "rope_scaling", "rope_parameters", "rope_theta"),
    *("layer_types", "sliding_window_pattern", "output_attentions", "output_hidden_states"),
    *(
        "return_dict",
        "id2label",
        "label2id",
        "problem_type",
        "num_labels",
        "chunk_size_feed_forward",
    ),
}
"""Keys that decide no logits, or that are handled one by one below."""

_RENAMED = {
    **{"hidden_size": "hidden_size", "intermediate_size": "ffn_hidden_size"},
    **{"num_hidden_layers": "num_layers", "num_attention_heads": "num_attention_heads"},
    **{"vocab_size": "override_vocab_size", "max_position_embeddings": "encoder_seq_length"},
    **{"num_key_value_heads": "num_query_groups", "head_dim": "kv_channels"},
    "rms_norm_eps": "layernorm_epsilon",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
}
"""Hugging Face's name -> NeMo's, for values that are the same number."""

_ONLY = {
    **{"attention_bias": (False,), "mlp_bias": (False,), "pretraining_tp": (1,)},
    **{"is_encoder_decoder": (False,), "add_cross_attention": (False,)},
    **{"use_bidirectional_attention": (False, None), "partial_rotary_factor": (1.0,)},
}
"""Keys that must have one of these values."""

_LLAMA3_ROPE = {
    **{"factor": "scale_factor", "low_freq_factor": "low_freq_factor"},
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "old_context_len",
}


@dataclass(frozen=True)
class Family:
    """What is peculiar to a family.

    Attributes:
        tied: whether the output layer is the embedding where ``config.json`` does not say.
        gemma: zero-centred norms, scaled embeddings, GELU by tanh.
        qkv_bias: biases on queries, keys and values.
        kv_heads: key-value heads where ``config.json`` does not say; None is one per head.
        double_norms: norms after attention and MLP too, and soft-capped logits (Gemma 2).
    """

    tied: bool = False
    gemma: bool = False
    qkv_bias: bool = False
    kv_heads: int | None = None
    head_dim: int | None = None
    double_norms: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(kv_heads=8),
    "qwen2": Family(qkv_bias=True, kv_heads=32),
    "gemma": Family(tied=True, gemma=True, kv_heads=16, head_dim=256),
    "gemma2": Family(tied=True, gemma=True, kv_heads=4, head_dim=256, double_norms=True),
}
"""``model_type`` -> family."""

_INEXPRESSIBLE = {
    "qwen3": "its queries and keys are normalised, which NeMo 2.2.1 never builds (get_specs in "
    "megatron_gpt_model.py leaves qk_layernorm out)",
    "gemma3_text": "its two rotary bases per model do not exist in NeMo 2.2.1",
    "gemma3": "it sees pictures, and its two rotary bases do not exist in NeMo 2.2.1",
}


def family_of(hf: dict[str, Any], where: str) -> Family:
    """The family that a ``config.json`` names.

    Raises:
        ValueError: none that is known, or one that NeMo cannot express.
    """
    kind = hf.get("model_type")
    if kind in _INEXPRESSIBLE:
        raise ValueError(
            f"{where}: NeMo 2.2.1 cannot express {kind}: {_INEXPRESSIBLE[kind]}; its Hugging Face "
            "folders can be merged as they are"
        )
    if kind not in FAMILIES:
        raise ValueError(f"{where}: model_type {kind!r} is unknown; known: {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def nemo_keys(hf: dict[str, Any], where: str, ignored: Iterable[str] = ()) -> dict[str, Any]:
    """The keys of ``model_config.yaml`` that decide what the model computes.

    Args:
        hf: parsed ``config.json``.
        where: its name, for messages.
        ignored: keys that the user knows to make no difference.

    Raises:
        ValueError: an unknown family or key, a missing one, or a value that NeMo cannot express.
    """
    family = family_of(hf, where)
    gemma2 = {"attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"}
    known = _NOT_OURS | _RENAMED.keys() | _ONLY.keys() | set(ignored)
    known |= gemma2 if family.double_norms else set()
    for key in hf:
        if key not in known:
            raise ValueError(
                f"{where}: nobody maps the key {key} (here {str(hf[key])[:60]}) to NeMo; if it "
                f"makes no difference to what the model computes, pass --ignore {key}"
            )
    for key, values in _ONLY.items():
        if key in hf and key not in ignored and hf[key] not in values:
            raise ValueError(f"{where}: {key} is {hf[key]}; only {values[0]} can be expressed")
    found = {ours: hf[theirs] for theirs, ours in _RENAMED.items() if hf.get(theirs) is not None}
    _fill_defaults(found, family, where)
    found |= _activation(hf, family, where) | _rope(hf, where)
    found["encoder_seq_length"] = _length(hf, where)
    # NeMo asks for both; with rotary positions only the first limits anything.
    found["max_position_embeddings"] = found["encoder_seq_length"]
    found |= {"normalization": "rmsnorm", "bias": False, "qkv_bias": family.qkv_bias}
    found |= {"layernorm_zero_centered_gamma": family.gemma, "position_embedding_type": "rope"}
    found |= {"apply_embedding_scaling": family.gemma, "rotary_percentage": 1.0}
    if family.double_norms:
        # Transformer Engine's form: tokens to the left and to the right. Gemma 2's own layers
        # alternate it; up to this length all of them see everything.
        window = [found["encoder_seq_length"], 0]
        found["name"] = "megatron_gemma2"
        found["mcore_customization_config"] = {k: hf.get(k) for k in sorted(gemma2)} | {
            "window_size": window
        }
    return found


def _fill_defaults(found: dict[str, Any], family: Family, where: str) -> None:
    """What transformers takes where ``config.json`` is silent."""
    # The first six are sizes that have no default.
    for theirs, ours in list(_RENAMED.items())[:6]:
        if type(found.get(ours)) is not int or found[ours] < 1:
            raise ValueError(f"{where}: {theirs} must be a positive integer, is {found.get(ours)}")
    heads = found["num_attention_heads"]
    found.setdefault("num_query_groups", family.kv_heads or heads)
    found.setdefault("kv_channels", family.head_dim or found["hidden_size"] // heads)
    found.setdefault("layernorm_epsilon", 1e-6)
    found.setdefault("share_embeddings_and_output_weights", family.tied)
    if heads % found["num_query_groups"]:
        raise ValueError(
            f"{where}: {heads} attention heads do not divide into {found['num_query_groups']} "
            "groups (num_key_value_heads)"
        )


def _activation(hf: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    if family.gemma:  # "gelu" of Gemma's first days means different things to different versions
        act = hf.get("hidden_activation") or hf.get("hidden_act") or "gelu_pytorch_tanh"
        expected = "gelu_pytorch_tanh"
        mapped = {"activation": "geglu", "openai_gelu": True, "bias_activation_fusion": False}
    else:
        act, expected, mapped = hf.get("hidden_act", "silu"), "silu", {"activation": "fast-swiglu"}
    if act != expected:
        raise ValueError(f"{where}: hidden_act is {act}, but this family computes with {expected}")
    return mapped


def _rope(hf: dict[str, Any], where: str) -> dict[str, Any]:
    """Rotary base and scaling, also as transformers 5 writes them (``rope_parameters``)."""
    scaling = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    base = scaling.pop("rope_theta", None) or hf.get("rope_theta", 10000.0)
    # Older files say "type", newer "rope_type", some both.
    kinds = {scaling.pop(key, None) for key in ("rope_type", "type")} - {None}
    kind = kinds.pop() if len(kinds) == 1 else "default" if not kinds else str(sorted(kinds))
    found: dict[str, Any] = {"rotary_base": base}
    if kind == "default" and not scaling:
        return found
    if kind == "linear" and scaling.keys() == {"factor"}:
        return found | {"seq_len_interpolation_factor": scaling["factor"]}
    if kind == "llama3" and scaling.keys() == _LLAMA3_ROPE.keys():
        renamed = {ours: scaling[theirs] for theirs, ours in _LLAMA3_ROPE.items()}
        return found | {"scale_positional_embedding": True, **renamed}
    raise ValueError(
        f"{where}: NeMo 2.2.1 cannot express rope scaling {kind!r} with "
        f"{', '.join(sorted(scaling)) or 'no factor'}; it knows linear and llama3"
    )


def _length(hf: dict[str, Any], where: str) -> int:
    """Positions up to which NeMo's full attention computes what a sliding window does."""
    longest, window = hf["max_position_embeddings"], hf.get("sliding_window")
    if window is None or hf.get("use_sliding_window") is False:
        return longest
    return min(longest, int(window))


def same_value(first: Any, second: Any) -> bool:
    """Equality that takes YAML's 1e-05 as text for the number it is."""
    number: Callable[[Any], Any] = lambda v: float(v) if not isinstance(v, bool) else v  # noqa: E731
    try:
        return number(first) == number(second)
    except (TypeError, ValueError):
        return first == second
