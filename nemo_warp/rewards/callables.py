"""Any Python callable as a scorer of batches, and the fingerprint of what it computes."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import logging
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from nemo_warp.records import config_hash

log = logging.getLogger("nemo_warp.rewards")

Scorer = Callable[[str, str], float]


def load_callable(specification: str, options: dict[str, Any]) -> Scorer:
    """The callable ``module:function``, with ``options`` as further keyword arguments.

    Raises:
        ValueError: there is none, or it does not take a prompt, a response and the options.
    """
    module_name, _, name = specification.partition(":")
    if not module_name or not name:
        raise ValueError(f"--callable must be module:function, got {specification!r}")
    try:
        module = importlib.import_module(module_name)
    # Importing runs the module: whatever it raises, the callable cannot be had.
    except BaseException as error:
        raise ValueError(
            f"--callable {specification}: cannot import {module_name}: {_reason(error)}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--callable {specification}: {module_name} has no {name!r} to call")
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

    That is: its name, the source file of the module that defines it, the versions of that module's
    distribution and of those named in the callable's ``distributions``, and its options. Other
    modules it imports are not followed.

    Raises:
        ValueError: a distribution it names is not installed.
    """
    module_name, _, name = specification.partition(":")
    function = getattr(importlib.import_module(module_name), name)
    home = getattr(function, "__module__", None) or module_name
    source = getattr(sys.modules[home], "__file__", None)
    own = metadata.packages_distributions().get(home.partition(".")[0], [])
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
    # A stranger's code: whatever it raises is this sample's failure, asyncio's CancelledError and
    # sys.exit too, which are no Exceptions.
    except BaseException as error:
        reason = _reason(error)
        log.warning("a sample failed: %s", reason, exc_info=log.isEnabledFor(logging.DEBUG))
        return math.nan, reason


def _reason(error: BaseException) -> str:
    """The error in words that can be sent and logged, even if it cannot say them itself."""
    try:
        text = f"{type(error).__name__}: {error}"
        # Half a surrogate pair, taken from a text, is no character that a log could hold.
        return text.encode(errors="backslashreplace").decode()
    except BaseException:
        return f"{type(error).__name__} (which cannot be shown)"


def _checked(value: Any) -> tuple[float, str]:
    """The value in float32, or why it cannot be a reward."""
    with np.errstate(over="ignore"):
        number = float(np.float32(float(value)))
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
    except BaseException as error:  # find the sample it failed on
        log.warning("a batch of %d failed, scoring one by one: %s", len(prompts), _reason(error))
        return score_samples(lambda p, r: score([p], [r])[0], prompts, responses)
    return np.array([value for value, _ in outcomes], np.float32), [why for _, why in outcomes]
