"""Serve a Python callable as a reward: ``python -m nemo_warp.rewards.serve --help``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from nemo_warp import exit_codes
from nemo_warp.records import json_object
from nemo_warp.rewards.callables import fingerprint, load_callable
from nemo_warp.rewards.errors import RewardError
from nemo_warp.rewards.scoring import Desk, Sample, Scoring
from nemo_warp.rewards.triton import Infer, Serving, answer, log, serve

EPILOG = """
The callable takes (prompt, response), two strings, and returns a number. If it raises, or returns
something that is not a finite number, that one sample comes back as NaN with the reason, and the
rest of its batch is scored. What else it takes by name are fields of the prompt's line (answer,
tests, ...). A coroutine function is awaited; a class is made once, with the options, and what it
makes is called. With --batch the callable takes lists of texts (and of fields) and returns as many
numbers: one call for up to --batch-size texts, and one per sample if that call raises.

examples:
  python -m nemo_warp.rewards.serve --callable nemo_warp.rewards.library:vader_compound \\
      --run-id tiny-1-member_01 --endpoint-file run/endpoint_vader.json
  python -m nemo_warp.rewards.serve --callable my_rewards:judge --concurrency 32 \\
      --options '{"url": "http://judge:8000"}' --host 0.0.0.0 \\
      --run-id tiny-1-member_01 --endpoint-file run/endpoint_judge.json

The endpoint file appears when the server is ready and goes when it stops (SIGTERM or Ctrl-C).
"""


def text_infer(desk: Desk) -> Infer:
    """The protocol's inputs to samples, and what the desk says of them to its outputs."""

    def infer(
        sentences: np.ndarray,
        prompt_lengths: np.ndarray | None = None,
        fields: np.ndarray | None = None,
        keys: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        samples = _samples(sentences, prompt_lengths, fields)
        if keys is None:
            outcomes, stalled = desk.score(samples), None
        else:
            states = desk.ask(keys[:, 0].tolist(), samples)
            outcomes = [outcome for outcome, _ in states]
            stalled = np.array([seconds for _, seconds in states])
        scores = np.array([score for score, _ in outcomes], np.float32)
        return answer(scores, [reason for _, reason in outcomes], stalled)

    return infer


def _samples(
    sentences: np.ndarray, prompt_lengths: np.ndarray | None, fields: np.ndarray | None
) -> list[Sample]:
    texts = [text.decode() for text in sentences[:, 0]]
    cuts = [0] * len(texts) if prompt_lengths is None else prompt_lengths[:, 0].tolist()
    more = (
        [{}] * len(texts)
        if fields is None
        else [json.loads(one) if one != b"{}" else {} for one in fields[:, 0]]
    )
    return [
        # Characters, not bytes: the cut lies between two characters in any script. NeMo-Aligner's
        # own client sends no cut: the whole text is then the response.
        Sample(text[:cut], text[cut:], one)
        for text, cut, one in zip(texts, cuts, more, strict=True)
    ]


def add_serving_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments every reward server has."""
    parser.add_argument("--run-id", required=True, help="the run this server belongs to")
    parser.add_argument("--endpoint-file", required=True, type=Path, help="written once ready")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s; 0.0.0.0 if the trainer runs elsewhere)",
    )
    parser.add_argument("--port", type=int, default=0, help="default: a free one")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nemo_warp.rewards.serve",
        description="Serve a Python callable as a reward, with NeMo-Aligner's protocol.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--callable", required=True, metavar="MODULE:FUNCTION")
    parser.add_argument("--batch", action="store_true", help="it takes lists of texts")
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="longest list [%(default)s]"
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        default=1,
        metavar="N",
        help="calls at a time; above 1 it must be safe to call from several threads [%(default)s]",
    )
    parser.add_argument("--options", default="{}", metavar="JSON", help="its keyword arguments")
    add_serving_arguments(parser)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Load, fingerprint and serve the callable until told to stop."""
    options = json_object(arguments.options, "--options")
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    score = load_callable(arguments.callable, options)
    lists = arguments.batch or getattr(score, "takes_lists", False)
    together = arguments.batch_size if lists else 0
    scoring = Scoring(score, arguments.concurrency, together)
    desk = Desk(scoring)
    serving = Serving(
        run_id=arguments.run_id,
        fingerprint=fingerprint(arguments.callable, {**options, "batch": arguments.batch}, score),
        endpoint_file=arguments.endpoint_file,
        host=arguments.host,
        port=arguments.port,
        keyed=True,
        needs=scoring.taken.needed,
        takes=scoring.taken.names,
    )
    log.info("serving %s (%s)", arguments.callable, serving.fingerprint)
    serve(text_infer(desk), serving, on_stop=desk.stop)


def exit_code_of(main: Callable[[], None]) -> int:
    """Run ``main``; say in one sentence what was wrong, and turn it into an exit code."""
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.MISCONFIGURED
    except RewardError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.FAILED
    return exit_codes.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = _arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s reward: %(message)s")
    return exit_code_of(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
