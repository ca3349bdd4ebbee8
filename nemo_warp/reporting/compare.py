"""Compare two policies by their responses, or runs by their fronts.

Two points (a file of responses, or RUN@KAPPA, or STAGE@ETA):

  nemo-warp compare runs/warp@1 runs/sft_anchor@1        the same prompts, every judge both have
  nemo-warp compare a.jsonl.gz b.jsonl.gz --tie 0.05     files of responses, wherever they came from

Runs (any number; runs of one group differ in their seed and are named together with commas):

  nemo-warp compare warp=runs/w1,runs/w2,runs/w3 sft=runs/s1,runs/s2,runs/s3 --output report

Differences come with 95 % intervals: bootstrap over prompts, paired, for two policies; Student's t
over seeds for groups of runs. --output writes compare.md, compare.json and, for runs, fronts.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from nemo_warp import exit_codes
from nemo_warp.evidence.responses import Responses, read_responses
from nemo_warp.records import write_json_atomically, write_text_atomically
from nemo_warp.reporting import fronts, side_by_side

RESPONSES_DIRECTORY = "responses"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``nemo-warp compare``."""
    parser.add_argument("what", nargs="+", metavar="A", help="two points, or runs")
    parser.add_argument(
        "--judge", action="append", help="only this reward or judge (repeatable) [all both have]"
    )
    parser.add_argument(
        "--tie", type=float, default=0.0, metavar="D", help="scores at most D apart tie [0]"
    )
    parser.add_argument("--output", type=Path, help="directory for the table, JSON and picture")


def main(args: argparse.Namespace) -> int:
    """Print the comparison; an exit code of `nemo_warp.exit_codes`."""
    if args.tie < 0:
        raise ValueError(f"--tie is {args.tie:g}, expected 0 or more")
    points = [_point(word) for word in args.what]
    if all(points):
        if len(points) != 2:
            raise ValueError(f"{len(points)} points given, but two can be put side by side")
        text, values = _two_policies(points, args)
    elif any(points):
        raise ValueError("points (files, RUN@KAPPA) and runs cannot be compared with each other")
    else:
        groups = [fronts.read_group(word) for word in args.what]
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            fronts.draw(groups, args.output / "fronts.png")
        text, values = fronts.compare(groups)
    print(text)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        write_text_atomically(args.output / "compare.md", text + "\n")
        write_json_atomically(args.output / "compare.json", json.loads(json.dumps(values)))
    return exit_codes.DONE


def _two_policies(points: Sequence[Path], args: argparse.Namespace) -> tuple[str, dict]:
    first, second = (read_responses(path) for path in points)
    return side_by_side.compare(first, second, judges_of(first, second, args.judge), args.tie)


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
    folders = [
        f for f in (run / RESPONSES_DIRECTORY, run / "front" / RESPONSES_DIRECTORY) if f.is_dir()
    ]
    if not folders:
        raise ValueError(
            f"no responses below {run}; was it evaluated with evaluation.keep_responses?"
        )
    found = {
        float(p.name.removesuffix(".jsonl.gz").rpartition("_")[2]): p
        for p in sorted(folders[0].glob("*_*.jsonl.gz"), reverse=True)
    }
    if wanted not in found:
        known = ", ".join(f"{eta:g}" for eta in sorted(found))
        raise ValueError(f"no responses at {value} in {folders[0]}; there are {known}")
    return found[wanted]
