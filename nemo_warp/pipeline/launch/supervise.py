"""Watch the steps of one attempt: the first to end ends the attempt and gives its exit code.

Order of events: reward servers start; their endpoint files appear (or the deadline passes); the
stage's program starts; whichever ends first ends the attempt. When a server is lost, or on
request (SIGUSR1 before the time limit, SIGTERM, the run's STOP file), the supervisor signals the
program to save and stop. It repeats the signal until the program ends, and kills it when the grace
period (``retries.stop_grace_s``) is over.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from nemo_warp import exit_codes
from nemo_warp.pipeline.disk import cancelled
from nemo_warp.pipeline.disk.request import Request
from nemo_warp.pipeline.launch import programs, slurm
from nemo_warp.pipeline.launch.slurm import Ended
from nemo_warp.pipeline.launch.steps import Allocation, RunningStep, Step, stop_all
from nemo_warp.pipeline.recipe.load import Recipe
from nemo_warp.pipeline.recipe.plan import Stage

_POLL_S = 0.1
_LOOK_S = 1.0
_REPEAT_SIGNAL_S = 5.0
_SERVER_GRACE_S = 10.0


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        asked: because a person wanted it to.
        again: whether its job may requeue itself: not when Slurm is ending it anyway.
    """

    exit_code: int
    reason: str
    asked: bool = False
    again: bool = True


