r"""Start the ranks of one node, as torchrun does, but pass signals and exit codes through.

torchrun turns every exit code into 1 and kills its workers 30 seconds after a signal; a member
that saved and wants to be requeued could not say so. This sets the same environment
(``env://`` rendezvous, rank 0 holds the store), forwards SIGUSR1, SIGTERM and SIGINT to every rank,
ends the others when one fails, and exits with the first failure's code. Over several nodes srun
reports the highest code, which is that of whoever was killed last; ``--exit-file`` keeps the first.

    python -m nemo_warp.pipeline.ranks --nproc-per-node 8 -- python -m nemo_warp.aligner.train ...
    srun --nodes 2 --ntasks-per-node 1 python -m nemo_warp.pipeline.ranks --nodes 2 \
        --nproc-per-node 8 --master-address node1 --master-port 29400 -- python -m ...
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_FORWARDED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.1
_GRACE_S = 30.0
"""What the other ranks get to end by themselves after one did, and again after SIGTERM."""


def die_with_parent(signal_number: int = signal.SIGKILL) -> None:
    """Ask Linux to send the calling process a signal when its parent dies (for `preexec_fn`)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal_number)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def exit_status(returncode: int) -> int:
    """A `subprocess` return code as a shell reports it: 128 + n for a signal."""
    return 128 - returncode if returncode < 0 else returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ranks; returns the first failure's exit status, else 0."""
    options = _arguments(argv)
    ranks = _start(options)
    for number in _FORWARDED:
        signal.signal(number, lambda n, _frame: _signal(ranks, n))
    return _wait(ranks, options.exit_file)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nemo_warp.pipeline.ranks", description=__doc__)
    parser.add_argument("--nproc-per-node", type=int, default=1, help="ranks on this node")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, help="default: SLURM_NODEID, or 0")
    parser.add_argument("--master-address", default="127.0.0.1", help="node of rank 0")
    parser.add_argument("--master-port", type=int, default=0, help="0: a free one (one node only)")
    parser.add_argument("--exit-file", type=Path, help="gets the first failure's exit status")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND")
    options = parser.parse_args(argv)
    if options.nodes > 1 and options.master_port == 0:
        parser.error("several nodes need one --master-port that all of them are told")
    return options


def _start(options: argparse.Namespace) -> list[subprocess.Popen]:
    node = options.node_rank
    if node is None:
        node = int(os.environ.get("SLURM_NODEID", "0")) if options.nodes > 1 else 0
    local = options.nproc_per_node
    common = {
        "WORLD_SIZE": local * options.nodes,
        "LOCAL_WORLD_SIZE": local,
        "GROUP_RANK": node,
        "GROUP_WORLD_SIZE": options.nodes,
        "MASTER_ADDR": options.master_address,
        "MASTER_PORT": options.master_port or free_port(),
        "TORCHELASTIC_RUN_ID": os.environ.get("SLURM_JOB_ID", "local"),
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }
    own = [{"LOCAL_RANK": r, "RANK": node * local + r} for r in range(local)]
    return [
        subprocess.Popen(
            options.command,
            env={**os.environ, **{k: str(v) for k, v in {**common, **rank}.items()}},
            preexec_fn=_prepare_rank,
        )
        for rank in own
    ]


def _prepare_rank() -> None:
    die_with_parent()
    # A request to stop that comes before the rank listens is lost, not deadly; it is repeated.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _signal(ranks: list[subprocess.Popen], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def _wait(ranks: list[subprocess.Popen], exit_file: Path | None) -> int:
    """Wait for all ranks; after the first failure the others are ended."""
    first, deadline, kills = 0, None, [signal.SIGTERM, signal.SIGKILL]
    while any(rank.poll() is None for rank in ranks):
        failed = [rank.returncode for rank in ranks if rank.poll() is not None and rank.returncode]
        if failed and deadline is None:
            first, deadline = exit_status(failed[0]), time.monotonic() + _grace(failed[0])
            _record(first, exit_file)
        if deadline is not None and time.monotonic() > deadline and kills:
            _signal(ranks, kills.pop(0))
            deadline = time.monotonic() + _GRACE_S
        time.sleep(_POLL_S)
    if not first:  # the last ones to end may have been the only ones to fail
        first = next((exit_status(r.returncode) for r in ranks if r.returncode), 0)
        _record(first, exit_file)
    return first


def _record(status: int, exit_file: Path | None) -> None:
    """Whoever fails first, on any node, makes the file."""
    if status and exit_file is not None:
        with contextlib.suppress(FileExistsError), exit_file.open("x") as stream:
            stream.write(str(status))


def _grace(returncode: int) -> float:
    """Ranks that agreed on an exit code follow by themselves; after a crash they would hang."""
    return _GRACE_S if returncode > 1 else 2.0


if __name__ == "__main__":
    sys.exit(main())
