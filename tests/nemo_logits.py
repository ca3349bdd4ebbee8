"""Logits of a .nemo that stock NeMo restores, at any layout. Inside `ranks.run_ranks`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models
import torch
from hf_models import VOCABULARY

LENGTH = 48
ON_A_CPU = {
    **{"transformer_engine": False, "precision": 32, "apply_rope_fusion": False},
    **{"masked_softmax_fusion": False, "persist_layer_norm": False, "use_cpu_initialization": True},
    **{"bias_dropout_add_fusion": False, "bias_activation_fusion": False},
    **{"optim": {"name": "adamw", "lr": 1e-3}},
}
"""What a recipe without a GPU sets as well: no kernels of Transformer Engine, apex or inductor."""


def sample_tokens() -> torch.Tensor:
    """Tokens [2, LENGTH] int64, always the same; none of the first three, which are special."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)


def restore(path: Path, tensor: int, pipeline: int) -> Any:
    """The model as stock NeMo restores it in fp32; all ranks call it."""
    return tiny_models.load_tiny_nemo(path, tensor, pipeline, ON_A_CPU)


def nemo_logits(model: Any) -> torch.Tensor | None:
    """Logits [2, LENGTH, vocabulary / TP] of `sample_tokens`; None off the last stage."""
    positions = torch.arange(LENGTH).expand(2, -1)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    return tiny_models.last_stage_logits(model, [sample_tokens(), mask, positions])
