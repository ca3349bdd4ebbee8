"""Tiny random Hugging Face models of every family, written by transformers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 96
_SIZES = {
    **{"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 112},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
_ROPE = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": False},
    "llama3": {
        **{"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": _ROPE},
        **{"tie_word_embeddings": True, "head_dim": 16},
    },
    "mistral": {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1000000.0},
    "qwen2_5": {  # rows that no token has
        **{"model_type": "qwen2", "tie_word_embeddings": False, "vocab_size": VOCABULARY + 16},
    },
    "gemma": {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 32},
    "gemma_7b": {"model_type": "gemma", "num_key_value_heads": 4, "head_dim": 32},
    "gemma2": {
        **{"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 32},
        **{"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "sliding_window": 64},
        # NeMo 2.2.1's norms behind the projections have this epsilon, whatever it is here
        **{"query_pre_attn_scalar": 24, "rms_norm_eps": 1e-5},
    },
}
"""Name -> keys of its configuration over tiny sizes."""


def expressible(family: str, tensor: int, pipeline: int) -> bool:
    """Whether Megatron-core and NeMo 2.2.1 can build a family at a layout.

    Not with fewer key-value heads than TP, nor Gemma 2 in stages (they look for its output layer on
    each, megatron_gpt_model.py l.203).
    """
    heads = FAMILIES[family].get("num_key_value_heads", _SIZES["num_key_value_heads"])
    return heads % tensor == 0 and (family != "gemma2" or pipeline == 1)


def write_hf_model(
    folder: Path,
    family: str,
    seed: int = 0,
    near: Path | None = None,
    changes: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Save a random model; returns the folder.

    Args:
        folder: to write.
        family: of `FAMILIES`.
        seed: of the weights.
        near: write this model with small random changes instead of another one.
        changes: to its configuration.
        **options: of ``save_pretrained``.
    """
    import transformers

    keys = {**_SIZES, **FAMILIES[family], **(changes or {})}
    config = transformers.AutoConfig.for_model(keys.pop("model_type"), **keys)
    torch.manual_seed(seed)
    fresh = transformers.AutoModelForCausalLM.from_config
    model = load_hf_model(near) if near else fresh(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():  # no norm is one, no bias zero
            scale = 0.02 if near or "norm" in name or "bias" in name else 0.08
            weight += scale * torch.randn(weight.shape)
    model.save_pretrained(folder, **options)
    write_hf_tokenizer(folder)
    return folder


def write_hf_tokenizer(folder: Path) -> None:
    """A tokenizer of single characters, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *(chr(33 + i) for i in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(words[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        **{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"},
        **{"pad_token": "<pad>", "chat_template": "{{ messages[0]['content'] }}"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def load_hf_model(folder: Path) -> Any:
    """A folder as transformers reads it in float32; every key must be there, and no other."""
    import transformers

    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    wrong = {kind: keys for kind, keys in found.items() if keys}
    assert not wrong, f"{folder}: {wrong}"
    return model.eval()


def hf_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """[batch, sequence, vocabulary] float32 logits of [batch, sequence] int64 tokens."""
    with torch.no_grad():
        return load_hf_model(folder)(tokens).logits
