"""Steps of a task: the actor, the reward servers, the merge; as processes here or as srun steps."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from nemo_warp.pipeline.launch import environment, slurm
from nemo_warp.pipeline.ranks import die_with_parent, exit_status
from nemo_warp.ports import free_port


@dataclass(frozen=True)
class Allocation:
    """What a task may use.

    Attributes:
        hosts: node names, the one this process is on first; empty for this machine alone.
        cluster: the cluster file, for Slurm.
        gpus_per_node: of the allocation.
        job: id of the Slurm job or array task that is the allocation.
        side_by_side: stages that share this machine's processors.
    """

    python: str = sys.executable
    hosts: tuple[str, ...] = ()
    cluster: dict[str, Any] = field(default_factory=dict)
    gpus_per_node: int = 0
    job: str = ""
    side_by_side: int = 1

    @property
    def several_nodes(self) -> bool:
        """Whether servers must listen on more than the loopback address."""
        return len(self.hosts) > 1


def slurm_allocation(cluster: dict[str, Any], gpus_per_node: int, job: str) -> Allocation:
    """The allocation of the Slurm job this process runs in."""
    nodes = os.environ["SLURM_JOB_NODELIST"]
    # By scontrol, since "node[01-03,07]" has many forms. The batch host, where this runs, is the
    # first of them.
    hosts = tuple(slurm.ask(["scontrol", "show", "hostnames", nodes]).split())
    return Allocation(cluster["step_python"], hosts, cluster, gpus_per_node, job)


@dataclass(frozen=True)
class Step:
    """One program on some of the allocation's nodes.

    Attributes:
        words: its command line.
        hosts: its nodes (none on one machine).
        processes_per_node: ranks per node; 0 for a program that is not a parallel job.
        gpus: whether it uses the nodes' GPUs.
        mpi: whether MPI has to know the ranks: one task per rank then, not one per node.
        endpoint: the file a reward server writes once it is ready; None for other programs.
        exit_file: where ranks leave the exit status of the first of them to fail.
    """

    name: str
    words: tuple[str, ...]
    hosts: tuple[str, ...] = ()
    processes_per_node: int = 0
    gpus: bool = False
    mpi: bool = False
    endpoint: Path | None = None
    exit_file: Path | None = None

    def command(self, allocation: Allocation, master_port: int = 0) -> list[str]:
        """The whole command line."""
        words = [*self._ranks(allocation, master_port), *self.words]
        if allocation.hosts:
            return [*srun(self, allocation), *words]
        return ["mpirun", "-n", str(self.processes_per_node), *words] if self.mpi else words

    def environment(self, allocation: Allocation) -> dict[str, str]:
        """Of the process that is started here."""
        if allocation.hosts:
            return environment.for_srun()
        return environment.for_steps() | (_MPIRUN if self.mpi else {})

    def needs_port(self) -> bool:
        """Whether the ranks are started by several processes, which must be told where to meet."""
        # On one node ranks are forked by one process, which finds a free port by itself.
        return len(self.hosts) > 1 or self.mpi

    def _ranks(self, allocation: Allocation, master_port: int) -> list[str]:
        if not self.processes_per_node:
            return []
        words = [allocation.python, "-m", "nemo_warp.pipeline.ranks"]
        words += [f"--nproc-per-node={self.processes_per_node}"]
        words += [f"--exit-file={self.exit_file}"] if self.exit_file else []
        words += [f"--side-by-side={n}"] if (n := allocation.side_by_side) > 1 else []
        words += ["--mpi"] if self.mpi else []
        if len(self.hosts) > 1:
            words += [f"--nodes={len(self.hosts)}", f"--master-address={self._master(allocation)}"]
        words += [f"--master-port={master_port}"] if self.needs_port() else []
        return [*words, "--"]

    def _master(self, allocation: Allocation) -> str:
        """The node of rank 0; the batch host knows a name of its own that others resolve."""
        here = self.hosts[0] == allocation.hosts[0]
        return socket.gethostname() if here and allocation.job else self.hosts[0]


_MPIRUN = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",  # containers' user
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_plm": "isolated",  # this machine only: no ssh, nor a Slurm we happen to be in
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_orte_abort_on_non_zero_status": "0",  # `ranks` ends the others, after a while
}
"""Open MPI's mpirun, made as transparent as ``srun``."""