class Supervisor:
    """Runs one attempt in ``directory`` (its logs and endpoint files are there)."""

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        request: Request,
        allocation: Allocation,
        directory: Path,
        lock: int,
    ) -> None:
        self._recipe, self._stage, self._request = recipe, stage, request
        self._allocation, self._directory, self._lock = allocation, directory, lock
        self._servers: list[RunningStep] = []
        self._signal: signal.Signals | None = None
        self._ended: Ended | None = None
        self._next_look = 0.0

    def run(self) -> Outcome:
        """Run to the end of the first step, and end all others."""
        # The handler only remembers: what to do is decided between polls, never inside a system
        # call.
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)
        running: list[RunningStep] = []
        try:
            servers = programs.servers(
                self._recipe, self._request, self._allocation, self._directory
            )
            self._servers = [self._start(step) for step in servers]
            early = self._await_servers([s.endpoint for s in servers if s.endpoint])
            if early is not None:
                return early
            # After the servers are up: what an earlier attempt left is no hindrance to them.
            programs.prepare(self._recipe, self._stage)
            for step in programs.programs(
                self._recipe, self._stage, self._request, self._allocation, self._directory
            ):
                running = [self._start(step)]
                outcome = self._watch(running[0])
                if outcome.exit_code != exit_codes.DONE:
                    return outcome
            programs.publish(self._recipe, self._stage, self._request)
            return Outcome(exit_codes.DONE, "done")
        except OSError as error:  # a full disk, EIO: the next attempt may meet a better day
            return Outcome(exit_codes.FAILED, f"{type(error).__name__}: {error}")
        finally:
            # The program before its servers, which it may still ask for its last rewards.
            stop_all([*running, *self._servers], _SERVER_GRACE_S, time.sleep)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)

    def _start(self, step: Step) -> RunningStep:
        log = self._directory / (f"{step.name}.log" if step.endpoint else "log.txt")
        started = RunningStep(step, self._allocation, log, self._lock)
        print(f"[{step.name}] {' '.join(started.command)}", flush=True)
        return started

    def _asked(self) -> str | None:
        """Who wants this attempt to stop, or None."""
        if self._signal is not None:
            why = self._ended_by_slurm() if self._signal is signal.SIGTERM else None
            return f"{self._signal.name} received{f' ({why})' if why else ''}"
        if time.monotonic() < self._next_look:  # once a second: it may be a shared file system
            return None
        self._next_look = time.monotonic() + _LOOK_S
        stop = self._recipe.paths.stop
        return f"{stop} exists" if stop.exists() else None

    def _ended_by_slurm(self) -> str | None:
        """How Slurm is ending the job, if it is: it cancels, requeues, or the time is over.

        SIGTERM goes to all of the job's processes at once: the steps may have ended of it before
        this one is told. That the job was cancelled is noted right away: SIGKILL follows soon.
        """
        job = self._allocation.job
        if job and self._ended is None:
            found = slurm.why_ended(job)
            # Without a signal an unanswered question proves nothing; with one, Slurm is what sent
            # it.
            self._ended = None if found is Ended.UNKNOWN and self._signal is None else found
            if self._ended is Ended.CANCELLED:
                cancelled.note(self._recipe.paths.stage(self._stage.name), job)
        return f"job {job} {self._ended.value}" if self._ended else None

    def _stopped(self, reason: str) -> Outcome:
        """The attempt ended because it was asked to.

        Under Slurm, SIGUSR1 (time limit) and most SIGTERMs are not sent by a person.
        """
        wishes = (signal.SIGINT,) if self._allocation.job else (signal.SIGINT, signal.SIGTERM)
        asked = self._signal in wishes or self._recipe.paths.stop.exists()
        asked = asked or self._ended is Ended.CANCELLED
        # A cancelled or requeued job must not requeue itself: Slurm has decided already.
        again = self._ended in (None, Ended.TIME_LIMIT)
        return Outcome(exit_codes.STOPPED_RESUMABLE, reason, asked, again)

    def _lost_server(self) -> Outcome | None:
        for server in self._servers:
            if server.exit_code is not None:
                # A server that ends with 0 is lost all the same, and 0 would mean that the attempt
                # is done.
                code = server.exit_code or exit_codes.REWARDS_FAILED
                said = self._last_error(f"{server.name}.log")
                return Outcome(code, f"{server.name} ended with exit code {server.exit_code}{said}")
        return None

    def _await_servers(self, endpoints: list[Path]) -> Outcome | None:
        """None once every endpoint file is there, otherwise why the attempt ends here."""
        allowed = self._recipe.values["retries"]["ready_deadline_s"]
        deadline = time.monotonic() + allowed
        while not all(endpoint.exists() for endpoint in endpoints):
            lost, asked = self._lost_server(), self._asked()
            if asked is None and lost is not None:
                # The server may have died of the same SIGTERM that this process has not been told
                # of yet.
                asked = self._ended_by_slurm()
            if asked is not None:
                return self._stopped(asked)
            if lost is not None:
                return lost
            if time.monotonic() > deadline:
                late = [str(e) for e in endpoints if not e.exists()]
                return Outcome(
                    exit_codes.REWARDS_FAILED,
                    f"no reward server ready after {allowed} s: {', '.join(late)} missing",
                )
            time.sleep(_POLL_S)
        return None

    def _watch(self, program: RunningStep) -> Outcome:
        """Wait for ``program``; tell it to stop when a server is lost or somebody asks."""
        lost: Outcome | None = None
        asked: str | None = None
        next_signal = deadline = 0.0
        while program.exit_code is None:
            lost, asked = lost or self._lost_server(), asked or self._asked()
            now = time.monotonic()
            if lost is not None or asked is not None:
                # The grace begins with the first reason to stop; later ones do not prolong it.
                deadline = deadline or now + self._recipe.values["retries"]["stop_grace_s"]
                if now >= next_signal:
                    program.send(programs.stop_signal(self._stage))
                    next_signal = now + _REPEAT_SIGNAL_S
                if now > deadline:
                    program.kill()
            time.sleep(_POLL_S)
        return self._outcome(program, lost, asked)

    def _outcome(self, program: RunningStep, lost: Outcome | None, asked: str | None) -> Outcome:
        code = program.exit_code
        assert code is not None
        # Done is done, whatever was asked meanwhile.
        if code == exit_codes.DONE:
            return Outcome(code, "done")
        ended = self._ended_by_slurm()  # it may have warned only, when it sent SIGTERM
        asked = asked or ended
        if asked is not None:
            saved = "saved and stopped" if code == exit_codes.STOPPED_RESUMABLE else "stopped"
            return self._stopped(f"{saved}: {asked}")
        if lost is not None:
            return lost
        return Outcome(
            code, f"{program.name} ended with exit code {code}{self._last_error('log.txt')}"
        )

    def _last_error(self, log: str) -> str:
        """A step's own ``error: ...`` line, if it printed one into ``log``."""
        try:
            tail = (self._directory / log).read_bytes()[-20000:].decode(errors="replace")
        except FileNotFoundError:
            return ""
        errors = [line for line in tail.splitlines() if line.startswith("error: ")]
        return f" ({errors[-1].removeprefix('error: ')})" if errors else ""
