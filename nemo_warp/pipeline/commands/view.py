"""The state of a run for people: a table, and a live view of it while a local driver works."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from nemo_warp.pipeline.commands.terminal import clip, in_red, is_terminal, size_of
from nemo_warp.pipeline.disk.attempts import describe, list_attempts
from nemo_warp.pipeline.disk.progress import Progress, measure
from nemo_warp.pipeline.disk.state import StageState, Status
from nemo_warp.pipeline.recipe.load import Recipe
from nemo_warp.pipeline.recipe.plan import MEMBER

_REDRAW_S = 1.0
_PLAIN_S = 30.0
_ROOM_BELOW = 8
"""Rows left free below the table: what `run` says at its end must not scroll the screen."""
_EVENTS = 3
_MARKS = {
    Status.DONE: "done",
    Status.RUNNING: "running",
    Status.QUEUED: "queued",
    Status.READY: "ready",
    Status.WAITING: "waiting",
    Status.FAILED: "FAILED",
}


_URGENCY = (
    Status.FAILED,
    Status.RUNNING,
    Status.QUEUED,
    Status.READY,
    Status.WAITING,
    Status.DONE,
)
"""Which stages keep their line when there are more stages than lines."""


def folded(states: Mapping[str, StageState], rows: int) -> dict[str, StageState]:
    """At most ``rows`` stages, the most urgent ones, in the plan's order."""
    by_urgency = sorted(states, key=lambda name: _URGENCY.index(states[name].status))
    kept = set(by_urgency[: max(0, rows)])
    return {name: state for name, state in states.items() if name in kept}


def tally(states: Mapping[str, StageState]) -> str:
    """``30 done, 2 running, 1 FAILED``."""
    found = [state.status for state in states.values()]
    return ", ".join(f"{found.count(s)} {_MARKS[s]}" for s in _MARKS if s in found)


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
    """Redraws a screen in place on a terminal; elsewhere prints a line per event.

    The screen is drawn from the terminal's first row and is never higher or wider than the
    terminal: nothing wraps, so nothing scrolls, and after a resize the next drawing is right.
    """

    def __init__(self, recipe: Recipe, stream: TextIO | None = None) -> None:
        self._recipe = recipe
        self._stream = stream or sys.stdout
        self._in_place = is_terminal(self._stream)
        self._events: deque[str] = deque(maxlen=_EVENTS)
        self._size, self._drawn_at = (0, 0), 0.0
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
        line = f"[{duration(time.monotonic() - self._began)}] {text}"
        if self._in_place:
            self._events.append(line)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the last screen where it is; what is printed next begins below it."""
        if self._in_place and self._size != (0, 0):
            print(file=self._stream, flush=True)

    def _redraw(self, states: Mapping[str, StageState]) -> None:
        self._drawn_at = time.monotonic()
        size = size_of(self._stream)
        # Home, and clear only after a resize: clearing every time would flicker.
        begin = "\x1b[H" if size == self._size else "\x1b[2J\x1b[H"
        self._size = size
        # Each line clears what was longer before it; the last code clears what was below.
        lines = "\n".join(f"{line}\x1b[K" for line in self._screen(states, *size))
        print(f"{begin}{lines}\x1b[J", end="", file=self._stream, flush=True)

    def _screen(self, states: Mapping[str, StageState], columns: int, rows: int) -> list[str]:
        """The lines of one drawing, at most ``rows`` of at most ``columns`` characters."""
        room = max(3, rows - _ROOM_BELOW)
        events = list(self._events)[-max(0, room - 3) :] if room > 3 else []
        shown = folded(states, room - 2 - len(events))
        lines = table(self._recipe, shown)
        failed = {i for i, s in enumerate(shown.values(), 1) if s.status is Status.FAILED}
        elapsed = duration(time.monotonic() - self._began)
        lines += [f"{tally(states)}; {elapsed} elapsed; Ctrl-C saves and stops", *events]
        failed |= set(range(len(lines) - len(events), len(lines)))
        clipped = [clip(line, columns - 1) for line in lines][:rows]
        return [in_red(line) if i in failed else line for i, line in enumerate(clipped)]


def _numbers(done: Progress) -> list[str]:
    words = []
    if done.reward is not None:
        words.append(f"reward {done.reward:.3f}")
    if done.kl_to_sft is not None:
        words.append(f"KL {done.kl_to_sft:.2f}")
    if done.remaining_s is not None:
        words.append(f"{duration(done.remaining_s)} left")
    return words
