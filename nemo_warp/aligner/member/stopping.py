"""When to stop early: signals and the time limit, agreed on by all ranks at a step boundary."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

import torch

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequest:
    """Collects reasons to save and stop; never interrupts a step.

    Args:
        time_limit: seconds from ``started``; None = Slurm's SLURM_JOB_END_TIME, if it is set.
        save_margin: seconds before the limit that saving may need; the longest step seen so far
            is added, since a request is only looked at between steps.
        started: wall-clock time (s since the epoch) the process began.
    """

    def __init__(self, time_limit: float | None, save_margin: float, started: float) -> None:
        end_time = os.environ.get("SLURM_JOB_END_TIME")
        self._deadline: float | None = None
        if time_limit is not None:
            self._deadline = started + time_limit
        elif end_time is not None:
            # Slurm's own end time counts what was spent before this process (NeMo-Aligner's timer
            # starts after loading and restarts with every epoch, algorithms/reinforce.py l.464).
            self._deadline = float(end_time)
        self._save_margin = save_margin
        self._longest_step = 0.0
        self._signal: signal.Signals | None = None

    def install(self) -> None:
        """Listen for SIGUSR1 and SIGTERM on this rank (main thread only)."""
        for number in _SIGNALS:
            signal.signal(number, self._remember)

    def step_took(self, seconds: float) -> None:
        """Tell how long a step lasted."""
        self._longest_step = max(self._longest_step, seconds)

    def agreed(self) -> str | None:
        """Why to stop now, or None; the same on every rank. Collective."""
        # Slurm may signal one rank only, and clocks differ: ranks that decided alone would part in
        # the next collective. MAX: one rank that wants to stop is enough.
        codes = torch.tensor(
            [float(self._signal or 0), float(self._out_of_time())],
            device=torch.cuda.current_device(),
        )
        torch.distributed.all_reduce(codes, torch.distributed.ReduceOp.MAX)
        number, out_of_time = codes.tolist()
        if number:
            return f"{signal.Signals(int(number)).name} received"
        return "the time limit is near" if out_of_time else None

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        # Only remembered: the step that runs is finished, since half a step cannot be saved.
        self._signal = signal.Signals(number)

    def _out_of_time(self) -> bool:
        if self._deadline is None:
            return False
        return time.time() + self._save_margin + self._longest_step >= self._deadline
