"""Runs a function on several ranks: forked from a process that has NeMo already, over gloo.

Importing NeMo takes about 15 seconds of CPU, so it is done once, in the pytest process
(fixture ``nemo``), and every rank is a fork of it. The parent must stay single-threaded in
torch (``OMP_NUM_THREADS=1``, see conftest.py): OpenMP's threads do not survive a fork.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

_FORK = multiprocessing.get_context("fork")
_LAUNCHERS = ("SLURM_", "PMI_", "OMPI_", "TORCHELASTIC_")


class RankError(AssertionError):
    """A rank failed; the message holds its traceback."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0
) -> list[Any]:
    """Call ``function(*args)`` in ``world_size`` processes, as torchrun on one node would.

    The function reads its rank from the environment or, once it has initialised it, from
    `torch.distributed`. What it returns must be picklable; tensors are copied.

    Returns:
        The ranks' return values, by rank.

    Raises:
        RankError: a rank raised, died or the timeout (seconds) passed; all are killed first.
    """
    torch.set_num_threads(1)
    port = free_port()
    ranks, pipes = [], []
    for rank in range(world_size):
        receiver, sender = _FORK.Pipe(duplex=False)
        call = (rank, world_size, port, sender, function, args)
        # not daemonic: Megatron's checkpoint writers are children of the ranks
        process = _FORK.Process(target=_rank_main, args=call, daemon=False)
        process.start()
        sender.close()
        ranks.append(process)
        pipes.append(receiver)
    grace = 0.0
    try:
        results = _collect(pipes, ranks, timeout)
        grace = 10.0
        return results
    finally:
        for process in ranks:
            _end(process, grace)


def free_port() -> int:
    """A TCP port that is free on the loopback interface now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    sender: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.setpgid(0, 0)
    for name in [name for name in os.environ if name.startswith(_LAUNCHERS)]:
        del os.environ[name]
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",  # Lightning then takes the ranks from the environment
    }
    try:
        message = (True, function(*args))
        payload = pickle.dumps(message)
    except BaseException:
        payload = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(payload)
    sender.close()


def _collect(pipes: list[Connection], ranks: list[Any], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    # A killed rank's pipe stays open in processes it started: watch the rank itself too.
    ended = [os.pidfd_open(process.pid) for process in ranks]
    while len(results) < len(pipes):
        running = [rank for rank in range(len(pipes)) if rank not in results]
        awaited = [pipes[rank] for rank in running] + [ended[rank] for rank in running]
        ready = wait(awaited, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {running} not done after {timeout:.0f} s")
        for rank in running:
            if pipes[rank] in ready or ended[rank] in ready:
                results[rank] = _receive(pipes[rank], rank)
    for descriptor in ended:
        os.close(descriptor)
    return [results[rank] for rank in range(len(pipes))]


def _receive(pipe: Connection, rank: int) -> Any:
    """A rank's message, which is in the pipe if it sent one before it ended."""
    try:
        if not pipe.poll():
            raise EOFError
        done, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise RankError(f"rank {rank} died without a word (killed?)") from None
    if not done:
        raise RankError(f"rank {rank} failed:\n{value}")
    return value


def _end(process: multiprocessing.process.BaseProcess, grace: float) -> None:
    """Give a rank ``grace`` seconds to end by itself, then kill it with all it started."""
    process.join(timeout=grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    process.close()
