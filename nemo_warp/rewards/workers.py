"""Threads and event loops for users' callables: the process can end while a call hangs."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine
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
            # Daemons: a call that never returns must not keep the process from ending.
            # ThreadPoolExecutor joins its threads at exit.
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


class AsyncWorkers:
    """The same for coroutine functions: one daemon thread with an event loop.

    Args:
        count: calls at a time.
        name: of the thread.
    """

    def __init__(self, count: int, name: str) -> None:
        self._slots = asyncio.Semaphore(count)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name=name, daemon=True).start()

    def submit(self, function: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> Future:
        """Call it once fewer than ``count`` calls are under way."""
        return asyncio.run_coroutine_threadsafe(self._call(function, arguments), self._loop)

    async def _call(
        self, function: Callable[..., Coroutine[Any, Any, Any]], arguments: tuple
    ) -> Any:
        # Made before the loop runs, which is allowed since Python 3.10: it binds at its first use.
        async with self._slots:
            return await function(*arguments)
