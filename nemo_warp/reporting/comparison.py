"""Two policies by their responses, or runs by their fronts: what ``nemo-warp compare`` prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_warp.evidence.responses import DIRECTORY, Responses, read_responses
from nemo_warp.records import write_json_atomically, write_text_atomically
from nemo_warp.reporting import fronts, side_by_side
from nemo_warp.reporting.asked import endpoint_files, llm_judge, verdicts, with_scores


@dataclass(frozen=True)
class Judges:
    """By what two policies are compared.

    Attributes:
        names: of rewards and judges in the files, or endpoint files of servers that are asked now;
            none: all that both files have.
        tie: scores that differ by no more are equal, in the reward's units.
        llm: model -> options of language models that see both responses.
        concurrency: questions at a time to each of these.
    """

    names: Sequence[str] = ()
    tie: float = 0.0
    llm: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    concurrency: int = 16


def compare(words: Sequence[str], judges: Judges, output: Path | None) -> str:
    """Compare what ``words`` name: two points, or groups of runs.

    Args:
        words: as on the command line.
        judges: of two points; runs are compared by their rewards.
        output: directory for compare.md, compare.json and, for runs, fronts.png.

    Returns:
        The table, Markdown.

    Raises:
        ValueError: ``words`` name nothing that can be compared.
    """
    points = [_point(word) for word in words]
    chosen = [point for point in points if point is not None]
    if len(chosen) == len(points):
        if len(points) != 2:
            raise ValueError(f"{len(points)} points given, but two can be put side by side")
        text, values = _two_policies(chosen, judges)
    elif chosen:
        raise ValueError("points (files, RUN@KAPPA) and runs cannot be compared with each other")
    else:
        groups = [fronts.read_group(word) for word in words]
        if output:
            output.mkdir(parents=True, exist_ok=True)
            fronts.draw(groups, output / "fronts.png")
        text, values = fronts.compare(groups)
    if output:
        output.mkdir(parents=True, exist_ok=True)
        write_text_atomically(output / "compare.md", text + "\n")
        write_json_atomically(output / "compare.json", _without_nan(values))
    return text


def _without_nan(value: Any) -> Any:
    """Plain values for JSON, which has no NaN: an interval of one observation has no ends."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _two_policies(points: Sequence[Path], judges: Judges) -> tuple[str, dict]:
    # First of all, since options that cannot be used should not wait for files to be read.
    asked = [(model, llm_judge(model, options)) for model, options in judges.llm.items()]
    first, second = (read_responses(path) for path in points)
    files, names = endpoint_files(judges.names)
    for file in files:
        first, second = with_scores(first, file), with_scores(second, file)
        names.append(f"judge:{file.stem.removeprefix('endpoint_')}")
    found = [verdicts(first, second, *one, judges.concurrency) for one in asked]
    # Where only language models were asked for, no other judge is added.
    chosen = judges_of(first, second, names) if names or not found else []
    return side_by_side.compare(first, second, chosen, judges.tie, found)


def judges_of(first: Responses, second: Responses, wanted: Sequence[str] | None) -> list[str]:
    """Names of the numbers that policies are compared by.

    Raises:
        ValueError: a wanted judge is missing, or there is none in common.
    """
    common = [name for name in first.numbers if name in second.numbers]
    scored = [n for n in common if n == "reward" or n.startswith(("score:", "judge:"))]
    if not wanted:
        if not scored:
            raise ValueError(f"{first.source} and {second.source} have no reward in common")
        return scored
    chosen = []
    for name in wanted:
        found = [n for n in scored if n == name or n.partition(":")[2] == name]
        if not found:
            raise ValueError(f"no judge '{name}' in both; there are {', '.join(scored) or 'none'}")
        chosen += found
    return list(dict.fromkeys(chosen))


def _point(word: str) -> Path | None:
    """The file of responses that ``word`` names; None if it names runs."""
    if Path(word).is_file():
        return Path(word)
    place, at, value = word.rpartition("@")
    if not at:
        return None
    try:
        wanted = float(value)
    except ValueError:
        return None
    run = Path(place)
    # A run keeps its final front in front/, and what a search for a KL measured in pick/.
    folders = [place / DIRECTORY for place in (run, run / "front", run / "pick")]
    found: dict[float, Path] = {}
    for path in (p for folder in folders for p in sorted(folder.glob("*_*.jsonl.gz"))):
        # Anchors are measured at the same steps as their policies, whose number was asked for.
        if not path.name.startswith("anchor_"):
            found.setdefault(float(path.name.removesuffix(".jsonl.gz").rpartition("_")[2]), path)
    if not found:
        raise ValueError(
            f"no responses below {run}: it has not been evaluated, or by a version that kept none"
        )
    if wanted not in found:
        known = ", ".join(f"{eta:g}" for eta in sorted(found))
        raise ValueError(f"no responses at {value} below {run}; there are {known}")
    return found[wanted]
