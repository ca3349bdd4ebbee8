"""Serve a Python callable as a reward: ``python -m nemo_warp.rewards.serve --help``."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from nemo_warp import exit_codes
from nemo_warp.records import config_hash
from nemo_warp.rewards.errors import RewardError
from nemo_warp.rewards.triton import Infer, Serving, answer, log, serve

Scorer = Callable[[str, str], float]

EPILOG = """
The callable takes (prompt, response), two strings, and returns a number. If it raises, or returns
something that is not a finite number, that one sample comes back as NaN with the reason, and the
rest of its batch is scored. With --batch it takes two lists and returns as many numbers: one call
per request, and one per sample if that call raises.

examples:
  python -m nemo_warp.rewards.serve --callable nemo_warp.rewards.library:vader_compound \\
      --run-id tiny-1-member_01 --endpoint-file run/endpoint_vader.json
  python -m nemo_warp.rewards.serve --callable my_rewards:judge --batch \\
      --options '{"url": "http://judge:8000"}' --host 0.0.0.0 \\
      --run-id tiny-1-member_01 --endpoint-file run/endpoint_judge.json

The endpoint file appears when the server is ready and goes when it stops (SIGTERM or Ctrl-C).
"""


def load_callable(specification: str, options: dict[str, Any]) -> Scorer:
    """The callable ``module:function``, with ``options`` as further keyword arguments.

    Raises:
        ValueError: there is none, or it does not take a prompt, a response and the options.
    """
    module_name, _, name = specification.partition(":")
    if not module_name or not name:
        raise ValueError(f"--callable must be module:function, got {specification!r}")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except ImportError as error:
        raise ValueError(
            f"--callable {specification}: cannot import {module_name}: {error}"
        ) from error
    except AttributeError:
        raise ValueError(f"--callable {specification}: {module_name} has no {name!r}") from None
    try:
        inspect.signature(function).bind("prompt", "response", **options)
    except TypeError as error:
        raise ValueError(
            f"--callable {specification} cannot be called with a prompt, a response and the "
            f"options {sorted(options)}: {error}"
        ) from None
    return partial(function, **options) if options else function


def fingerprint(specification: str, options: dict[str, Any]) -> str:
    """SHA-256 of what decides the callable's scores.

    That is: its name, the source file of its module, the versions of the distribution the module
    came with and of those named in the callable's ``distributions``, and its options. Other
    modules it imports are not followed.

    Raises:
        ValueError: a distribution it names is not installed.
    """
    module_name, _, name = specification.partition(":")
    function = getattr(importlib.import_module(module_name), name)
    source = inspect.getsourcefile(inspect.getmodule(function) or function)
    own = metadata.packages_distributions().get(module_name.partition(".")[0], [])
    return config_hash(
        {
            "callable": specification,
            "source": hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else None,
            "versions": _versions({*own, *getattr(function, "distributions", ())}),
            "options": options,
        }
    )


def _versions(distributions: set[str]) -> dict[str, str]:
    try:
        return {name: metadata.version(name) for name in sorted(distributions)}
    except metadata.PackageNotFoundError as error:
        raise ValueError(
            f"the reward needs the package {error.name}: pip install {error.name}"
        ) from None


def score_samples(
    score: Scorer, prompts: Sequence[str], responses: Sequence[str]
) -> tuple[np.ndarray, list[str]]:
    """Scores float32 [B], NaN where the callable failed, and the reasons ("" where it did not)."""
    outcomes = [_score_one(score, *sample) for sample in zip(prompts, responses, strict=True)]
    return np.array([value for value, _ in outcomes], np.float32), [why for _, why in outcomes]


def _score_one(score: Scorer, prompt: str, response: str) -> tuple[float, str]:
    try:
        return _checked(score(prompt, response))
    except Exception as error:  # a stranger's code: whatever it raises is this sample's failure
        log.warning("a sample failed: %r", error, exc_info=log.isEnabledFor(logging.DEBUG))
        return math.nan, f"{type(error).__name__}: {error}"


def _checked(value: Any) -> tuple[float, str]:
    number = float(np.float32(value))
    return (number, "") if math.isfinite(number) else (math.nan, f"the reward returned {value}")


def score_together(
    score: Callable[[list[str], list[str]], Sequence[float]],
    prompts: Sequence[str],
    responses: Sequence[str],
) -> tuple[np.ndarray, list[str]]:
    """As `score_samples`, for a callable that takes whole batches."""
    try:
        values = score(list(prompts), list(responses))
        if len(values) != len(prompts):
            raise ValueError(f"the reward returned {len(values)} scores for {len(prompts)} samples")
        outcomes = [_checked(value) for value in values]
    except Exception as error:  # find the sample it failed on
        log.warning("a batch of %d failed, scoring one by one: %r", len(prompts), error)
        return score_samples(lambda p, r: score([p], [r])[0], prompts, responses)
    return np.array([value for value, _ in outcomes], np.float32), [why for _, why in outcomes]


def text_infer(score_batch: Callable[..., tuple[np.ndarray, list[str]]]) -> Infer:
    """The protocol's inputs to (prompts, responses), and its outputs back."""

    def infer(sentences: np.ndarray, prompt_lengths: np.ndarray | None = None) -> dict:
        texts = [text.decode() for text in sentences[:, 0]]
        cuts = [0] * len(texts) if prompt_lengths is None else prompt_lengths[:, 0].tolist()
        prompts = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
        responses = [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
        return answer(*score_batch(prompts, responses))

    return infer


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
    parser.add_argument("--batch", action="store_true", help="it takes two lists at a time")
    parser.add_argument("--options", default="{}", metavar="JSON", help="its keyword arguments")
    add_serving_arguments(parser)
    return parser.parse_args(argv)


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--options is not JSON ({error}): {text!r}") from None
    if not isinstance(options, dict):
        raise ValueError(f"--options must be a JSON object, got {text!r}")
    return options


def run(arguments: argparse.Namespace) -> None:
    """Load, fingerprint and serve the callable until told to stop."""
    options = _options(arguments.options)
    score = load_callable(arguments.callable, options)
    serving = Serving(
        run_id=arguments.run_id,
        fingerprint=fingerprint(arguments.callable, {**options, "batch": arguments.batch}),
        endpoint_file=arguments.endpoint_file,
        host=arguments.host,
        port=arguments.port,
    )
    log.info("serving %s (%s)", arguments.callable, serving.fingerprint)
    serve(text_infer(partial(score_together if arguments.batch else score_samples, score)), serving)


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
