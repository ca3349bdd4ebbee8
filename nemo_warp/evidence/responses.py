"""Responses on disk: what every point of an evaluation wrote, one JSON object a line, gzipped.

    responses/init_0.3.jsonl.gz
    {"prompt": "...", "prompt_index": 0, "generation": 0, "response": "...", "reward": 0.4,
     "scores": {"vader": 0.4}, "judges": {"polarity": 0.1}, "tokens": 21, "log_ratio": 3.2,
     "ended": true}

``reward`` is the weighted sum that members train on, null where a reward failed; ``log_ratio`` is
log pi(y|x) - log pi_sft(y|x), summed over the response (nats). A score that failed is
null in the file and NaN in the arrays, never a number.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_warp.records import RecordError, write_bytes_atomically

DIRECTORY = "responses"
REQUIRED = ("prompt", "prompt_index", "generation", "response")


@dataclass(frozen=True)
class Responses:
    """G generations of each of P prompts.

    Attributes:
        source: the file, for messages.
        prompts: [P] texts.
        texts: [P][G] responses.
        numbers: name -> float64 [P, G], NaN where missing: ``reward``, ``tokens``, ``characters``,
            ``log_ratio``, ``score:NAME`` and ``judge:NAME``.
    """

    source: str
    prompts: list[str]
    texts: list[list[str]]
    numbers: dict[str, np.ndarray]

    def number(self, name: str) -> np.ndarray:
        """One of `numbers`.

        Raises:
            ValueError: the file does not hold it.
        """
        if name not in self.numbers:
            known = ", ".join(sorted(self.numbers))
            raise ValueError(f"{self.source} has no '{name}'; it has {known}")
        return self.numbers[name]


def responses_file(stage: Path, base: str, position: float) -> Path:
    """Where a stage keeps the responses of a point: ``responses/init_0.3.jsonl.gz``.

    Args:
        base: ``init`` or ``sft`` (a front's), ``step`` (a member's), ``anchor``.
        position: eta, kappa, or the step.
    """
    return stage / DIRECTORY / f"{base}_{position:.8g}.jsonl.gz"


def write_responses(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write the records durably and whole; the same records give the same bytes."""
    lines = (json.dumps(record, sort_keys=True, ensure_ascii=False) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    # mtime 0: gzip stores the time of writing otherwise.
    write_bytes_atomically(path, gzip.compress("".join(lines).encode(), mtime=0))


def read_responses(path: Path) -> Responses:
    """Read and check a file; prompts in order of their index, generations in theirs.

    Raises:
        RecordError: the file cannot be read, a line is no response, or a prompt lacks generations
            that others have.
    """
    by_place: dict[tuple[int, int], dict[str, Any]] = {}
    for number, record in enumerate(_records(path), start=1):
        missing = [key for key in REQUIRED if key not in record]
        if missing:
            raise RecordError(f"{path}, line {number} has no '{missing[0]}': not a response")
        # By place: lines may come in the order in which ranks wrote them, and a repeated one
        # replaces.
        by_place[int(record["prompt_index"]), int(record["generation"])] = record
    indices = sorted({index for index, _ in by_place})
    generations = sorted({generation for _, generation in by_place})
    if not by_place or len(by_place) != len(indices) * len(generations):
        raise RecordError(
            f"{path} holds {len(by_place)} responses, expected {len(generations)} for each of "
            f"{len(indices)} prompts; evaluate that point again"
        )
    rows = [[by_place[index, g] for g in generations] for index in indices]
    return Responses(
        str(path),
        [row[0]["prompt"] for row in rows],
        [[record["response"] for record in row] for row in rows],
        _numbers(rows),
    )


def common_prompts(first: Responses, second: Responses) -> tuple[np.ndarray, np.ndarray]:
    """Rows of both that belong to the same prompts, in the first one's order.

    Raises:
        ValueError: they have no prompt in common, or a prompt occurs twice.
    """
    places = {}
    for responses in (first, second):
        if len(set(responses.prompts)) != len(responses.prompts):
            raise ValueError(f"{responses.source} has a prompt twice: prompts cannot be paired")
    places = {prompt: row for row, prompt in enumerate(second.prompts)}
    rows = [(row, places[p]) for row, p in enumerate(first.prompts) if p in places]
    if not rows:
        raise ValueError(f"{first.source} and {second.source} have no prompt in common")
    ours, theirs = zip(*rows, strict=True)
    return np.array(ours), np.array(theirs)


def _records(path: Path) -> Iterable[dict[str, Any]]:
    try:
        data = path.read_bytes()
        # Recognised by its first bytes and not by the name: people unpack and rename such files.
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
        records = [json.loads(line) for line in text.split("\n") if line]
    except FileNotFoundError:
        raise RecordError(f"no responses at {path}; evaluate with responses kept") from None
    except (OSError, EOFError, ValueError) as error:
        raise RecordError(f"cannot read responses from {path}: {error}") from error
    for record in records:
        if not isinstance(record, dict):
            raise RecordError(f"{path} holds {type(record).__name__}, expected objects")
    return records


def _numbers(rows: list[list[dict[str, Any]]]) -> dict[str, np.ndarray]:
    found: dict[str, list[list[float]]] = {}
    names = dict.fromkeys(name for row in rows for record in row for name in _named(record))
    for name in names:
        found[name] = [[_named(record).get(name, np.nan) for record in row] for row in rows]
    return {name: np.array(values, dtype=np.float64) for name, values in found.items()}


def _named(record: Mapping[str, Any]) -> dict[str, float]:
    named = {key: record.get(key) for key in ("reward", "tokens", "log_ratio", "ended")}
    named["characters"] = len(record["response"])
    named |= {f"score:{name}": value for name, value in (record.get("scores") or {}).items()}
    named |= {f"judge:{name}": value for name, value in (record.get("judges") or {}).items()}
    return {key: np.nan if value is None else float(value) for key, value in named.items()}
