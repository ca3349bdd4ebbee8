"""The local launcher: stages as subprocesses of this machine, as many side by side as configured.

The driver holds the driver lock while it lives. It reads from the disk what to do next, so it
may be killed at any moment: the stages that it started finish by themselves, and the next driver
sees from their locks that they are running.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from nemo_warp import exit_codes
from nemo_warp.pipeline.disk.attempts import Attempt, list_attempts
from nemo_warp.pipeline.disk.state import StageState, Status, exit_code, inspect
from nemo_warp.pipeline.launch.steps import checkout
from nemo_warp.pipeline.recipe.load import Recipe

# Seconds. Polling a child costs a system call; looking at all stages reads files, maybe over a
# network, hence more seldom. Signals are repeated since a program may miss one while it imports.
_POLL_S = 0.1
_LOOK_AGAIN_S = 2.0
_REPEAT_SIGNAL_S = 5.0


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
        self._devices: dict[str, str] = {}
        self._tries: dict[str, int | None] = {}
        self._interrupted = False
        self._next_signal = 0.0
        self._refused: set[str] = set()

    def run(self) -> int:
        """Start what is ready until everything is done or nothing can go on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._interrupt)
        while True:
            states = inspect(self._recipe)
            self._live.show(states)
            if not self._stopping():
                self._launch(states)
            running = [s for s in states.values() if s.status is Status.RUNNING]
            if not self._tasks and not running:
                if self._stopping():
                    return exit_codes.STOPPED_RESUMABLE
                if not self._startable(states):
                    return exit_codes.FAILED if self._refused else exit_code(states)
            self._wait(states)

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        """Only set a flag: a task may be about to start, which must get the signal as well."""
        self._interrupted = True

    def _stopping(self) -> bool:
        return self._interrupted or self._recipe.paths.stop.exists()

    def _tell(self, states: Mapping[str, StageState]) -> None:
        """SIGTERM to every task, also to those a killed driver left, until all have ended."""
        if not self._interrupted or time.monotonic() < self._next_signal:
            return
        self._next_signal = time.monotonic() + _REPEAT_SIGNAL_S
        for task in self._tasks.values():
            task.send_signal(signal.SIGTERM)
        others = [n for n, s in states.items() if s.status is Status.RUNNING]
        for name in set(others) - set(self._tasks):
            pid = _supervisor(list_attempts(self._recipe.paths.stage(name)))
            if pid is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGTERM)

    def _launch(self, states: dict[str, StageState]) -> None:
        # Also stages that a killed driver left running, which are not children of this process.
        busy = {n for n, s in states.items() if s.status is Status.RUNNING} | set(self._tasks)
        free = self._recipe.values["launcher"]["side_by_side"] - len(busy)
        for name in [n for n in self._startable(states) if n not in busy][: max(0, free)]:
            devices = self._free_devices(busy)
            if self._stopping() or devices is None:
                return
            self._start(name, devices)
            busy.add(name)

    def _startable(self, states: dict[str, StageState]) -> list[str]:
        ready = [name for name, state in states.items() if state.status is Status.READY]
        # The next iteration waits for members and merges, but not for an evaluation.
        # Stable: members keep the plan's order.
        ready.sort(key=lambda name: name.endswith("/evaluation"))
        return [name for name in ready if name not in self._refused]

    def _free_devices(self, busy: set[str]) -> str | None:
        """The GPUs of a share nobody uses; empty without GPUs, None if all are in use.

        What tasks of a killed driver use is in their attempts.
        """
        shares = device_shares(self._recipe.values["launcher"])
        if not shares:
            return ""
        taken: set[str] = set()
        for name in busy:
            attempt = list_attempts(self._recipe.paths.stage(name))[-1:]
            recorded = attempt[0].record.get("devices") if attempt else None
            # Our own record first: an attempt's directory appears some time after its task was
            # started.
            taken |= set((self._devices.get(name) or recorded or "").split(","))
        return next((share for share in shares if not taken & set(share.split(","))), None)

    def _start(self, name: str, devices: str) -> None:
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
        self._tries[name] = self._newest(name)
        self._devices[name] = devices
        visible = {"CUDA_VISIBLE_DEVICES": devices} if devices else {}
        # Appended: what an earlier attempt said must not be lost to a restart.
        with logs.open("ab") as output:
            self._tasks[name] = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **visible},
                cwd=checkout(),
                start_new_session=True,
            )

    def _ended(self, name: str, code: int) -> None:
        """Note how a task ended. One that ended before it made an attempt is not started again."""
        del self._devices[name]
        made = self._newest(name) != self._tries[name]
        # IN_PROGRESS: another process holds the stage; that is how two drivers meet.
        quiet = (exit_codes.DONE, exit_codes.IN_PROGRESS)
        if code not in quiet and not made and not self._interrupted:
            self._refused.add(name)
            self._live.refused(name, self._recipe.paths.task_log(name))
        elif code:
            self._live.ended(name, code)

    def _newest(self, name: str) -> int | None:
        """Tells the stage's newest attempt from any other.

        Numbers do not: those of a stage that is made again begin anew.
        """
        tries = list_attempts(self._recipe.paths.stage(name))
        return tries[-1].directory.stat().st_ino if tries else None

    def _wait(self, states: dict[str, StageState]) -> None:
        """Until one of our tasks ends, or it is time to look at those of others."""
        deadline = time.monotonic() + _LOOK_AGAIN_S
        while time.monotonic() < deadline:
            ended = [name for name, task in self._tasks.items() if task.poll() is not None]
            for name in ended:
                self._ended(name, self._tasks.pop(name).returncode)
            if ended:
                return
            self._tell(states)
            self._live.tick(states)
            time.sleep(_POLL_S)


def device_shares(launcher: Mapping[str, Any]) -> list[str]:
    """``launcher.gpus`` in as many parts as stages run side by side: ``["0,1", "2,3"]``."""
    gpus, parts = launcher["gpus"], launcher["side_by_side"]
    # Even parts; where they do not divide, shares differ by one GPU.
    bounds = [len(gpus) * part // parts for part in range(parts + 1)]
    shares = [gpus[begin:end] for begin, end in itertools.pairwise(bounds)]
    return [",".join(map(str, share)) for share in shares if share]


def _supervisor(tries: list[Attempt]) -> int | None:
    """Process id of the task of a running stage, if it runs on this machine."""
    # A process id means nothing on another machine, where another process may have it.
    here = tries and tries[-1].exit is None and tries[-1].record.get("host") == socket.gethostname()
    return tries[-1].record.get("pid") if here else None
