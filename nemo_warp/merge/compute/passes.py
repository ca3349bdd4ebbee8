"""Work that is started in threads now and put together when it is wanted."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

T = TypeVar("T")


class Pass(Generic[T]):
    """Tasks on their way.

    Args:
        pool: where they run.
        tasks: (function, *arguments) each.
        finish: makes the pass' result from the tasks' results, in order.
    """

    def __init__(self, pool: ThreadPoolExecutor, tasks: list[tuple], finish: Callable[[list], T]):
        self._futures: list[Future] = [pool.submit(*task) for task in tasks]
        self._finish = finish

    def wait(self) -> None:
        """Wait for all tasks; the first error ends the waiting and is raised."""
        # FIRST_EXCEPTION: a merge of terabytes must not go on for minutes after a damaged byte was
        # seen.
        done, _ = wait(self._futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()

    def result(self) -> T:
        """Wait for all tasks, and put their results together."""
        self.wait()
        return self._finish([future.result() for future in self._futures])
