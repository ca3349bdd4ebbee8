r"""Start the ranks of one node, as torchrun does, but pass signals and exit codes through.

torchrun turns every exit code into 1 and kills its workers 30 seconds after a signal; a member
that saved and wants to be requeued could not say so. This sets the same environment
(``env://`` rendezvous, rank 0 holds the store), forwards SIGUSR1, SIGTERM and SIGINT to every rank,
ends the others when one fails, and exits with the first failure's code. Over several nodes srun
reports the highest code, which is that of whoever was killed last; ``--exit-file`` keeps the first,
and lets the ranks that other processes started end as well.

With ``--mpi`` this process is itself one of the ranks: MPI's launcher started one for each, and
says which. TensorRT-LLM asks MPI, everything else asks torch: they have to agree.

    python -m nemo_warp.pipeline.ranks --nproc-per-node 8 -- python -m nemo_warp.aligner.train ...
    srun --nodes 2 --ntasks-per-node 1 python -m nemo_warp.pipeline.ranks --nodes 2 \
        --nproc-per-node 8 --master-address node1 --master-port 29400 -- python -m ...
    srun --mpi=pmix --nodes 2 --ntasks-per-node 8 python -m nemo_warp.pipeline.ranks --mpi \\
        --nodes 2 --nproc-per-node 8 --master-address node1 --master-port 29400 -- python -m ...
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nemo_warp import exit_codes
from nemo_warp.ports import free_port

_FORWARDED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.1
_LOOK_S = 1.0
_GRACE_S = 30.0
"""What the other ranks get to end by themselves after one did, and again after SIGTERM."""


def die_with_parent(signal_number: int = signal.SIGKILL) -> None:
    """Ask Linux to send the calling process a signal when its parent dies (for `preexec_fn`)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal_number)


def exit_status(returncode: int) -> int:
    """A `subprocess` return code as a shell reports it: 128 + n for a signal."""
    return 128 - returncode if returncode < 0 else returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ranks; returns the first failure's exit status, else 0."""
    options = _arguments(argv)
    if options.mpi:
        try:
            _check_mpi_rank(options)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            _record(exit_codes.MISCONFIGURED, options.exit_file)
            return exit_codes.MISCONFIGURED
    ranks = _start(options)
    # After the ranks exist: a signal before ends this process, and with it (die_with_parent) them.
    for number in _FORWARDED:
        signal.signal(number, lambda n, _frame: _signal(ranks, n))
    return _wait(ranks, options.exit_file, os.getppid() if options.mpi else None)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nemo_warp.pipeline.ranks", description=__doc__)
    parser.add_argument("--nproc-per-node", type=int, default=1, help="ranks on this node")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, help="default: SLURM_NODEID, or 0")
    parser.add_argument("--master-address", default="127.0.0.1", help="node of rank 0")
    parser.add_argument("--master-port", type=int, default=0, help="0: a free one (one node only)")
    parser.add_argument("--exit-file", type=Path, help="gets the first failure's exit status")
    parser.add_argument("--mpi", action="store_true", help="MPI started a process for each rank")
    parser.add_argument("--side-by-side", type=int, default=1, help="as many share this machine")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND")
    options = parser.parse_args(argv)
    if (options.nodes > 1 or options.mpi) and options.master_port == 0:
        parser.error("several nodes, and MPI's ranks, need one --master-port that all are told")
    return options


def _start(options: argparse.Namespace) -> list[subprocess.Popen]:
    node, local = _node(options), options.nproc_per_node
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
        # Rank 0 opens the store itself; torchrun's agent, which would hold it, is not there.
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }
    if "OMP_NUM_THREADS" not in os.environ:
        common["OMP_NUM_THREADS"] = threads(local * options.side_by_side)
    started = [_mpi_local_rank()] if options.mpi else range(local)
    own = [{"LOCAL_RANK": r, "RANK": node * local + r} for r in started]
    return [
        subprocess.Popen(
            options.command,
            env={**os.environ, **{k: str(v) for k, v in {**common, **rank}.items()}},
            preexec_fn=_prepare_rank,
        )
        for rank in own
    ]


def _node(options: argparse.Namespace) -> int:
    if options.node_rank is not None:
        return options.node_rank
    return int(os.environ.get("SLURM_NODEID", "0")) if options.nodes > 1 else 0


