"""Any Python callable as a scorer of batches, and the fingerprint of what it computes."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import importlib
import inspect
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from nemo_warp.records import config_hash
from nemo_warp.rewards.fields import FieldsTaken, MissingFieldError

log = logging.getLogger("nemo_warp.rewards")

Scorer = Callable[..., Any]
"""``(prompt, response, **fields)`` to a number, or a coroutine function of the same."""
Outcome = tuple[float, str]
"""A score and "", or NaN and why there is none."""


def load_callable(specification: str, options: dict[str, Any]) -> Scorer:
    """The callable ``module:function``, with ``options`` as further keyword arguments.

    A class is made once, with the options; what it makes is then called. What else a callable
    takes by name are fields of the prompt (`nemo_warp.rewards.fields`).

    Raises:
        ValueError: there is none, or it does not take a prompt, a response and the options.
    """
    found = _find(specification)
    try:
        if inspect.isclass(found):
            # Bound before it is called: a TypeError of its own making, deep inside, would look the
            # same.
            inspect.signature(found).bind(**options)
            score = _made(specification, found, options)
            # bind_partial: further parameters are fields, which come with each prompt.
            inspect.signature(score).bind_partial("prompt", "response")
            return score
        inspect.signature(found).bind_partial("prompt", "response", **options)
    except TypeError as error:
        raise ValueError(
            f"--callable {specification} cannot be called with a prompt, a response and the "
            f"options {sorted(options)}: {error}"
        ) from None
    # Without options the callable itself: a partial would hide attributes such as `distributions`.
    return partial(found, **options) if options else found


def _find(specification: str) -> Any:
    module_name, _, name = specification.partition(":")
    if not module_name or not name:
        raise ValueError(f"--callable must be module:function, got {specification!r}")
    try:
        module = importlib.import_module(module_name)
    # Importing runs the module: whatever it raises, the callable cannot be had.
    except BaseException as error:
        raise ValueError(
            f"--callable {specification}: cannot import {module_name}: {reason_of(error)}"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"--callable {specification}: {module_name} has no {name!r} to call")
    return found


def _made(specification: str, kind: type, options: dict[str, Any]) -> Scorer:
    try:
        score = kind(**options)
    except BaseException as error:  # a stranger's code, as at import
        told = str(error) if isinstance(error, ValueError) else reason_of(error)
        raise ValueError(f"--callable {specification}: {told}") from error
    if not callable(score):
        raise ValueError(f"--callable {specification} makes a {kind.__name__}, which has no call")
    return score


def fingerprint(specification: str, options: dict[str, Any], score: Scorer | None = None) -> str:
    """SHA-256 of what decides the callable's scores.

    That is: its name, the source file of the module that defines it, the versions of that module's
    distribution and of those named in the callable's ``distributions``, its options, and what the
    loaded ``score`` itself gives as its ``identity`` (a model's contents, say). Options named in
    the callable's ``undeciding`` are left out (addresses, time-outs). Other modules it imports are
    not followed.

    Raises:
        ValueError: a distribution it names is not installed.
    """
    module_name, _, name = specification.partition(":")
    function = getattr(importlib.import_module(module_name), name)
    home = getattr(function, "__module__", None) or module_name
    source = getattr(sys.modules[home], "__file__", None)
    # By distribution: an import name says nothing of versions (yaml is PyYAML).
    own = metadata.packages_distributions().get(home.partition(".")[0], [])
    undeciding = getattr(function, "undeciding", ())
    identity = getattr(score, "identity", None)
    return config_hash(
        {
            "callable": specification,
            "source": hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else None,
            "versions": _versions({*own, *getattr(function, "distributions", ())}),
            "options": {key: value for key, value in options.items() if key not in undeciding},
            # Only where there is one: a key more would make every other reward another.
            **({"identity": identity} if identity is not None else {}),
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
    score: Scorer,
    prompts: Sequence[str],
    responses: Sequence[str],
    fields: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[np.ndarray, list[str]]:
    """Scores float32 [B], NaN where the callable failed, and the reasons ("" where it did not)."""
    taken = FieldsTaken.by(score)
    call = _run_to_end(score) if is_async(score) else score
    given = fields or [{}] * len(responses)
    samples = zip(prompts, responses, given, strict=True)
    return _arrays([score_one(call, taken, *sample) for sample in samples])


def score_together(
    score: Callable[..., Sequence[float]],
    prompts: Sequence[str],
    responses: Sequence[str],
    fields: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[np.ndarray, list[str]]:
    """As `score_samples`, for a callable that takes lists of texts and of each field."""
    taken = FieldsTaken.by(score)
    given = fields or [{}] * len(responses)
    return _arrays(outcomes_together(score, taken, prompts, responses, given))


def outcomes_together(
    score: Callable[..., Sequence[float]],
    taken: FieldsTaken,
    prompts: Sequence[str],
    responses: Sequence[str],
    fields: Sequence[Mapping[str, Any]],
) -> list[Outcome]:
    """One call for all samples that have their fields; one for each if that call fails."""
    outcomes: list[Outcome] = [_lacking(taken, one) for one in fields]
    good = [place for place, (_, why) in enumerate(outcomes) if not why]
    if not good:
        return outcomes

    def call(places: list[int]) -> Sequence[float]:
        texts = [prompts[i] for i in places], [responses[i] for i in places]
        values = score(*texts, **taken.of_many([fields[i] for i in places]))
        if len(values) != len(places):
            raise ValueError(f"the reward returned {len(values)} scores for {len(places)} samples")
        return values

    def alone(place: int) -> float:
        return call([place])[0]

    try:
        found = [_checked(value) for value in call(good)]
    except BaseException as error:  # find the sample it failed on
        log.warning("a batch of %d failed, scoring one by one: %s", len(good), reason_of(error))
        found = [_attempt(partial(alone, place)) for place in good]
    for place, outcome in zip(good, found, strict=True):
        outcomes[place] = outcome
    return outcomes


def score_one(
    score: Scorer, taken: FieldsTaken, prompt: str, response: str, fields: Mapping[str, Any]
) -> Outcome:
    """One sample, whatever the callable does."""
    return _attempt(lambda: score(prompt, response, **taken.of_one(fields)))


async def score_one_async(
    score: Scorer, taken: FieldsTaken, prompt: str, response: str, fields: Mapping[str, Any]
) -> Outcome:
    """As `score_one`, of a coroutine function."""
    try:
        return _checked(await score(prompt, response, **taken.of_one(fields)))
    except BaseException as error:
        return _failed(error)


def is_async(score: Scorer) -> bool:
    """Whether it is a coroutine function, or an object that is called as one."""
    # An object's own __call__ may be the coroutine function, which the object itself is not.
    return any(map(inspect.iscoroutinefunction, (score, type(score).__call__)))


def _run_to_end(score: Scorer) -> Scorer:
    @functools.wraps(score, updated=())
    def call(*texts: str, **fields: Any) -> Any:
        return asyncio.run(score(*texts, **fields))

    return call


def _attempt(call: Callable[[], Any]) -> Outcome:
    try:
        return _checked(call())
    # A stranger's code: whatever it raises is this sample's failure, asyncio's CancelledError and
    # sys.exit too, which are no Exceptions.
    except BaseException as error:
        return _failed(error)


def _failed(error: BaseException) -> Outcome:
    reason = str(error) if isinstance(error, MissingFieldError) else reason_of(error)
    log.warning("a sample failed: %s", reason, exc_info=log.isEnabledFor(logging.DEBUG))
    return math.nan, reason


def _lacking(taken: FieldsTaken, fields: Mapping[str, Any]) -> Outcome:
    try:
        taken.check(fields)
    except MissingFieldError as error:
        return math.nan, str(error)
    return math.nan, ""


def reason_of(error: BaseException) -> str:
    """The error in words that can be sent and logged, even if it cannot say them itself."""
    try:
        text = f"{type(error).__name__}: {error}"
        # Half a surrogate pair, taken from a text, is no character that a log could hold.
        return text.encode(errors="backslashreplace").decode()
    except BaseException:
        return f"{type(error).__name__} (which cannot be shown)"


def _checked(value: Any) -> Outcome:
    """The value in float32, or why it cannot be a reward; an exception among scores says why."""
    if isinstance(value, BaseException):
        return math.nan, str(value) or type(value).__name__
    # Rewards travel as float32 (NeMo-Aligner's protocol): 1e39 becomes infinite, and so a failure.
    with np.errstate(over="ignore"):
        number = float(np.float32(float(value)))
    return (number, "") if math.isfinite(number) else (math.nan, f"the reward returned {value}")


def _arrays(outcomes: Sequence[Outcome]) -> tuple[np.ndarray, list[str]]:
    return np.array([value for value, _ in outcomes], np.float32), [why for _, why in outcomes]
