"""Functions in processes of their own: what does not end is killed, and takes nothing along."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_START_S = 120.0  # a process that imports sympy on a busy node


class Isolated:
    """A function in a process of its own, one for each thread that calls.

    Args:
        function: of a module that a new process can import.
        seconds: of one call; then its process is killed, and the next call has a new one.
        memory: bytes that its process may take.
        first: arguments of a call that each process makes before its time counts (what it imports).
    """

    def __init__(
        self, function: Callable[..., Any], seconds: float, memory: int, first: tuple = ()
    ) -> None:
        self._function = function
        self._seconds = seconds
        self._memory = memory
        self._first = first
        self._own = threading.local()

    def __call__(self, *arguments: Any) -> Any:
        """Call it.

        Raises:
            TimeoutError: it did not end in time.
            RuntimeError: it raised, or its process ended.
        """
        pipe = self._started()
        try:
            pipe.send(arguments)
            if not pipe.poll(self._seconds):
                raise TimeoutError(f"no result within {self._seconds:g} s")
            good, value = pipe.recv()
        except (TimeoutError, OSError, EOFError) as error:
            self._kill()
            if isinstance(error, TimeoutError):
                raise
            raise RuntimeError(f"its process ended ({type(error).__name__})") from None
        if not good:
            raise RuntimeError(value)
        return value

    def close(self) -> None:
        """End the calling thread's process."""
        if getattr(self._own, "process", None) is not None:
            self._kill()

    def _started(self) -> Connection:
        if getattr(self._own, "process", None) is None or not self._own.process.is_alive():
            # Not fork: the server has threads.
            context = multiprocessing.get_context("spawn")
            self._own.pipe, inside = context.Pipe()
            arguments = (self._function, self._memory, self._first, inside)
            self._own.process = context.Process(target=_serve, args=arguments, daemon=True)
            self._own.process.start()
            inside.close()
            try:
                ready = self._own.pipe.poll(_START_S) and self._own.pipe.recv()
            except EOFError:
                ready = False
            if not ready:
                self._kill()
                raise RuntimeError("its process did not start")
        return self._own.pipe

    def _kill(self) -> None:
        self._own.process.kill()
        self._own.process.join()
        self._own.process.close()
        self._own.process = None
        self._own.pipe.close()


def _serve(function: Callable[..., Any], memory: int, first: tuple, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    if first:
        function(*first)
    pipe.send("ready")
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(*arguments))
        except BaseException as error:
            answer = (False, f"{type(error).__name__}: {error}"[:500])
        pipe.send(answer)
