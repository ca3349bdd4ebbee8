r"""Compare two policies by their responses, or runs by their fronts.

Two points (a file of responses, or RUN@KAPPA, or STAGE@ETA):

  nemo-warp compare runs/warp@1 runs/sft_anchor@1        the same prompts, every judge both have
  nemo-warp compare a.jsonl.gz b.jsonl.gz --tie 0.05     files of responses, wherever they came from
  nemo-warp compare A B --judge run/endpoint_help.json   by a reward server that runs
  nemo-warp compare A B --llm-judge Qwen/Qwen2.5-72B-Instruct \
      --llm-options '{"url": "http://judge:8000/v1", "cache": "judged"}'

A language model (any OpenAI-compatible endpoint; the key is in OPENAI_API_KEY) sees both responses,
in both orders; its verdicts count as in the paper's section 4.5. Verdicts that it does not give are
counted and are in no number.

Runs (any number; runs of one group differ in their seed and are named together with commas):

  nemo-warp compare warp=runs/w1,runs/w2,runs/w3 sft=runs/s1,runs/s2,runs/s3 --output report

Differences come with 95 % intervals: bootstrap over prompts, paired, for two policies; Student's t
over seeds for groups of runs. --output writes compare.md, compare.json and, for runs, fronts.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_warp import exit_codes
from nemo_warp.records import json_object


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``nemo-warp compare``."""
    parser.add_argument("what", nargs="+", metavar="A", help="two points, or runs")
    parser.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="NAME",
        help="only this reward or judge, or a running server's endpoint file (repeatable) [all "
        "both have]",
    )
    parser.add_argument(
        "--llm-judge",
        action="append",
        default=[],
        metavar="MODEL",
        help="a language model that sees both responses (repeatable)",
    )
    parser.add_argument(
        "--llm-options",
        default="{}",
        metavar="JSON",
        help="of these: url, cache, template, temperature, max_tokens, timeout_s, retries, ...",
    )
    parser.add_argument(
        "--concurrency", type=int, default=16, metavar="N", help="questions at a time [16]"
    )
    parser.add_argument(
        "--tie", type=float, default=0.0, metavar="D", help="scores at most D apart tie [0]"
    )
    parser.add_argument("--output", type=Path, help="directory for the table, JSON and picture")


def main(args: argparse.Namespace) -> int:
    """Print the comparison; an exit code of `nemo_warp.exit_codes`."""
    # here, because numpy, scipy and matplotlib take seconds that --help need not wait for
    from nemo_warp.reporting.comparison import Judges, compare

    if args.tie < 0:
        raise ValueError(f"--tie is {args.tie:g}, expected 0 or more")
    if args.concurrency < 1:
        raise ValueError(f"--concurrency is {args.concurrency}, expected 1 or more")
    options = json_object(args.llm_options, "--llm-options")
    llm = dict.fromkeys(args.llm_judge, options)
    judges = Judges(args.judge, args.tie, llm, args.concurrency)
    print(compare(args.what, judges, args.output))
    return exit_codes.DONE
