"""Attempts at a stage: one directory each, with logs, what ran, and how it ended.

    attempts/001/{attempt.json, log.txt, <step>.log, endpoint_<reward>.json, exit.json}

Progress is the newest training checkpoint, or the points measured. An attempt that
begins at the same step as the one before it means that the latter made no progress. After too many
of those, or after an exit code of `FOR_GOOD`, the stage has failed until ``resume`` is given (which
marks the last attempt as forgiven).
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_warp import exit_codes
from nemo_warp.pipeline.recipe.paths import StagePaths
from nemo_warp.records import write_json_atomically

FOR_GOOD = (exit_codes.MISCONFIGURED, exit_codes.KL_LIMIT)
"""Exit codes another attempt cannot change."""

_TAIL_BYTES = 65536
_LATE_SERVER = re.compile(r"endpoint_([^/]+)\.json missing")
_CHECKPOINT = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class Attempt:
    """One attempt.

    Attributes:
        record: what was started (``attempt.json``); empty if it died before writing it.
        exit: how it ended (``exit.json``); None while it runs or when it was killed.
        forgiven: whether `forgive` was called on it.
    """

    directory: Path
    record: dict[str, Any]
    exit: dict[str, Any] | None
    forgiven: bool

    @property
    def number(self) -> int:
        """1, 2, ..."""
        return int(self.directory.name)

    @property
    def counts(self) -> bool:
        """Whether it counts against the cap: not if somebody asked it to stop."""
        return not (self.exit or {}).get("asked", False)


def list_attempts(paths: StagePaths) -> list[Attempt]:
    """All attempts, oldest first."""
    if not paths.attempts.is_dir():
        return []
    directories = sorted(
        # By number, not by name: attempt 1000 comes after 999.
        (d for d in paths.attempts.iterdir() if d.name.isdigit()),
        key=lambda d: int(d.name),
    )
    return [
        Attempt(
            directory,
            _read(directory / "attempt.json") or {},
            _read(directory / "exit.json"),
            (directory / "forgiven").exists(),
        )
        for directory in directories
    ]


def begin(paths: StagePaths, record: dict[str, Any]) -> Attempt:
    """Make the next attempt's directory and say in it what is being started."""
    # mkdir without exist_ok is the guard against two processes that count alike; only the holder of
    # the stage's lock comes here.
    number = max((a.number for a in list_attempts(paths)), default=0) + 1
    directory = paths.attempts / f"{number:03d}"
    directory.mkdir(parents=True)
    record = {"started": time.time(), "step": progress(paths), **record}
    write_json_atomically(directory / "attempt.json", record)
    return Attempt(directory, record, None, False)


def end(attempt: Attempt, exit_code: int, reason: str, asked: bool) -> None:
    """Record how ``attempt`` ended; ``asked`` if it was told to stop by a person."""
    record = {"exit_code": exit_code, "reason": reason, "asked": asked, "ended": time.time()}
    write_json_atomically(attempt.directory / "exit.json", record)


def forgive(paths: StagePaths) -> None:
    """Give the stage a fresh budget of attempts."""
    for attempt in list_attempts(paths)[-1:]:
        (attempt.directory / "forgiven").touch()


def progress(paths: StagePaths) -> int:
    """What is kept of earlier attempts: the newest checkpoint's step, or the number of points."""
    if paths.points.exists():
        # Every complete line is a point that is kept; one without its line break was cut off.
        return paths.points.read_bytes().count(b"\n")
    if not paths.checkpoints.is_dir():
        return 0
    matches = (_CHECKPOINT.fullmatch(p.name) for p in paths.checkpoints.iterdir())
    return max((int(m[1]) for m in matches if m), default=0)


def failure(paths: StagePaths, cap: int) -> str | None:
    """Why no further attempt may be made, or None. Call it while no attempt is running."""
    attempts = _since_forgiven(list_attempts(paths))
    if not attempts:
        return None
    last = attempts[-1]
    if last.exit is not None and last.exit["exit_code"] in FOR_GOOD:
        return f"exit code {last.exit['exit_code']}: {last.exit['reason']}"
    step = progress(paths)
    stuck = 0
    for attempt in reversed(attempts):
        # An attempt of another starting step ends the count: since then something was gained.
        if attempt.counts and attempt.record.get("step", step) != step:
            break
        stuck += attempt.counts
    if stuck < cap:
        return None
    return f"{stuck} attempts without progress at step {step}; last: {describe(last)}"


def describe(attempt: Attempt) -> str:
    """How the attempt ended, in a phrase."""
    if attempt.exit is None:
        return "killed"
    return f"exit code {attempt.exit['exit_code']}, {attempt.exit['reason']}"


def failing_log(attempt: Attempt) -> Path:
    """The log of the step that ended the attempt: the program's, or a reward server's own."""
    reason = (attempt.exit or {}).get("reason", "")
    # What the supervisor writes as a reason is what is read here: "reward-x ended with exit code
    # 1".
    late = _LATE_SERVER.search(reason)
    step = f"reward-{late[1]}" if late else reason.partition(" ended with ")[0]
    log = attempt.directory / f"{step}.log"
    return log if "/" not in step and log.exists() else attempt.directory / "log.txt"


def last_words(log: Path) -> str:
    """What a program said last: its last ``error: ...`` line, or its last line."""
    try:
        with log.open("rb") as stream:
            # Logs of a long run have gigabytes; the last 64 KiB hold the end of it.
            stream.seek(max(0, stream.seek(0, 2) - _TAIL_BYTES))
            text = stream.read().decode(errors="replace")
    except OSError:
        return ""
    # Progress bars write carriage returns instead of line breaks.
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1]


def duration_s(attempt: Attempt) -> float:
    """How long it took; one that was killed or still runs, until the last it wrote."""
    began = attempt.record.get("started")
    if began is None:
        return 0.0
    if attempt.exit is not None and "ended" in attempt.exit:
        return max(0.0, attempt.exit["ended"] - began)
    written = [p.stat().st_mtime for p in attempt.directory.iterdir()]
    return max(0.0, max(written, default=began) - began)


def _since_forgiven(attempts: list[Attempt]) -> list[Attempt]:
    forgiven = [index for index, attempt in enumerate(attempts) if attempt.forgiven]
    return attempts[forgiven[-1] + 1 :] if forgiven else attempts


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    # A file system that lost its last seconds may leave less than a record: such an attempt
    # counts as one that left no word.
    except (FileNotFoundError, ValueError):
        return None
