"""Tiny GPT models built and saved by NeMo itself, for tests that need a real ``.nemo``.

Call these inside `ranks.run_ranks`: a distributed checkpoint is written by all ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

VOCABULARY = 128

_TEXT = """In the beginning God created the heaven and the earth. And the earth was without form,
and void; and darkness was upon the face of the deep. And the Spirit of God moved upon the face
of the waters. And God said, Let there be light: and there was light. And God saw the light, that
it was good: and God divided the light from the darkness. And God called the light Day, and the
darkness he called Night. And the evening and the morning were the first day."""


def write_tokenizer(
    directory: Path, vocabulary: int = VOCABULARY, lines: Iterable[str] = _TEXT.split(". ")
) -> Path:
    """Train a SentencePiece model on lines of text; the path of its ``.model`` file."""
    import sentencepiece

    text, prefix = directory / "text.txt", directory / "tokenizer"
    text.write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(prefix),
        vocab_size=vocabulary,
        model_type="bpe",
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
        **{"bos_id": 1, "eos_id": 2, "unk_id": 0, "pad_id": 3},
    )
    return prefix.with_suffix(".model")


def tiny_config(tokenizer: Path, tensor: int = 1, pipeline: int = 1, **model: Any) -> DictConfig:
    """The whole NeMo configuration (``trainer`` and ``model``) of a two-layer GPT, CPU or GPU."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = {
        "devices": world_size,
        "num_nodes": 1,
        "accelerator": "auto",
        "precision": 32,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "max_steps": 10,
    }
    defaults = {
        "mcore_gpt": True,
        "seed": 1234,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": None,
        "encoder_seq_length": 64,
        "max_position_embeddings": 64,
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "normalization": "rmsnorm",
        "activation": "fast-swiglu",
        "bias": False,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
        "make_vocab_size_divisible_by": 16,
        "transformer_engine": False,
        "megatron_amp_O2": False,
        "sequence_parallel": False,
        "gradient_as_bucket_view": True,
        "use_cpu_initialization": True,
        "bias_activation_fusion": False,
        "bias_dropout_add_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "activations_checkpoint_granularity": None,
        "activations_checkpoint_method": None,
        "activations_checkpoint_num_layers": None,
        "activations_checkpoint_layers_per_pipeline": None,
        "dist_ckpt_format": "torch_dist",
        "dist_ckpt_load_on_device": True,
        "tokenizer": {
            "library": "sentencepiece",
            "type": None,
            "model": str(tokenizer),
            "vocab_file": None,
            "merge_file": None,
            "sentencepiece_legacy": False,
        },
        "data": {"data_prefix": None, "num_workers": 0, "dataloader_type": "single"},
        "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.0, "betas": [0.9, 0.95]},
    }
    return OmegaConf.merge({"trainer": trainer, "model": defaults}, {"model": model})


def build_trainer(config: DictConfig) -> Any:
    """A NeMo trainer for this process's rank."""
    from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder

    return MegatronTrainerBuilder(config).create_trainer()


def build_model(config: DictConfig, trainer: Any) -> Any:
    """A freshly initialised ``MegatronGPTModel``; afterwards the process groups exist."""
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel

    model = MegatronGPTModel(config.model, trainer)  # tells NeMo the layout ...
    trainer.strategy.setup_environment()  # ... for which this makes the groups
    return model


def save_tiny_nemo(path: Path, tokenizer: Path, **options: Any) -> None:
    """Build a tiny GPT and save it as a ``torch_dist`` ``.nemo``; all ranks call it.

    Args:
        path: the ``.nemo`` file to write.
        tokenizer: see `write_tokenizer`.
        **options: of `tiny_config` (``tensor=2``, ``pipeline=2``, any model key).
    """
    config = tiny_config(tokenizer, **options)
    trainer = build_trainer(config)
    build_model(config, trainer).save_to(str(path))


def load_tiny_nemo(
    path: Path, tensor: int = 1, pipeline: int = 1, overrides: dict[str, Any] | None = None
) -> Any:
    """``MegatronGPTModel.restore_from`` at the given layout; all ranks call it.

    Args:
        path: the ``.nemo``.
        tensor, pipeline: the layout.
        overrides: keys of the model's configuration.
    """
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo.collections.nlp.parts.nlp_overrides import NLPSaveRestoreConnector

    config = tiny_config(Path("unused"), tensor, pipeline)
    trainer = build_trainer(config)
    connector = NLPSaveRestoreConnector()
    model_config = MegatronGPTModel.restore_from(
        str(path), trainer=trainer, return_config=True, save_restore_connector=connector
    )
    with open_dict(model_config):
        model_config.merge_with(overrides or {})
        model_config.tensor_model_parallel_size = tensor
        model_config.pipeline_model_parallel_size = pipeline
    return MegatronGPTModel.restore_from(
        str(path),
        trainer=trainer,
        override_config_path=model_config,
        save_restore_connector=connector,
        map_location="cpu",
    )


@torch.no_grad()
def last_stage_logits(model: Any, batch: list[torch.Tensor]) -> torch.Tensor | None:
    """This rank's shard of the logits [b, S, vocabulary / TP]; None off the last stage.

    Args:
        model: NeMo's.
        batch: tokens [b, S], attention mask, positions, as its forward step takes them.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    number, length = batch[0].shape
    model.eval()
    found = get_forward_backward_func()(
        forward_step_func=model.get_forward_output_only_func(),
        data_iterator=iter([batch]),
        model=[model.model],
        num_microbatches=1,
        forward_only=True,
        seq_length=length,
        micro_batch_size=number,
    )
    return found[0]["logits"] if parallel_state.is_pipeline_last_stage() else None
