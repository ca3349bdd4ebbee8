"""Steps of a task: the actor, the reward servers, the merge; as processes here or as srun steps."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_warp.pipeline.ranks import die_with_parent, exit_status, free_port


@dataclass(frozen=True)
class Allocation:
    """What a task may use.

    Attributes:
        hosts: node names, the one this process is on first; empty for this machine alone.
        cluster: the cluster file, for Slurm.
        gpus_per_node: of the allocation.
    """

    python: str = sys.executable
    hosts: tuple[str, ...] = ()
    cluster: dict[str, Any] = field(default_factory=dict)
    gpus_per_node: int = 0

    @property
    def several_nodes(self) -> bool:
        """Whether servers must listen on more than the loopback address."""
        return len(self.hosts) > 1


def slurm_allocation(cluster: dict[str, Any], gpus_per_node: int) -> Allocation:
    """The allocation of the Slurm job this process runs in."""
    nodes = os.environ["SLURM_JOB_NODELIST"]
    show = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
    )
    return Allocation(cluster["step_python"], tuple(show.stdout.split()), cluster, gpus_per_node)


@dataclass(frozen=True)
class Step:
    """One program on some of the allocation's nodes.

    Attributes:
        words: its command line.
        hosts: its nodes (none on one machine).
        processes_per_node: ranks per node; 0 for a program that is not a parallel job.
        gpus: whether it uses the nodes' GPUs.
        endpoint: the file a reward server writes once it is ready; None for other programs.
        exit_file: where ranks leave the exit status of the first of them to fail.
    """

    name: str
    words: tuple[str, ...]
    hosts: tuple[str, ...] = ()
    processes_per_node: int = 0
    gpus: bool = False
    endpoint: Path | None = None
    exit_file: Path | None = None

    def command(self, allocation: Allocation, master_port: int = 0) -> list[str]:
        """The whole command line."""
        words = [*self._ranks(allocation, master_port), *self.words]
        return [*srun(self, allocation), *words] if allocation.hosts else words

    def _ranks(self, allocation: Allocation, master_port: int) -> list[str]:
        if not self.processes_per_node:
            return []
        words = [allocation.python, "-m", "nemo_warp.pipeline.ranks"]
        words += [f"--nproc-per-node={self.processes_per_node}"]
        words += [f"--exit-file={self.exit_file}"] if self.exit_file else []
        if len(self.hosts) > 1:
            words += [f"--nodes={len(self.hosts)}", f"--master-address={self._master(allocation)}"]
            words += [f"--master-port={master_port}"]
        return [*words, "--"]

    def _master(self, allocation: Allocation) -> str:
        """The node of rank 0; the batch host knows a name of its own that others resolve."""
        here = self.hosts[0] == allocation.hosts[0]
        return socket.gethostname() if here and "SLURM_JOB_ID" in os.environ else self.hosts[0]


def srun(step: Step, allocation: Allocation) -> list[str]:
    """``srun`` and its options: every step names its nodes and its number of tasks.

    Otherwise a step inherits the job's (two servers on one node, fighting for a port).
    """
    cluster, nodes = allocation.cluster, len(step.hosts)
    container = cluster["container"]
    gpus = allocation.gpus_per_node if step.gpus else 0
    words = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    words += [f"--nodelist={','.join(step.hosts)}", "--overlap", "--cpu-bind=none"]
    words += ["--kill-on-bad-exit=1", f"--job-name={step.name}"]
    words += gpu_options(cluster, gpus) if allocation.gpus_per_node else []
    if container["image"]:
        words += [f"--container-image={container['image']}"]
        mounts = ",".join(container["mounts"])
        words += [f"--container-mounts={mounts}"] if mounts else []
        words += [f"--container-workdir={checkout()}", *container["options"]]
    return [*words, *cluster["srun"]]


def gpu_options(cluster: dict[str, Any], gpus: int) -> list[str]:
    """How this cluster wants to be asked for ``gpus`` GPUs per node."""
    if not gpus:
        return ["--gres=none"]
    is_gres = cluster["gpu_option"] == "--gres"
    return [f"--gres=gpu:{gpus}" if is_gres else f"{cluster['gpu_option']}={gpus}"]


def checkout() -> Path:
    """The directory this package runs from: where steps start, so that they run the same code."""
    import nemo_warp

    return Path(nemo_warp.__file__).resolve().parent.parent


class RunningStep:
    """A step that was started; its output goes to a file of its own.

    Args:
        lock: descriptor of the stage's lock: as long as any process of the step lives, nobody
            else can start on the stage.
    """

    def __init__(self, step: Step, allocation: Allocation, log: Path, lock: int) -> None:
        port = free_port() if len(step.hosts) > 1 else 0
        self.name = step.name
        self.command = step.command(allocation, port)
        self._exit_file = step.exit_file
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                self.command,
                cwd=checkout(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock,),
                preexec_fn=lambda: die_with_parent(signal.SIGTERM),
            )

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
