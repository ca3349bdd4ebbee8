"""Judges that are asked while two policies are compared: reward servers, and language models."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nemo_warp.evidence.preference import grades_of
from nemo_warp.evidence.responses import Responses, common_prompts
from nemo_warp.records import RecordError
from nemo_warp.rewards.client import RewardClient
from nemo_warp.rewards.errors import RewardError
from nemo_warp.rewards.library.pairwise import Pairwise


@dataclass(frozen=True)
class Verdicts:
    """Of a judge who saw both responses.

    Attributes:
        name: the judge's.
        grades, swapped: float64 [P, G] by the order in which they were shown, positive for the
            first policy; NaN where there was no verdict.
        reason: why a verdict is missing, of the first one that is.
    """

    name: str
    grades: np.ndarray
    swapped: np.ndarray
    reason: str


def with_scores(responses: Responses, endpoint_file: Path) -> Responses:
    """The responses with a reward server's scores of them, as ``judge:NAME`` (the file's stem).

    Raises:
        ValueError: it takes fields of the prompts, which files of responses do not hold.
        RecordError: the server cannot be had, or scored nothing.
    """
    name = endpoint_file.stem.removeprefix("endpoint_")
    client = RewardClient(endpoint_file, name=name)
    try:
        client.connect()
        if client.needs:
            raise ValueError(
                f"the judge at {endpoint_file} takes the field '{client.needs[0]}' of each prompt, "
                "which files of responses do not hold"
            )
        texts = [text for row in responses.texts for text in row]
        prompts = [
            p for p, row in zip(responses.prompts, responses.texts, strict=True) for _ in row
        ]
        # No run id was given: a server that is asked by hand may belong to any run.
        scores = client.score(prompts, texts)
    except RewardError as error:
        raise RecordError(str(error)) from error
    finally:
        client.close()
    # Some failures are counted in the table; a server that scores nothing is the wrong one.
    if scores.failed.all():
        raise RecordError(
            f"judge '{name}' scored nothing of {responses.source}: {scores.reasons[0]}"
        )
    column = scores.scores.reshape(len(responses.prompts), -1)
    return replace(responses, numbers={**responses.numbers, f"judge:{name}": column})


def verdicts(
    first: Responses, second: Responses, name: str, judge: Pairwise, concurrency: int
) -> Verdicts:
    """A language model's verdicts on common prompts, generation by generation, in both orders.

    Raises:
        ValueError: no prompt in common.
        RecordError: it gave no verdict at all.
    """
    ours, theirs = common_prompts(first, second)
    pairs = [
        (first.prompts[i], a, b)
        for i, j in zip(ours, theirs, strict=True)
        # Generation by generation, as many as both have: a language model costs money per question.
        for a, b in zip(first.texts[i], second.texts[j], strict=False)
    ]
    with tqdm(
        total=2 * len(pairs), desc=name, unit="verdict", file=sys.stderr, disable=None
    ) as bar:
        found = judge.both_orders(pairs, concurrency, bar.update)
    grades = grades_of(found.straight).reshape(len(ours), -1)
    # 0.0 - x and not -x: a tie would become -0.0, which prints with a sign.
    swapped = 0.0 - grades_of(found.swapped).reshape(len(ours), -1)
    if np.isnan(grades).all() and np.isnan(swapped).all():
        raise RecordError(f"judge '{name}' gave no verdict on {len(pairs)} pairs: {found.reason}")
    return Verdicts(name, grades, swapped, found.reason)


def llm_judge(model: str, options: dict[str, Any]) -> Pairwise:
    """The judge of ``--llm-judge``.

    Raises:
        ValueError: it cannot be asked with these options.
    """
    try:
        return Pairwise(model, **options)
    except ValueError as error:
        raise ValueError(f"--llm-judge {model}: {error}") from None


def endpoint_files(judges: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Words of ``--judge``: files of running servers, and names in the files of responses."""
    files = [word for word in judges if word.endswith(".json") and Path(word).is_file()]
    return [Path(word) for word in files], [word for word in judges if word not in files]
