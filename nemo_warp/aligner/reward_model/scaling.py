"""A family's scaling of embeddings and rotary positions, in reward models.

NeMo applies it to policies (megatron_gpt_model.py l.189, l.507). NeMo-Aligner 0.7 builds reward
models without it (megatron_gpt_reward_model.py l.76): one that starts from a Gemma or a Llama 3.1
computes something else than the model it was made of, without an error. Those trained here have it,
and say so in their configuration; what NeMo-Aligner trained is served as it was trained.
"""

from __future__ import annotations

from typing import Any

from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import mcore_model_customize
from nemo.utils import logging

from nemo_warp.checkpoints.families.classifier import SCALED, SCALINGS


def scale_as_policy(model: Any) -> None:
    """Change a reward model's forward pass in place; call it once, when the ranks are set up."""
    keys = {key: value for key, value in model.cfg.items() if key != "mcore_customization_config"}
    for part in model.get_model_module_list():
        mcore_model_customize(keys, part)


def scale_as_trained(model: Any) -> None:
    """The same for a stored model, if it was trained so."""
    if model.cfg.get(SCALED):
        scale_as_policy(model)
        return
    missing = [key for key in SCALINGS if model.cfg.get(key)]
    if missing:
        logging.warning(
            f"{', '.join(missing)} of this reward model is left out, as NeMo-Aligner did when it "
            "trained the model; train it again with nemo_warp.aligner.train_reward_model"
        )
