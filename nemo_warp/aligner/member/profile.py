"""A window of steps under torch's profiler, by option; the steps themselves are not changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from nemo.utils import logging


class ProfileWindow:
    """Profiles some consecutive steps of one attempt.

    Writes ``profile/step_00000100-rank0.json`` on every rank, for https://ui.perfetto.dev or
    ``chrome://tracing``. The parts of a step (`Timings`) are ranges in it. Under Nsight Systems,
    ``nsys profile --capture-range=cudaProfilerApi`` captures the same steps.

    Args:
        directory: the member's.
        first: number of the first step; None profiles nothing.
        number: of steps.
    """

    def __init__(self, directory: Path, first: int | None, number: int) -> None:
        self._directory = directory / "profile"
        self._first, self._number = first, number
        self._profiler: Any = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around one step, whose number is that of the optimizer steps before it."""
        if self._profiler is None and self._is_inside(step):
            self._start()
        try:
            yield
        finally:
            if self._profiler is not None:
                self._profiler.step()
                if not self._is_inside(step + 1):
                    self.finish()

    def _is_inside(self, step: int) -> bool:
        return self._first is not None and self._first <= step < self._first + self._number

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            # cudaProfilerStart: what Nsight waits for with --capture-range=cudaProfilerApi.
            torch.cuda.profiler.start()
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()

    def finish(self) -> None:
        """Write the trace of a window that is open; also of one that the run's end cuts short."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        if torch.cuda.is_available():
            torch.cuda.profiler.stop()
        self._directory.mkdir(exist_ok=True)
        name = f"step_{self._first:08d}-rank{torch.distributed.get_rank()}.json"
        profiler.export_chrome_trace(str(self._directory / name))
        logging.info(f"profile of steps from {self._first} on: {self._directory / name}")
