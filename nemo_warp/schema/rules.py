"""Rules that take more than one key, for every file that has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_signal(
    rollout: Mapping[str, Any], algorithm: Mapping[str, Any], prefix: str = ""
) -> None:
    """Refuse settings under which a member learns nothing, or is scored as if it sampled otherwise.

    Args:
        rollout, algorithm: a member's sections.
        prefix: of the keys, for the message.

    Raises:
        ValueError: one sample per step with a baseline of others; top_k or top_p.
    """
    samples = rollout["prompts_per_step"] * rollout["samples_per_prompt"]
    if samples == 1 and algorithm["baseline"] != "none":
        raise ValueError(
            f"{prefix}rollout has one sample a step, and {prefix}algorithm.baseline is "
            f"{algorithm['baseline']}, the mean of the others: every advantage would be 0; sample "
            "more, or set the baseline to none"
        )
    for key, whole in (("top_k", 0), ("top_p", 1.0)):
        if rollout[key] != whole:
            raise ValueError(
                f"{prefix}rollout.{key} is {rollout[key]}, expected {whole}: log-probabilities are "
                "those of the whole softmax, so that responses of a truncated one would be scored "
                "as if drawn from another"
            )


def check_clip(reward: Mapping[str, Any], where: str) -> None:
    """Refuse bounds of a reward that are none.

    Raises:
        ValueError: ``clip`` is not two numbers, the lower one first.
    """
    clip = reward.get("clip")
    if clip is not None and not (len(clip) == 2 and clip[0] < clip[1]):
        raise ValueError(f"{where}.clip is {list(clip)}, expected [low, high] with low < high")
