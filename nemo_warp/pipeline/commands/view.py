"""The state of a run for people: a table, and a live view of it while a local driver works."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from nemo_warp.pipeline.disk.attempts import describe, list_attempts
from nemo_warp.pipeline.disk.progress import Progress, measure
from nemo_warp.pipeline.disk.state import StageState, Status
from nemo_warp.pipeline.recipe.load import Recipe
from nemo_warp.pipeline.recipe.plan import MEMBER

_REDRAW_S = 1.0
_PLAIN_S = 30.0
_MARKS = {
    Status.DONE: "done",
    Status.RUNNING: "running",
    Status.QUEUED: "queued",
    Status.READY: "ready",
    Status.WAITING: "waiting",
    Status.FAILED: "FAILED",
}


def table(recipe: Recipe, states: Mapping[str, StageState]) -> list[str]:
    """A line per stage, columns aligned."""
    header = ("stage", "status", "progress", "reward", "KL", "tries", "left", "")
    rows = [header, *(_row(recipe, state) for state in states.values())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header) - 1)]
    return [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=False)) + f"  {row[-1]}".rstrip()
        for row in rows
    ]


def _row(recipe: Recipe, state: StageState) -> tuple[str, ...]:
    done = measure(recipe, state)
    progress = "" if done.total is None else f"{done.step or 0}/{done.total}"
    return (
        state.stage.name,
        _MARKS[state.status],
        progress,
        "" if done.reward is None else f"{done.reward:.3f}",
        "" if done.kl_to_sft is None else f"{done.kl_to_sft:.2f}",
        str(done.attempt or ""),
        duration(done.remaining_s),
        state.reason,
    )


def duration(seconds: float | None) -> str:
    """``1:02:03``, or nothing."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Live:
    """Redraws the table in place on a terminal; elsewhere prints a line per event."""

    def __init__(self, recipe: Recipe, stream: TextIO | None = None) -> None:
        self._recipe = recipe
        self._stream = stream or sys.stdout
        self._in_place = self._stream.isatty()
        self._lines, self._drawn_at = 0, 0.0
        self._last: dict[str, Status] = {}
        self._began = time.monotonic()

    def show(self, states: Mapping[str, StageState]) -> None:
        """The state as it is now."""
        if self._in_place:
            self._redraw(states)
            return
        if not self._last:
            done = sum(s.status is Status.DONE for s in states.values())
            self._say(f"{self._recipe.name}: {done} of {len(states)} stages done")
        for name, state in states.items():
            before = self._last.get(name)
            told = state.status in (Status.RUNNING, Status.DONE, Status.FAILED)
            known = not self._last and state.status is Status.DONE
            if told and before is not state.status and not known:
                self._say(self._sentence(state))
        self._last = {name: state.status for name, state in states.items()}

    def tick(self, states: Mapping[str, StageState]) -> None:
        """Called often; draws when it is time to."""
        if time.monotonic() - self._drawn_at < (_REDRAW_S if self._in_place else _PLAIN_S):
            return
        if self._in_place:
            self._redraw(states)
            return
        self._drawn_at = time.monotonic()
        for state in states.values():
            if state.status is Status.RUNNING:
                self._say(self._sentence(state))

    def ended(self, name: str, code: int) -> None:
        """An attempt did not end well."""
        tries = list_attempts(self._recipe.paths.stage(name))
        how = describe(tries[-1]) if tries else f"exit code {code}"
        self._say(f"{name}: {how}")

    def refused(self, name: str, log: Path) -> None:
        """A task did not even begin."""
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        self._say(f"{name} cannot start: {lines[-1] if lines else 'no output'} (see {log})")

    def _sentence(self, state: StageState) -> str:
        done = measure(self._recipe, state)
        words = [f"{state.stage.name}: {state.status.value}"]
        if state.status is Status.RUNNING and done.total is not None:
            unit = "step" if state.stage.kind == MEMBER else "point"
            words.append(f"{unit} {done.step or 0}/{done.total}")
        words += _numbers(done) if state.status is not Status.FAILED else []
        return ", ".join([*words, state.reason] if state.reason else words)

    def _say(self, text: str) -> None:
        stamp = duration(time.monotonic() - self._began)
        print(f"[{stamp}] {text}", file=self._stream, flush=True)
        self._lines = 0

    def _redraw(self, states: Mapping[str, StageState]) -> None:
        self._drawn_at = time.monotonic()
        lines = table(self._recipe, states)
        lines.append(f"{duration(time.monotonic() - self._began)} elapsed; Ctrl-C saves and stops")
        up = f"\x1b[{self._lines}F" if self._lines else ""
        text = "".join(f"{line}\x1b[K\n" for line in lines)
        print(f"{up}{text}", end="", file=self._stream, flush=True)
        self._lines = len(lines)


def _numbers(done: Progress) -> list[str]:
    words = []
    if done.reward is not None:
        words.append(f"reward {done.reward:.3f}")
    if done.kl_to_sft is not None:
        words.append(f"KL {done.kl_to_sft:.2f}")
    if done.remaining_s is not None:
        words.append(f"{duration(done.remaining_s)} left")
    return words
