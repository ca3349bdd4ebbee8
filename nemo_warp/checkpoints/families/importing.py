"""A Hugging Face folder becomes a distributed ``.nemo``, streamed; no NeMo, no transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
import yaml

from nemo_warp.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_warp.checkpoints.families.configuration import nemo_keys
from nemo_warp.checkpoints.families.nemo_writer import TarWriter, distributed_checkpoint
from nemo_warp.checkpoints.families.publishing import new_file
from nemo_warp.checkpoints.families.streaming import Rows, check_complete
from nemo_warp.checkpoints.families.tensors import megatron_tensors
from nemo_warp.checkpoints.families.tokenizer import carried_files, tokenizer_section
from nemo_warp.checkpoints.formats.safetensors import SafetensorsStore
from nemo_warp.checkpoints.io.reading import FileCache
from nemo_warp.checkpoints.logical import LogicalTensor
from nemo_warp.checkpoints.names import hugging_face_name

ORIGIN = "hugging_face"
"""Section of ``model_config.yaml`` that holds what NeMo has no key for, for the way back."""

_TARGET = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
_DEFAULTS = {
    **{"target": _TARGET, "nemo_version": "2.2.1", "mcore_gpt": True, "precision": "bf16-mixed"},
    # 1: rows are exactly the folder's, at any TP that divides them; NeMo would pad to 128 times TP,
    # and those rows would have to be made up.
    **{"micro_batch_size": 1, "global_batch_size": 1, "make_vocab_size_divisible_by": 1},
    **{"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1},
    **{"virtual_pipeline_model_parallel_size": None, "hidden_dropout": 0.0},
    **{"attention_dropout": 0.0, "ffn_dropout": 0.0, "init_method_std": 0.02},
    **{"use_scaled_init_method": True, "transformer_engine": True, "name": ""},
    **{"megatron_amp_O2": False, "sequence_parallel": False, "bias_activation_fusion": True},
    **{"bias_dropout_add_fusion": True, "masked_softmax_fusion": True, "apply_rope_fusion": True},
    **{"gradient_accumulation_fusion": False, "persist_layer_norm": True},
    **{"gradient_as_bucket_view": True, "dist_ckpt_format": "torch_dist"},
    **{"activations_checkpoint_granularity": None, "activations_checkpoint_method": None},
    **{"activations_checkpoint_num_layers": None},
    **{"activations_checkpoint_layers_per_pipeline": None},
    # Transformer Engine asks for states of its own (_extra_state), which only it can make and
    # which are empty without fp8; every weight was checked when it was imported.
    **{"dist_ckpt_load_strictness": "log_all", "normalize_attention_scores": True},
    **{"data": {"data_prefix": None, "num_workers": 0, "dataloader_type": "single"}},
    **{"optim": {"name": "distributed_fused_adam", "lr": 1e-6}},
}


def import_hf(
    source: Path, output: Path, ignored: Iterable[str] = (), progress: Callable[[int], Any] = int
) -> dict[str, Any]:
    """Write ``output``, a ``.nemo``, from a Hugging Face folder.

    Args:
        source: folder with config.json, safetensors and a tokenizer.
        output: must not exist.
        ignored: keys of config.json that make no difference.
        progress: called with a number of bytes written.

    Returns:
        The ``model_config.yaml`` that was written.

    Raises:
        ValueError: an unknown family, key or tokenizer; nothing is written.
        CheckpointError: a shard is missing or damaged, a tensor has another shape.
    """
    checkpoint = _open_hugging_face(source)
    keys = nemo_keys(checkpoint.config, f"{source}/config.json", ignored)
    joined = megatron_tensors(keys)
    tensors = _by_hf_name(checkpoint, keys)
    check_complete(joined, tensors, str(source), frozenset())
    section, artifacts = tokenizer_section(checkpoint.archive, keys["override_vocab_size"])
    origin = {"config": checkpoint.config, "files": carried_files(checkpoint.archive)}
    config = {**_DEFAULTS, **keys, "tokenizer": section, ORIGIN: origin}
    with new_file(output) as stream, FileCache() as files:
        tar = TarWriter(stream)
        tar.add("model_config.yaml", yaml.safe_dump(config, sort_keys=True).encode())
        for name, content in artifacts.items():
            tar.add(name, content)
        rows = Rows(tensors, files)
        with distributed_checkpoint(tar, keys["num_layers"]) as writer:
            for one in joined:
                dtype = tensors[one.runs[0].name].dtype.of_torch()
                for first, data in rows.portions(one):
                    portion = torch.from_numpy(data.reshape(-1)).view(dtype)
                    writer.add(one.name, one.shape, first, portion.view(-1, *one.shape[1:]))
                    progress(data.nbytes)
        # Before the file gets its name: a damaged shard must not become a policy.
        rows.check()
        tar.close()
    return config


def total_bytes(source: Path) -> int:
    """Bytes of all weights of a folder, for a progress bar."""
    return sum(tensor.nbytes for tensor in open_checkpoint(source).tensors.values())


def _open_hugging_face(source: Path) -> Checkpoint:
    checkpoint = open_checkpoint(source)
    if checkpoint.format != "safetensors" or not checkpoint.config:
        raise ValueError(
            f"{source} is not a Hugging Face folder with config.json and safetensors "
            f"(found {checkpoint.format})"
        )
    return checkpoint


def _by_hf_name(checkpoint: Checkpoint, keys: dict[str, Any]) -> dict[str, LogicalTensor]:
    """Hugging Face's key -> tensor, without copies that some writers store as well."""
    store = cast("SafetensorsStore", checkpoint.store)  # as `_open_hugging_face` made sure
    found = {key: checkpoint.tensors[hugging_face_name(key)] for key in store.stored}
    dropped = [key for key in found if key.endswith(".rotary_emb.inv_freq")]
    if keys["share_embeddings_and_output_weights"]:
        dropped += [key for key in found if key == "lm_head.weight"]  # a copy of the embedding
    return {key: tensor for key, tensor in found.items() if key not in dropped}
