"""The local launcher: stages as subprocesses of this machine, as many side by side as configured.

The driver holds the driver lock while it lives. Everything it decides it reads from the disk, so
it may be killed at any moment; stages it left running finish by themselves, and the next driver
sees from their locks that they run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Protocol

from nemo_warp import exit_codes
from nemo_warp.pipeline.disk.attempts import list_attempts
from nemo_warp.pipeline.disk.state import StageState, Status, exit_code, inspect
from nemo_warp.pipeline.launch.steps import checkout
from nemo_warp.pipeline.recipe.load import Recipe

_POLL_S = 0.1
_LOOK_AGAIN_S = 2.0


class View(Protocol):
    """Who is told what happens; `nemo_warp.pipeline.commands.view.Live` tells people."""

    def show(self, states: Mapping[str, StageState]) -> None:
        """The state as it is now."""

    def tick(self, states: Mapping[str, StageState]) -> None:
        """Called often, while nothing happens."""

    def ended(self, name: str, code: int) -> None:
        """An attempt did not end well."""

    def refused(self, name: str, log: Path) -> None:
        """A task did not even begin."""


class LocalDriver:
    """Runs a recipe to its end on this machine; the driver lock must be held."""

    def __init__(self, recipe: Recipe, live: View) -> None:
        self._recipe, self._live = recipe, live
        self._tasks: dict[str, subprocess.Popen] = {}
        self._slots: dict[str, int] = {}
        self._tries: dict[str, int] = {}
        self._interrupted = False
        self._refused: set[str] = set()

    def run(self) -> int:
        """Start what is ready until everything is done or nothing can go on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._interrupt)
        while True:
            states = inspect(self._recipe)
            self._live.show(states)
            stopping = self._interrupted or self._recipe.paths.stop.exists()
            if not stopping:
                self._launch(states)
            running = [s for s in states.values() if s.status is Status.RUNNING]
            if not self._tasks and not running:
                if stopping:
                    return exit_codes.STOPPED_RESUMABLE
                if not self._startable(states):
                    return exit_codes.FAILED if self._refused else exit_code(states)
            self._wait(states)

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        self._interrupted = True
        for task in self._tasks.values():
            task.send_signal(signal.SIGTERM)

    def _launch(self, states: dict[str, StageState]) -> None:
        busy = {n for n, s in states.items() if s.status is Status.RUNNING} | set(self._tasks)
        free = self._recipe.values["launcher"]["side_by_side"] - len(busy)
        for name in [n for n in self._startable(states) if n not in busy][: max(0, free)]:
            self._start(name)

    def _startable(self, states: dict[str, StageState]) -> list[str]:
        ready = [name for name, state in states.items() if state.status is Status.READY]
        # The next iteration waits for members and merges, but not for an evaluation.
        ready.sort(key=lambda name: name.endswith("/evaluation"))
        return [name for name in ready if name not in self._refused]

    def _start(self, name: str) -> None:
        """One task in a session of its own: Ctrl-C reaches this driver, which tells its tasks."""
        words = [
            sys.executable,
            "-m",
            "nemo_warp.pipeline.task",
            str(self._recipe.paths.root),
            name,
        ]
        logs = self._recipe.paths.task_log(name)
        logs.parent.mkdir(exist_ok=True)
        self._tries[name] = len(list_attempts(self._recipe.paths.stage(name)))
        slots = set(range(self._recipe.values["launcher"]["side_by_side"]))
        self._slots[name] = min(slots - set(self._slots.values()), default=0)
        with logs.open("ab") as output:
            self._tasks[name] = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._devices(name)},
                cwd=checkout(),
                start_new_session=True,
            )

    def _devices(self, name: str) -> dict[str, str]:
        """The GPUs of the task's slot."""
        launcher = self._recipe.values["launcher"]
        if not launcher["gpus"]:
            return {}
        share = max(1, len(launcher["gpus"]) // launcher["side_by_side"])
        first = self._slots[name] * share
        chosen = launcher["gpus"][first : first + share]
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, chosen))}

    def _ended(self, name: str, code: int) -> None:
        """One that ended before it could make an attempt would do the same again: not repeated."""
        del self._slots[name]
        made = len(list_attempts(self._recipe.paths.stage(name))) > self._tries[name]
        if code not in (exit_codes.DONE, exit_codes.IN_PROGRESS) and not made:
            self._refused.add(name)
            self._live.refused(name, self._recipe.paths.task_log(name))
        elif code:
            self._live.ended(name, code)

    def _wait(self, states: dict[str, StageState]) -> None:
        """Until one of our tasks ends, or it is time to look at those of others."""
        deadline = time.monotonic() + _LOOK_AGAIN_S
        while time.monotonic() < deadline:
            ended = [name for name, task in self._tasks.items() if task.poll() is not None]
            for name in ended:
                self._ended(name, self._tasks.pop(name).returncode)
            if ended:
                return
            self._live.tick(states)
            time.sleep(_POLL_S)
