"""Measured series on disk: a member's ``metrics.jsonl`` and an evaluation's ``points.jsonl``.

Both are appended one JSON object per line by processes that may be killed at any moment, so a last
line without its newline is a part of a record and is left out. Anything else that is not a record
is an error that names the line.

A KL may have been estimated twice on the same samples: from the sampled tokens, and exactly over
the vocabulary at each of them (``..._exact``). Both estimate the same number, the second with a far
smaller error, so where it is present it is the one that is read.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_warp.records import RecordError

REQUIRED = {
    "train": ("step",),
    "eval": ("step", "reward", "kl_to_sft"),
    "anchor": ("step", "reward", "kl_to_sft"),
    "point": ("eta", "reward", "kl_to_sft"),
}
DIVERGENCES = ("kl_to_sft", "kl_to_anchor")
OPTIONAL = (
    "reward_stderr",
    "kl_to_sft_stderr",
    "kl_to_anchor",
    "kl_to_anchor_stderr",
    "length",
    "entropy",
    "ended_share",
    "num_prompts",
)


def read_metrics(path: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind (``train``, ``eval``, ``anchor``) in a member's metrics, by step.

    A resumed member measures some steps again; of each step the last record counts.

    Raises:
        RecordError: the file is missing or a line is not a record.
    """
    by_step = {}
    for where, record in read_records(path):
        if record.get("kind") == kind and _was_measured(record, REQUIRED[kind], where):
            _check_numbers(record, REQUIRED[kind], where)
            # By step and kind, so that a resumed member's second measurement replaces the first.
            by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)]


def read_points(path: Path) -> list[dict[str, Any]]:
    """The points of a front, ordered by base and eta; of a repeated point the last one counts.

    Raises:
        RecordError: the file is missing or a line is not a point.
    """
    by_place = {}
    for where, record in read_records(path):
        if _was_measured(record, REQUIRED["point"], where):
            _check_numbers(record, REQUIRED["point"], where)
            by_place[str(record.get("base", "")), record["eta"]] = record
    return [by_place[place] for place in sorted(by_place)]


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's record with the words that name the line in messages.

    Raises:
        RecordError: the file is missing or a line is no object.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if not line.endswith(b"\n"):
            return  # the writer was killed inside this line
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RecordError(f"{where} is not JSON ({error}); remove the line") from error
        if not isinstance(record, dict):
            raise RecordError(f"{where} holds {type(record).__name__}, expected an object")
        yield where, _with_best_divergences(record)


def _with_best_divergences(record: dict[str, Any]) -> dict[str, Any]:
    best = dict(record)
    for name in DIVERGENCES:
        if record.get(f"{name}_exact") is not None:
            best[name] = record[f"{name}_exact"]
            # The error goes with the estimate, also where it is missing: the sampled one's would be
            # too large.
            best[f"{name}_stderr"] = record.get(f"{name}_exact_stderr")
    return best


def _was_measured(record: dict[str, Any], required: tuple[str, ...], where: str) -> bool:
    """Whether the record holds a number: null says that no response had one, and is left out."""
    empty = [name for name in required if name in record and record[name] is None]
    if empty:
        print(f"warning: {where}: {', '.join(empty)} is null; left out", file=sys.stderr)
    return not empty


def _check_numbers(record: dict[str, Any], required: tuple[str, ...], where: str) -> None:
    """Refuse a missing required number, and anything but a finite number where one belongs."""
    for name in (*required, *OPTIONAL):
        value = record.get(name)
        if value is None and name not in required:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RecordError(f"{where}: '{name}' is {value!r}, expected a number")
        if not math.isfinite(value) or (name.endswith("_stderr") and value < 0):
            raise RecordError(f"{where}: '{name}' is {value}, which no measurement gives")
