"""What gives weights their meaning beside their names and shapes. No torch.

Two models with the same tensors compute different things if their rotary base, activation, norm
epsilon, heads or tokenizer differ: merging them gives nonsense, and so does a KL between them. The
layout and what only matters in training may differ freely.

    init, policy = read_meaning(Path("sft.nemo")), read_meaning(Path("policy.nemo"))
    check_same_meaning({"sft.nemo": init, "policy.nemo": policy}, "pass --allow-different-configs")

What a checkpoint does not say is not compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_warp.checkpoints.containers.archive import Archive, open_archive
from nemo_warp.checkpoints.containers.configuration import CONFIG, read_configuration
from nemo_warp.checkpoints.errors import CheckpointError

Meaning = dict[str, Any]
"""Name of a property -> its plain value."""

_NEMO = {
    **{"activation": "gelu", "openai_gelu": False, "normalization": "layernorm"},
    **{"layernorm_epsilon": 1e-5, "layernorm_zero_centered_gamma": False},
    **{"position_embedding_type": "learned_absolute", "rotary_base": 10000},
    **{"rotary_percentage": 1.0, "rotary_interleaved": False},
    **{"seq_len_interpolation_factor": None, "scale_positional_embedding": False},
    **{"num_attention_heads": None, "num_query_groups": None, "kv_channels": None},
    **{"share_embeddings_and_output_weights": True, "window_size": None},
    **{"transformer_block_type": "pre_ln", "headscale": False, "attention_type": "multihead"},
    **{"normalize_attention_scores": True, "apply_embedding_scaling": False},
    **{"moe_router_topk": 2, "moe_router_pre_softmax": False, "mcore_customization_config": None},
}
"""Keys of ``model_config.yaml``, and what NeMo 2.2 takes where they are missing
(megatron_gpt_model.py, megatron_base_model.py)."""

_SIZES = ("num_attention_heads", "num_query_groups", "kv_channels")

_ROPE_SCALING = {
    **{"scale_factor": 8, "low_freq_factor": 1},
    **{"high_freq_factor": 4, "old_context_len": 8192},
}
"""Further ones where ``scale_positional_embedding`` is on (Llama 3.1)."""

_HUGGING_FACE = (
    *("model_type", "hidden_act", "hidden_activation", "activation_function"),
    *("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
    *("sliding_window", "num_experts_per_tok", "attn_logit_softcapping"),
    *("final_logit_softcapping", "query_pre_attn_scalar", "routed_scaling_factor"),
)
"""Keys of ``config.json``; what is missing has its model type's default."""

_MEGATRON = (
    *("activation_func", "gated_linear_unit", "normalization", "layernorm_epsilon"),
    *("layernorm_zero_centered_gamma", "position_embedding_type", "rotary_base"),
    *("rotary_percent", "rotary_interleaved", "rotary_scaling", "rope_scaling"),
    *("rope_scaling_factor", "scale_factor", "seq_len_interpolation_factor"),
    *("num_attention_heads", "num_query_groups", "kv_channels", "window_size"),
    *("share_embeddings_and_output_weights", "qk_layernorm", "attention_softmax_scale"),
    *("moe_router_topk", "moe_router_pre_softmax", "moe_router_score_function"),
    "moe_router_topk_scaling_factor",
)
"""Fields of Megatron-core's configuration (transformer_config.py) and of those made from it."""

_OF_MEGATRON = (("context/model.yaml", "config"), ("run_config.yaml", "model"))
"""Files of NeMo 2 and of Megatron-Bridge, and the table in each that is such a configuration."""

_BRIDGES_TOKENIZER = "tokenizer/tokenizer.json"
_TOKENIZER_FILES = ("model", "vocab_file", "merge_file")
_MAX_TOKENIZER_BYTES = 1 << 27
_MAX_JSON_BYTES = 1 << 20
_MAX_ENTRIES = 256
_REFERENCE = "nemo:"


def read_meaning(path: Path) -> Meaning:
    """What a checkpoint says about its weights' meaning; {} where nothing is known.

    Raises:
        CheckpointError: it cannot be read.
    """
    return meaning_of(open_archive(path))


def meaning_of(archive: Archive) -> Meaning:
    """The same of a checkpoint that is open.

    Raises:
        CheckpointError: its configuration cannot be read.
    """
    if CONFIG in archive.members:
        return _of_nemo(archive, read_configuration(archive))
    if "config.json" in archive.members:
        return _of_hugging_face(archive)
    for name, section in _OF_MEGATRON:
        if isinstance(table := read_configuration(archive, name).get(section), dict):
            found = {key: _plain(table[key]) for key in _MEGATRON if key in table}
            return found | _vocabulary(archive, _BRIDGES_TOKENIZER)
    return {}


def differences(first: Meaning, second: Meaning) -> dict[str, tuple[Any, Any]]:
    """Property -> its two values, for those that both know and that differ."""
    # Only what both say: checkpoints of several origins record more or less of it.
    common = [name for name in first if name in second]
    return {n: (first[n], second[n]) for n in common if first[n] != second[n]}


