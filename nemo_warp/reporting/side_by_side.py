"""Two policies on the same prompts, by each judge: means, differences, wins, length controlled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nemo_warp.evidence.intervals import Interval, over_prompts, paired_difference
from nemo_warp.evidence.preference import (
    SideBySide,
    by_scores,
    by_verdicts,
    length_controlled_rate,
    swap_agreement,
)
from nemo_warp.evidence.responses import Responses, common_prompts
from nemo_warp.reporting.asked import Verdicts
from nemo_warp.reporting.table import markdown_rows

LENGTHS = ("tokens", "characters")


def compare(
    first: Responses,
    second: Responses,
    judges: list[str],
    tie_within: float,
    verdicts: Sequence[Verdicts] = (),
) -> tuple[str, dict[str, Any]]:
    """A table for people, and the same numbers.

    Args:
        first, second: the policies' responses.
        judges: names of the scores to compare by.
        tie_within: scores that differ by no more are equal.
        verdicts: of judges who saw both responses, on the common prompts.

    Raises:
        ValueError: no common prompt, or a judge has no score on one side.
    """
    ours, theirs = common_prompts(first, second)
    # Tokens where both policies have them; characters where files came from elsewhere.
    length = next(n for n in LENGTHS if n in first.numbers and n in second.numbers)
    values: dict[str, Any] = {
        "first": first.source,
        "second": second.source,
        "prompts": len(ours),
        "judges": {},
    }
    rows = []
    for name in judges:
        a, b = first.number(name)[ours], second.number(name)[theirs]
        outcome = by_scores(a, b, tie_within)
        controlled = length_controlled_rate(
            *_comparisons(
                a, b, first.number(length)[ours], second.number(length)[theirs], tie_within
            )
        )
        difference = paired_difference(a, b)
        values["judges"][name] = {
            "first": over_prompts(a).to_json(),
            "second": over_prompts(b).to_json(),
            "difference": difference.to_json(),
            **_outcome(outcome),
            "length_controlled_rate": controlled,
        }
        rows.append(
            [
                name,
                str(over_prompts(a)),
                str(over_prompts(b)),
                _marked(difference),
                _counts(outcome),
                _percent(outcome.rate),
                f"{controlled:.1%}",
            ]
        )
    notes = []
    lengths = first.number(length)[ours], second.number(length)[theirs]
    for seen in verdicts:
        values["judges"][seen.name], row, note = _seen(seen, *lengths)
        rows.append(row)
        notes.append(note)
    gap = paired_difference(first.number(length)[ours], second.number(length)[theirs])
    values["length_difference"] = {"unit": length, **gap.to_json()}
    header = [
        "judge",
        "A",
        "B",
        "A - B",
        "A wins / ties / loses",
        "preference for A",
        "at equal length",
    ]
    text = "\n".join(
        [
            f"A: {first.source}",
            f"B: {second.source}",
            f"{len(ours)} prompts in common; A's responses are {gap} {length} longer",
            "",
            *markdown_rows(header, rows),
            "",
            *notes,
            "[95 % intervals]: bootstrap over prompts, differences paired; * excludes 0.",
        ]
    )
    return text, values


def _seen(
    seen: Verdicts, a_length: np.ndarray, b_length: np.ndarray
) -> tuple[dict[str, Any], list[str], str]:
    """Numbers, row and note of a judge who saw both responses."""
    grades = np.concatenate([seen.grades, seen.swapped], axis=1)
    outcome, score = by_verdicts(grades)
    pairs = seen.grades.shape[1]
    # Twice: the same pairs are in `grades` in both orders.
    gaps = np.tile(a_length[:, :pairs] - b_length[:, :pairs], 2)
    # A pair without a verdict, or without both lengths, cannot be in the fit.
    given = ~np.isnan(grades) & ~np.isnan(gaps)
    controlled = length_controlled_rate((np.sign(grades[given]) + 1) / 2, gaps[given])
    both = ~np.isnan(seen.grades) & ~np.isnan(seen.swapped)
    agreement = swap_agreement(seen.grades, seen.swapped) if both.any() else None
    values = {
        "preference_score": score.to_json(),
        **_outcome(outcome),
        "length_controlled_rate": controlled,
        "swap_agreement": agreement,
    }
    row = [seen.name, "", "", _marked(score), _counts(outcome), _percent(outcome.rate),
           f"{controlled:.1%}"]  # fmt: skip
    agreed = "no pair has both" if agreement is None else f"{agreement:.1%} of pairs"
    note = f"{seen.name} saw both responses, in both orders; the same verdict in both: {agreed}."
    if outcome.failed:
        note += f" {outcome.failed} verdicts are missing (the first: {seen.reason})."
    return values, row, note


def _comparisons(
    a: np.ndarray, b: np.ndarray, a_length: np.ndarray, b_length: np.ndarray, tie_within: float
) -> tuple[np.ndarray, np.ndarray]:
    """Outcome and length gap of every pair of responses that both have a score: [N] and [N]."""
    # Every response of A against every one of B, as `by_scores` counts them.
    gap = a[:, :, None] - b[:, None, :]
    outcome = np.where(np.abs(gap) <= tie_within, 0.5, (gap > 0).astype(float))
    longer = a_length[:, :, None] - b_length[:, None, :]
    scored = ~np.isnan(gap)
    return outcome[scored], longer[scored]


def _counts(outcome: SideBySide) -> str:
    failed = f" ({outcome.failed} failed)" if outcome.failed else ""
    return f"{outcome.wins} / {outcome.ties} / {outcome.losses}{failed}"


def _outcome(outcome: SideBySide) -> dict[str, Any]:
    return {**outcome.__dict__, "rate": outcome.rate.to_json()}


def _marked(difference: Interval) -> str:
    return f"{difference}{' *' if difference.excludes_zero else ''}"


def _percent(rate: Interval) -> str:
    return f"{rate.mean:.1%} [{rate.low:.1%}, {rate.high:.1%}]"
