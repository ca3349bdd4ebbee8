"""Settings of NeMo that a checkpoint brings along, or a recipe adds, and that are wrong here.

NeMo would run with each of them, and most would give wrong numbers without an error. No NeMo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def _off(value: Any) -> bool:
    return value in (None, False, 0, "none", "")


def _one(value: Any) -> bool:
    return value in (None, 1)


@dataclass(frozen=True)
class Rule:
    """What a setting may be.

    Attributes:
        allowed: of a value; an absent key is allowed.
        expected: in words.
        reason: what goes wrong otherwise.
    """

    allowed: Callable[[Any], bool]
    expected: str
    reason: str


MODEL_RULES = {
    "context_parallel_size": Rule(
        _one, "1", "each rank would see a part of the sequence, so log-probabilities would be wrong"
    ),
    "expert_model_parallel_size": Rule(
        _one, "1", "experts are not replicated over the data-parallel group, which the anchor is "
        "split over"
    ),
    "virtual_pipeline_model_parallel_size": Rule(
        _one, "null", "NeMo-Aligner's forward passes know one model chunk per rank"
    ),
    "enable_cuda_graph": Rule(
        _off, "false", "captured graphs read the policy's memory and not the weights that are put "
        "in its place, so the KL would be 0 always"
    ),
    "fp8": Rule(_off, "false", "fp8 copies of weights are not changed when weights are swapped"),
    "fp8_params": Rule(_off, "false", "anchor and merges need bf16 or fp32 parameters"),
    "ub_tp_comm_overlap": Rule(
        _off, "false", "its buffers have one fixed sequence length, and sampled lengths vary"
    ),
    "rampup_batch_size": Rule(
        _off, "null", "the batch of a step is rollout.prompts_per_step * samples_per_prompt"
    ),
    "defer_embedding_wgrad_compute": Rule(
        _off, "false", "the output layer's gradient is made in chunks, none of it later"
    ),
    "fsdp": Rule(_off, "false", "weights are swapped in Megatron's layout, not in FSDP's"),
}  # fmt: skip
"""Keys of the checkpoint's ``model_config.yaml``, which ``model.extra`` can override."""

OPTIM_RULES = {
    "overlap_param_sync": Rule(
        _off, "false", "parameters would be gathered during the forward pass, over weights that "
        "were put in their place"
    ),
    "overlap_param_gather_with_optimizer_step": Rule(
        _off, "false", "Megatron's optimizer would be split in two, which is not supported here"
    ),
}  # fmt: skip
"""Keys of ``optim.extra``; a checkpoint's own ``optim`` section is not used."""


def check_settings(model: Mapping[str, Any], config: Any, path: Any) -> None:
    """Refuse settings under which a member or an evaluation would be wrong.

    Args:
        model: of ``path``, its ``model_config.yaml``.
        config: with ``model``, and ``optim`` if it trains.

    Raises:
        ValueError: names the setting, where it comes from, why it is refused and how to change it.
    """
    extra = config.model.get("extra") or {}
    for key, rule in MODEL_RULES.items():
        # What the recipe adds wins over the checkpoint's, as it does when NeMo builds the model.
        source = "model.extra" if key in extra else str(path)
        value = extra[key] if key in extra else model.get(key)
        _check(rule, key, value, source, f"set model.extra.{key}={rule.expected}")
    optim = (config.get("optim") or {}).get("extra") or {}
    for key, rule in OPTIM_RULES.items():
        _check(rule, key, optim.get(key), "optim.extra", f"set optim.extra.{key}={rule.expected}")


def _check(rule: Rule, key: str, value: Any, source: str, remedy: str) -> None:
    if not rule.allowed(value):
        raise ValueError(f"{key} of {source} is {value!r}, expected {rule.expected}: "
                         f"{rule.reason}; {remedy}")  # fmt: skip