def srun(step: Step, allocation: Allocation) -> list[str]:
    """``srun`` and its options: every step names its job, its nodes and its number of tasks.

    Otherwise a step inherits the job's (two servers on one node, fighting for a port).
    """
    cluster, nodes = allocation.cluster, len(step.hosts)
    container = cluster["container"]
    gpus = allocation.gpus_per_node if step.gpus else 0
    tasks = step.processes_per_node if step.mpi else 1
    words = ["srun", f"--nodes={nodes}", f"--ntasks={nodes * tasks}", f"--ntasks-per-node={tasks}"]
    # --overlap: a step may share nodes and processors with the steps beside it (actor and reward
    # server); without it the second srun waits until the first is over. --cpu-bind=none: Slurm
    # would bind each step's single task, and all ranks below it, to one core.
    words += [f"--nodelist={','.join(step.hosts)}", "--overlap", "--cpu-bind=none"]
    if step.mpi:
        # Ranks that end one after the other must not take the rest along: `ranks` sees to it.
        words += [f"--mpi={cluster['mpi']}", "--distribution=block", "--overcommit"]
        words += ["--kill-on-bad-exit=0", "--wait=0"]
    else:
        # One task per node, and their ranks are started by `ranks`: a node that is lost ends the
        # step.
        words += ["--mpi=none", "--kill-on-bad-exit=1"]
    words += [f"--job-name={step.name}"]
    words += gpu_options(cluster, gpus) if allocation.gpus_per_node else []
    if container["image"]:
        words += [f"--container-image={container['image']}"]
        mounts = ",".join(container["mounts"])
        words += [f"--container-mounts={mounts}"] if mounts else []
        words += [f"--container-workdir={checkout()}", *container["options"]]
    return [*words, *cluster["srun"]]


def gpu_options(cluster: dict[str, Any], gpus: int) -> list[str]:
    """How this cluster wants to be asked for ``gpus`` GPUs per node.

    ``--gres=none`` contradicts SLURM_GPUS_PER_NODE, which a job has that asked for its GPUs by
    ``--gpus-per-node``: steps are started without it (`environment.for_srun`).
    """
    if not gpus:
        return ["--gres=none"]
    number = f"{cluster['gpu_type']}:{gpus}" if cluster["gpu_type"] else str(gpus)
    is_gres = cluster["gpu_option"] == "--gres"
    return [f"--gres=gpu:{number}" if is_gres else f"{cluster['gpu_option']}={number}"]


_NO_PROGRAM = (errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.ENOEXEC, errno.ELOOP)
"""What another attempt meets again; memory, processes and disks may be there next time."""


def checkout() -> Path:
    """The directory this package runs from: where steps start, so that they run the same code."""
    import nemo_warp

    return Path(nemo_warp.__file__).resolve().parent.parent


class RunningStep:
    """A step that was started; its output goes to a file of its own.

    Args:
        lock: descriptor of the stage's lock: as long as any process of the step lives, nobody
            else can start on the stage.

    Raises:
        ValueError: there is no such program, or it is none.
        OSError: this machine could not start it now.
    """

    def __init__(self, step: Step, allocation: Allocation, log: Path, lock: int) -> None:
        port = free_port() if step.needs_port() else 0
        self.name = step.name
        self.command = step.command(allocation, port)
        self._exit_file = step.exit_file
        with log.open("ab") as output:
            self._process = self._start(step.environment(allocation), output, lock)

    def _start(self, env: dict[str, str], output: IO[bytes], lock: int) -> subprocess.Popen:
        try:
            return subprocess.Popen(
                self.command,
                cwd=checkout(),
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock,),
                # If this process is killed with SIGKILL, the kernel tells the step
                # (PR_SET_PDEATHSIG): a server or a rank must not outlive the attempt and hold its
                # GPUs.
                preexec_fn=lambda: die_with_parent(signal.SIGTERM),
            )
        except OSError as error:
            if error.errno not in _NO_PROGRAM:
                raise
            raise ValueError(str(error)) from error

    @property
    def exit_code(self) -> int | None:
        """Exit status (128 + n for a signal) of the first rank to fail, None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        if code and self._exit_file is not None and self._exit_file.exists():
            return int(self._exit_file.read_text() or exit_status(code))
        return exit_status(code)

    def send(self, number: int) -> None:
        """Send a signal to the step's own process, which passes it on."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """End every process of the step at once."""
        try:
            # The process group: ranks and their data loaders are children of the step's process.
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self._process.wait()


def stop_all(steps: Sequence[RunningStep], grace_s: float, sleep: Any) -> None:
    """SIGTERM to all, SIGKILL to what is left after ``grace_s`` seconds."""
    for step in steps:
        step.send(signal.SIGTERM)
    for _ in range(int(grace_s / 0.1)):
        if all(step.exit_code is not None for step in steps):
            break
        sleep(0.1)
    for step in steps:
        step.kill()
