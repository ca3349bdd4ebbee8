"""Rewards that misbehave on command: the response says how. For fault injection only."""

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path

if delay := os.environ.get("STRANGE_IMPORT_S"):
    time.sleep(float(delay))


def strange(prompt: str, response: str, scale: float = 1.0) -> float:
    """Length of the response times 10, plus that of the prompt; or what the response asks for."""
    match response.split():
        case ["raise"]:
            raise RuntimeError("asked to raise")
        case ["nan"]:
            return float("nan")
        case ["huge"]:
            return 1e39
        case ["text"]:
            return "good"
        case ["sleep", seconds]:
            Path(f"{os.environ['STRANGE_MARK']}").touch()
            time.sleep(float(seconds))
    return scale * (10 * len(response) + len(prompt))


def strange_batch(prompts: list[str], responses: list[str]) -> list[float]:
    """As `strange`, for whole batches; an exception for one is an exception for all."""
    return [strange(*sample) for sample in zip(prompts, responses, strict=True)]


def picky(prompt: str, response: str) -> float:
    """Length of the response; it refuses those whose length is a multiple of 3."""
    if len(response) % 3 == 0:
        raise ValueError(f"{len(response)} characters")
    return float(len(response))


def wrong_count(prompts: list[str], responses: list[str]) -> list[float]:
    """Always one score."""
    return [1.0]


CALLS = Path(os.environ.get("STRANGE_MARK", "/nonexistent")).with_suffix(".calls")


def slow(prompt: str, response: str, seconds: float = 0.05) -> float:
    """Length of the response, after a while; each call leaves a byte in a file."""
    with CALLS.open("ab") as stream:
        stream.write(b".")
    time.sleep(seconds)
    return float(len(response))


async def slow_async(prompt: str, response: str, seconds: float = 0.05) -> float:
    """As `slow`, as a coroutine."""
    await asyncio.sleep(seconds)
    return float(len(response))


def checked(prompt: str, response: str, answer: str, points: float = 1.0, **more: object) -> float:
    """Points for the right answer, and one for each further field."""
    return points * (response == answer) + len(more)


def mirrored(prompt: str, response: str, answer: str) -> float:
    """1 if the answer is the prompt's own: the prompt, backwards."""
    if answer != prompt[::-1]:
        raise ValueError(f"{answer!r} does not belong to {prompt!r}")
    return 1.0


def checked_batch(
    prompts: list[str], responses: list[str], answer: list[str], points: Sequence[float] = ()
) -> list[float]:
    """As `checked`, for lists."""
    given = points or [1.0] * len(answer)
    return [(p or 1.0) * (r == a) for r, a, p in zip(responses, answer, given, strict=True)]