def threads(ranks: int) -> int:
    """Threads of each of ``ranks`` processes that share this machine, or this step's part of it.

    torch takes all cores for each otherwise: two tiny members side by side on 2 cores took 78 s
    instead of 60.
    """
    # What Slurm or taskset allows, not what the machine has.
    cores = len(os.sched_getaffinity(0))
    allowed = int(os.environ.get("SLURM_CPUS_ON_NODE") or cores)
    return max(1, min(cores, allowed) // ranks)


_MPI_RANKS = ("PMIX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_MPI_LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", "MPI_LOCALRANKID")


def _first_set(names: Sequence[str]) -> int | None:
    return next((int(os.environ[name]) for name in names if name in os.environ), None)


def _mpi_local_rank() -> int:
    local = _first_set(_MPI_LOCAL_RANKS)
    assert local is not None, "checked"
    return local


def _check_mpi_rank(options: argparse.Namespace) -> None:
    """Raise ValueError unless MPI's rank is what torch's will be."""
    rank, local = _first_set(_MPI_RANKS), _first_set(_MPI_LOCAL_RANKS)
    if rank is None or local is None:
        raise ValueError(
            "no MPI rank: TensorRT-LLM needs a process started by MPI for each rank, by srun with "
            "a PMI plugin (srun --mpi=list; key mpi of the cluster file) or by mpirun"
        )
    expected = _node(options) * options.nproc_per_node + local
    if rank != expected:
        raise ValueError(
            f"MPI's rank is {rank}, torch's would be {expected} (node {_node(options)}, local rank "
            f"{local} of {options.nproc_per_node}): TensorRT-LLM would build the wrong shard here"
        )


def _prepare_rank() -> None:
    die_with_parent()
    # A request to stop that comes before the rank listens is lost, not deadly; it is repeated.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _signal(ranks: list[subprocess.Popen], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def _wait(ranks: list[subprocess.Popen], exit_file: Path | None, starter: int | None) -> int:
    """Wait for all ranks; after the first failure the others are ended.

    With MPI they end with ``starter``, too: mpirun gives its children process groups of their own,
    and forks them from threads that end, so that `die_with_parent` would not do.
    """
    first, deadline, kills = 0, None, [signal.SIGTERM, signal.SIGKILL]
    elsewhere = _Elsewhere(exit_file)
    while any(rank.poll() is None for rank in ranks):
        failed = [rank.returncode for rank in ranks if rank.poll() is not None and rank.returncode]
        status = exit_status(failed[0]) if failed else elsewhere.status()
        if starter is not None and os.getppid() != starter:
            _signal(ranks, signal.SIGKILL)
        # Only the first failure counts: ranks that fail of it have other codes, or 137.
        if status and deadline is None:
            first, deadline = status, time.monotonic() + _grace(status)
            _record(first, exit_file)
        if deadline is not None and time.monotonic() > deadline and kills:
            # SIGTERM first: members save on it. SIGKILL for those that hang in a collective whose
            # partner is gone.
            _signal(ranks, kills.pop(0))
            deadline = time.monotonic() + _GRACE_S
        time.sleep(_POLL_S)
    if not first:  # the last ones to end may have been the only ones to fail
        first = next((exit_status(r.returncode) for r in ranks if r.returncode), 0)
        _record(first, exit_file)
    return first


class _Elsewhere:
    """How the first rank ended that failed under another starter, if one did.

    Looks once a second: the file may be on a shared file system.
    """

    def __init__(self, exit_file: Path | None) -> None:
        self._file, self._next = exit_file, 0.0

    def status(self) -> int:
        """Its exit status, 0 as long as all is well."""
        if self._file is None or time.monotonic() < self._next:
            return 0
        self._next = time.monotonic() + _LOOK_S
        with contextlib.suppress(FileNotFoundError, ValueError):  # ValueError: not yet written
            return int(self._file.read_text())
        return 0


def _record(status: int, exit_file: Path | None) -> None:
    """Whoever fails first, on any node, makes the file."""
    if status and exit_file is not None:
        with contextlib.suppress(FileExistsError), exit_file.open("x") as stream:
            stream.write(str(status))


def _grace(status: int) -> float:
    """Ranks that agreed on an exit code follow by themselves; after a crash they would hang."""
    return _GRACE_S if 1 < status < 128 else 2.0


if __name__ == "__main__":
    sys.exit(main())