def check_same_meaning(models: Mapping[str | Path, Meaning], remedy: str) -> None:
    """Raise if one of the models computes something else than the first.

    Args:
        models: name -> meaning.
        remedy: how to go on regardless, for the message.

    Raises:
        ValueError: names the two, the property and both values.
    """
    (first, expected), *others = models.items()
    for other, found in others:
        for name, values in differences(expected, found).items():
            here, there = (_shown(value) for value in values)
            raise ValueError(
                f"{name} is {here} in {first} and {there} in {other}: their weights have the same "
                f"names and shapes but do not mean the same; choose other checkpoints, or {remedy}"
            )


def _of_nemo(archive: Archive, config: dict[str, Any]) -> Meaning:
    found = {key: _plain(config.get(key, default)) for key, default in _NEMO.items()}
    if found["scale_positional_embedding"]:
        for key, default in _ROPE_SCALING.items():
            found[key] = _plain(config.get(key, default))
    activation, heads = found["activation"], found["num_attention_heads"]
    if isinstance(activation, str):  # the fast ones are other kernels for the same
        found["activation"] = activation.removeprefix("fast-")
    # None means as many groups as heads, for NeMo (megatron_gpt_model.py).
    found["num_query_groups"] = found["num_query_groups"] or heads
    hidden = _plain(config.get("hidden_size"))
    numbers = isinstance(heads, float) and isinstance(hidden, float)
    if not found["kv_channels"] and numbers and heads:
        found["kv_channels"] = hidden / heads
    for key in [key for key in _SIZES if found[key] is None]:
        del found[key]  # a configuration that does not say
    tokenizer = config.get("tokenizer")
    return found | (_tokenizer(archive, tokenizer) if isinstance(tokenizer, dict) else {})


def _tokenizer(archive: Archive, tokenizer: dict[str, Any]) -> Meaning:
    """The tokenizer's library, special tokens, and files as far as they are in the archive."""
    found: Meaning = {}
    for key in ("library", "sentencepiece_legacy", "special_tokens"):
        if _plain(tokenizer.get(key)) is not None:
            found[f"tokenizer.{key}"] = _plain(tokenizer[key])
    for key in _TOKENIZER_FILES:
        name = tokenizer.get(key)
        if isinstance(name, str) and name.startswith(_REFERENCE):
            name = name.removeprefix(_REFERENCE)
            if name in archive.members:
                # By contents: NeMo gives artifacts a new random name in every save (<uuid>_<name>).
                content = archive.read(name, _MAX_TOKENIZER_BYTES)
                found[f"tokenizer.{key}"] = hashlib.sha256(content).hexdigest()
    return found


def _of_hugging_face(archive: Archive) -> Meaning:
    config = _json(archive, "config.json", _MAX_JSON_BYTES)
    found = {key: _plain(config[key]) for key in _HUGGING_FACE if key in config}
    return found | _vocabulary(archive, "tokenizer.json")


def _vocabulary(archive: Archive, name: str) -> Meaning:
    """Tokens and their numbers in a file of Hugging Face's tokenizers, if it is there."""
    if name not in archive.members:
        return {}
    tokenizer = _json(archive, name, _MAX_TOKENIZER_BYTES)
    model = tokenizer.get("model")
    vocabulary = [
        model.get("vocab") if isinstance(model, dict) else None,
        tokenizer.get("added_tokens"),
    ]  # the rest is spelt differently by different versions of the library
    text = json.dumps(vocabulary, sort_keys=True)
    return {"tokenizer.vocabulary": hashlib.sha256(text.encode()).hexdigest()}


def _json(archive: Archive, name: str, limit: int) -> dict[str, Any]:
    try:
        found = json.loads(archive.read(name, limit))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{archive.path}: {name} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{archive.path}: {name} is not a mapping")
    return found


def _plain(value: Any) -> Any:
    """Numbers as floats (also those that YAML 1.1 leaves as text, 1e-5), text in lower case.

    Tables become text, cut where somebody made them too large to be compared; empty ones are None.
    """
    if isinstance(value, dict | list):
        return _table(value, [_MAX_ENTRIES]) if value else None
    if isinstance(value, bool) or value is None:
        return value
    try:
        # 1e-5 is a text to YAML 1.1, which wants "1.0e-5"; NeMo's files hold both.
        return float(value)
    except (ValueError, TypeError, OverflowError):
        return str(value).lower()


def _table(value: Any, room: list[int]) -> str:
    room[0] -= 1
    if room[0] < 0:
        return "..."
    if isinstance(value, dict):
        keys = sorted(key for key in value if isinstance(key, str))
        return "{" + ", ".join(f"{key}: {_table(value[key], room)}" for key in keys) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_table(entry, room) for entry in value) + "]"
    return str(_plain(value))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.15g}"
    if isinstance(value, str) and len(value) == 64 and value.isalnum():
        return f"one with SHA-256 {value[:12]}"
    return str(value)[:200]
