"""A NeMo-Aligner reward model as transformers' sequence classifier: the score of the last token."""

from __future__ import annotations

from typing import Any

import torch

from nemo_warp.checkpoints.checkpoint import Checkpoint
from nemo_warp.checkpoints.families.streaming import Rows
from nemo_warp.checkpoints.families.tensors import Joined, Run
from nemo_warp.checkpoints.io.reading import FileCache
from nemo_warp.checkpoints.logical import LogicalTensor

HEAD, BIAS = "rm_head.weight", "rm_head.bias"
SCALED = "scaled_as_policy"
"""Key of ``model_config.yaml``: the reward model has the `SCALINGS` that its policy has."""
SCALINGS = ("apply_embedding_scaling", "scale_positional_embedding")
"""Keys that NeMo-Aligner's reward models have and do not follow (reward_model/scaling.py)."""
_UNUSED = (BIAS, "output_layer.weight")
"""Of a reward model: what a classifier has no place for, and what no forward pass reads
(NeMo-Aligner megatron_gpt_reward_model.py l.97)."""

_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "gemma": "Gemma"} | {
    "gemma2": "Gemma2"
}


def is_reward_model(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has a reward head."""
    return HEAD in checkpoint.tensors


def used_tensors(checkpoint: Checkpoint) -> dict[str, LogicalTensor]:
    """The tensors that become a classifier's."""
    return {name: t for name, t in checkpoint.tensors.items() if name not in _UNUSED}


def with_head(checkpoint: Checkpoint, policy: list[Joined]) -> list[Joined]:
    """A policy's Hugging Face tensors, with ``score`` in place of the output layer.

    Raises:
        ValueError: the reward is not the last token's, or not of the family's model.
    """
    unscaled = [key for key in SCALINGS if checkpoint.config.get(key)]
    if unscaled and not checkpoint.config.get(SCALED):
        raise ValueError(
            f"{checkpoint.path}: NeMo-Aligner trained this reward model without {unscaled[0]}, "
            "which transformers would apply; train it with nemo_warp.aligner.train_reward_model"
        )
    for key in ("use_avg_pool", "output_sequence"):
        if checkpoint.config.get(key):
            raise ValueError(
                f"{checkpoint.path}: {key} is set, but a sequence classifier of transformers "
                "scores the last token"
            )
    shape = checkpoint.tensors[HEAD].shape
    score = Joined("score.weight", shape, (Run(HEAD, 0, shape[0]),))
    return [one for one in policy if one.name != "lm_head.weight"] + [score]


def classifier_config(checkpoint: Checkpoint, hf: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of the classifier.

    ``nemo_reward`` holds what it does not compute: NeMo's reward is its score plus ``bias``, less
    ``mean``, over ``std``.
    """
    labels = checkpoint.tensors[HEAD].shape[0]
    scale = checkpoint.config.get("reward_standardization") or {}
    standard = {key: scale.get(key) for key in ("mean", "std")} if scale.get("enable") else {}
    pad = hf.get("pad_token_id")
    end = hf.get("eos_token_id")
    return {
        **hf,
        "architectures": [f"{_CLASSES[hf['model_type']]}ForSequenceClassification"],
        "id2label": {str(n): f"LABEL_{n}" for n in range(labels)},
        "label2id": {f"LABEL_{n}": n for n in range(labels)},
        # what transformers finds the last token by; batches are padded with it
        "pad_token_id": pad if pad is not None else end[0] if isinstance(end, list) else end,
        "nemo_reward": {"bias": _bias(checkpoint), **standard},
    }


def _bias(checkpoint: Checkpoint) -> list[float]:
    tensor = checkpoint.tensors.get(BIAS)
    if tensor is None:
        return []
    with FileCache() as files:
        rows = Rows({BIAS: tensor}, files)
        parts = rows.portions(Joined(BIAS, tensor.shape, (Run(BIAS, 0, tensor.shape[0]),)))
        found = [
            torch.from_numpy(data.reshape(-1)).view(tensor.dtype.of_torch()) for _, data in parts
        ]
        rows.check()
    return torch.cat(found).float().tolist()
