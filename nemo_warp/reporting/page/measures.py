"""What the kept responses of each point say: length, diversity, best of N, pass@k. No model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nemo_warp.evidence.best_of import best_of, best_of_kl, pass_at
from nemo_warp.evidence.preference import by_scores
from nemo_warp.evidence.responses import Responses, read_responses, responses_file
from nemo_warp.evidence.texts import distinct, self_bleu, similarity
from nemo_warp.evidence.trends import Parting, parting
from nemo_warp.reporting.run import Curve

SAME_NUMBER = 256
"""Responses that distinct n-grams are counted in: the share falls with their number, and members
are measured on more prompts than fronts, or fewer."""

TITLES = {
    "characters": "length (characters)",
    "distinct_1": f"distinct words (share, {SAME_NUMBER} responses)",
    "distinct_2": f"distinct bigrams (share, {SAME_NUMBER} responses)",
    "self_bleu": "self-BLEU of a prompt's generations",
    "similarity": "similarity of two generations (BLEU)",
}
"""Measure of a point -> its name for people."""


@dataclass(frozen=True)
class BestOf:
    """Best of ``n`` responses to a prompt, on average over prompts.

    Attributes:
        reward: mean reward of the best.
        kl: nats to SFT, at most: log n - (n - 1) / n for choosing, and the log-ratio of what is
            chosen (Beirami et al. 2024).
        passed: pass@n where rewards are 0 or 1, else None.
    """

    n: int
    reward: float
    kl: float
    passed: float | None


@dataclass(frozen=True)
class Measures:
    """Of one point.

    Attributes:
        values: by the names of `TITLES`, NaN where it cannot be known.
        best_of: for n = 1, 2, 4, ... up to the generations; empty where rewards failed.
        preferred: the reward and each judge -> how often its score prefers the point's response
            to SFT's for the same prompt, a tie counting half; empty where either is not known.
    """

    values: dict[str, float]
    best_of: list[BestOf] = field(default_factory=list)
    preferred: dict[str, float] = field(default_factory=dict)


def responses_of(curve: Curve, point: dict[str, Any]) -> Responses | None:
    """The responses that the point was measured with; None where none were kept."""
    if curve.directory is None:
        return None
    base = {"trajectory": "step", "anchor": "anchor"}.get(curve.kind) or point.get("base", "init")
    path = responses_file(curve.directory, str(base), point[curve.position])
    return read_responses(path) if path.exists() else None


def sft_responses(curves: Sequence[Curve]) -> Responses | None:
    """Those of kappa = 0 on the final front, which is SFT; None where it was not measured."""
    points = [(c, p) for c in curves if c.kind == "final" for p in c.points if p["eta"] == 0]
    return responses_of(*points[-1]) if points else None


def measure(responses: Responses, sft: Responses | None = None) -> Measures:
    """All measures of a point's responses.

    Args:
        responses: of the point.
        sft: of the SFT model, on the same prompts or others.
    """
    generations = list(zip(*responses.texts, strict=True))
    values = {
        "characters": float(responses.number("characters").mean()),
        # One generation: several responses to one prompt share words for other reasons.
        "distinct_1": distinct(generations[0][:SAME_NUMBER], 1),
        "distinct_2": distinct(generations[0][:SAME_NUMBER], 2),
        "self_bleu": math.nan,
        "similarity": math.nan,
    }
    if len(generations) > 1:
        values["self_bleu"] = self_bleu(generations)
        values["similarity"] = float(similarity(*generations[:2]).mean())
    return Measures(values, _best_of(responses), {} if sft is None else _preferred(responses, sft))


def _best_of(responses: Responses) -> list[BestOf]:
    """Over the prompts whose rewards are all there."""
    rewards = responses.numbers.get("reward")
    ratios = responses.numbers.get("log_ratio")
    if rewards is None or ratios is None:
        return []
    # A prompt with a failed score has fewer generations, so another best of N.
    whole = ~(np.isnan(rewards) | np.isnan(ratios)).any(1)
    rewards, ratios = rewards[whole], ratios[whole]
    if not len(rewards):
        return []
    binary = bool(np.isin(rewards, (0, 1)).all())
    # Powers of two up to the number of generations.
    sizes = [2**i for i in range(rewards.shape[1].bit_length())]
    return [
        BestOf(
            n,
            float(best_of(rewards, n).mean()),
            best_of_kl(n) + float(best_of(rewards, n, ratios).mean()),
            float(pass_at(rewards, n).mean()) if binary else None,
        )
        for n in sizes
    ]


def _preferred(responses: Responses, sft: Responses) -> dict[str, float]:
    """Name -> rate (the paper's side by side with SFT); only on equal prompts."""
    if responses.prompts != sft.prompts:
        return {}
    names = [n for n in responses.numbers if n == "reward" or n.startswith("judge:")]
    return {
        name.removeprefix("judge:"): by_scores(responses.number(name), sft.number(name)).rate.mean
        for name in names
        if _scored(responses, name) and _scored(sft, name)
    }


def partings(curve: Curve) -> dict[str, Parting | None]:
    """Each judge -> where along this curve it stops following the reward.

    Only points whose responses were kept count; none, or no judge, gives nothing.
    """
    kept = [(p["kl_to_sft"], r) for p in curve.points if (r := responses_of(curve, p)) is not None]
    kept.sort(key=lambda pair: pair[0])
    if len(kept) < 2:
        return {}
    kls, responses = [kl for kl, _ in kept], [r for _, r in kept]
    same = all(r.prompts == responses[0].prompts for r in responses)
    judges = [n for n in responses[0].numbers if n.startswith("judge:")]
    judges = [n for n in judges if all(_scored(r, n) for r in responses)]
    if not same or not all(_scored(r, "reward") for r in responses):
        return {}
    rewards = [r.number("reward") for r in responses]
    return {
        name.partition(":")[2]: parting(kls, rewards, [r.number(name) for r in responses])
        for name in judges
    }


def _scored(responses: Responses, name: str) -> bool:
    return name in responses.numbers and not np.isnan(responses.numbers[name]).all()


def as_json(curves: Sequence[Curve], measured: dict[str, list[Measures | None]]) -> dict[str, Any]:
    """Everything that was measured, for programs: curve -> points."""
    return {
        curve.name: [
            {**_plain(point), **(_measures(found) if found is not None else {})}
            for point, found in zip(curve.points, measured[curve.name], strict=True)
        ]
        for curve in curves
    }


def _plain(point: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in point.items() if key != "samples"}


def _measures(found: Measures) -> dict[str, Any]:
    values = {name: None if math.isnan(v) else v for name, v in found.values.items()}
    best_of = [best.__dict__ for best in found.best_of]
    return {**values, "best_of": best_of, "preferred": found.preferred}
