"""Threads for strangers' code: they can be left behind when a call never returns."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Workers:
    """Daemon threads that call functions; unlike an executor's, a server can end without them.

    Args:
        count: calls at a time.
        name: of the threads, for whoever looks at a hanging server.
    """

    def __init__(self, count: int, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future, Callable[..., Any], tuple]] = (
            queue.SimpleQueue()
        )
        for number in range(count):
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True).start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """Call it on the next free thread."""
        future: Future = Future()
        self._calls.put((future, function, arguments))
        return future

    def _work(self) -> None:
        while True:
            future, function, arguments = self._calls.get()
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # whoever waits for the future is told
                future.set_exception(error)
