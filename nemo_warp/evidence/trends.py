"""Trends that tell of hacking or collapse: alarms while a member trains, judges along a front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_warp.evidence.intervals import Interval, paired_difference

_LEAST_KL_GROWTH = 1.0
"""Nats between two evaluations; below, a ratio of growths says nothing."""


@dataclass(frozen=True)
class Thresholds:
    """When a trend is an alarm; None never. See ``alarms`` in conf/member.yaml."""

    entropy_drop: float | None = 0.5
    length_change: float | None = 0.5
    judge_gap: float | None = 1.0
    kl_growth: float | None = 3.0
    sampler_gap: float | None = 0.05


def sampler_alarm(point: Mapping[str, Any], limits: Thresholds) -> dict[str, str]:
    """What a training step is alarming for, as `alarms`: an engine that samples from another law.

    Args:
        point: with ``sampler_gap_mean`` and ``sampler_gap_max`` where an engine samples, nats.
    """
    mean, limit = point.get("sampler_gap_mean"), limits.sampler_gap
    if mean is None or limit is None or mean <= limit:
        return {}
    return {
        "sampler": f"the engine's log-probabilities are {mean:.3g} nats per token from the model's "
        f"(at most {point['sampler_gap_max']:.3g}), above {limit:g}: responses are sampled from "
        "another law than is trained"
    }


def alarms(points: Sequence[Mapping[str, Any]], limits: Thresholds) -> dict[str, str]:
    """What the newest of a member's evaluations is alarming for: name -> a sentence.

    Args:
        points: its ``eval`` records from the first to the newest, each with ``step``.
    """
    if len(points) < 2:
        return {}
    first, last = points[0], points[-1]
    found = {
        "entropy": _entropy(first, last, limits.entropy_drop),
        "length": _length(first, last, limits.length_change),
        "kl": _kl(points, limits.kl_growth),
    }
    for judge in last.get("judges") or {}:
        found[f"judge {judge}"] = _gap(judge, first, last, limits.judge_gap)
    return {name: text for name, text in found.items() if text}


def _entropy(first: Mapping[str, Any], last: Mapping[str, Any], limit: float | None) -> str:
    before, now = first.get("entropy"), last.get("entropy")
    if limit is None or not before or now is None or now >= (1 - limit) * before:
        return ""
    return (
        f"entropy fell from {before:.2f} to {now:.2f} nats per token, by more than {limit:.0%}: "
        "responses become alike"
    )


def _length(first: Mapping[str, Any], last: Mapping[str, Any], limit: float | None) -> str:
    before, now = first.get("length"), last.get("length")
    if limit is None or not before or not now:
        return ""
    ratio = now / before
    # Symmetric in the ratio: half as long is as large a change as twice as long.
    if 1 / (1 + limit) <= ratio <= 1 + limit:
        return ""
    way = "grew" if ratio > 1 else "shrank"
    return (
        f"responses {way} from {before:.1f} to {now:.1f} tokens, by more than {limit:.0%}: the "
        "reward may pay for length"
    )


def _kl(points: Sequence[Mapping[str, Any]], limit: float | None) -> str:
    """Growth per step since the evaluation before, over the mean growth until then."""
    if limit is None or len(points) < 3:
        return ""
    first, before, last = points[0], points[-2], points[-1]
    recent = last["kl_to_sft"] - before["kl_to_sft"]
    per_step = recent / (last["step"] - before["step"])
    usual = (before["kl_to_sft"] - first["kl_to_sft"]) / (before["step"] - first["step"])
    if recent < _LEAST_KL_GROWTH or per_step <= limit * max(usual, 0.0):
        return ""
    return (
        f"KL to SFT grew by {recent:.1f} nats since step {before['step']}, more than {limit:g} "
        "times as fast as before"
    )


def _gap(judge: str, first: Mapping[str, Any], last: Mapping[str, Any], limit: float | None) -> str:
    rise = _rise(first, last, "reward")
    other = _rise(_of_judge(first, judge), _of_judge(last, judge), judge)
    if limit is None or rise is None or other is None or rise - other <= limit:
        return ""
    return (
        f"the reward rose by {rise:.1f} standard deviations, judge '{judge}' by {other:.1f}: more "
        f"than {limit:g} apart"
    )


def _of_judge(point: Mapping[str, Any], judge: str) -> dict[str, Any]:
    """A judge's mean and error under its own name, as the reward has them."""
    return {
        judge: (point.get("judges") or {}).get(judge),
        f"{judge}_stderr": (point.get("judges_stderr") or {}).get(judge),
        "num_prompts": point.get("num_prompts"),
    }


def _rise(first: Mapping[str, Any], last: Mapping[str, Any], name: str) -> float | None:
    """Change in standard deviations of the first evaluation's prompts; None where not known."""
    error, count = first.get(f"{name}_stderr"), first.get("num_prompts")
    if first.get(name) is None or last.get(name) is None or not error or not count:
        return None
    return float((last[name] - first[name]) / (error * math.sqrt(count)))


@dataclass(frozen=True)
class Parting:
    """Where a judge stops following the reward: from ``kl`` on to the last point.

    Attributes:
        kl: of the first such point, nats.
        last_kl: of the last point.
        reward, judge: change from there to the last point, with its interval.
    """

    kl: float
    last_kl: float
    reward: Interval
    judge: Interval


def parting(
    kls: Sequence[float], rewards: Sequence[np.ndarray], judged: Sequence[np.ndarray]
) -> Parting | None:
    """The first point from which the reward rises to the last point, and the judge does not.

    Rising means that the 95 % interval of the paired difference (bootstrap over prompts) lies above
    zero. None: the judge follows to the end, or the reward does not rise.

    Args:
        kls: of each point, ascending.
        rewards, judged: scores of each point, [P] or [P, G] on the same prompts, NaN where failed.
    """
    for i, kl in enumerate(kls[:-1]):
        reward = paired_difference(rewards[-1], rewards[i])
        judge = paired_difference(judged[-1], judged[i])
        if reward.low > 0 and not judge.low > 0:
            return Parting(kl, kls[-1], reward, judge)
    return None
