"""Logits of a .nemo that stock NeMo restores, at any layout. Inside `ranks.run_ranks`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models
import torch
from hf_models import VOCABULARY
from omegaconf import open_dict

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
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo.collections.nlp.parts.nlp_overrides import NLPSaveRestoreConnector

    config = tiny_models.tiny_config(Path("unused"), tensor, pipeline)
    trainer, connector = tiny_models.build_trainer(config), NLPSaveRestoreConnector()
    stored = MegatronGPTModel.restore_from(
        str(path), trainer=trainer, return_config=True, save_restore_connector=connector
    )
    with open_dict(stored):
        stored.merge_with(ON_A_CPU)
        stored.tensor_model_parallel_size = tensor
        stored.pipeline_model_parallel_size = pipeline
    return MegatronGPTModel.restore_from(
        str(path),
        trainer=trainer,
        override_config_path=stored,
        save_restore_connector=connector,
        map_location="cpu",
    )


def nemo_logits(model: Any) -> torch.Tensor | None:
    """Logits [2, LENGTH, vocabulary / TP] of `sample_tokens`; None off the last stage."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    positions = torch.arange(LENGTH).expand(2, -1)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    model.eval()
    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=model.get_forward_output_only_func(),
            data_iterator=iter([[sample_tokens(), mask, positions]]),
            model=[model.model],
            num_microbatches=1,
            forward_only=True,
            seq_length=LENGTH,
            micro_batch_size=2,
        )
    return found[0]["logits"] if parallel_state.is_pipeline_last_stage() else None
