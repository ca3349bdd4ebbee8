"""A real Slurm on this machine: munged, slurmctld and some slurmds, all below one directory.

Also a script, to try things by hand or in CI:  python tests/slurm/cluster.py DIRECTORY [NODES]
prints the environment to use (SLURM_CONF) and runs until it is interrupted.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from nemo_warp.ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "srun")
_STARTUP_S = 60.0
_GPUS = 8
"""Of every node; emulated."""


def missing() -> str | None:
    """Why no cluster can be set up here, or None."""
    if os.geteuid() != 0:
        return "needs root (slurmctld and slurmd run as root here)"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"{', '.join(absent)} not installed: apt-get install slurmctld slurmd munge"
    return None


class Cluster:
    """The daemons; nodes are called node1, node2, ..."""

    def __init__(self, directory: Path, nodes: int = 2, cpus: int = 16) -> None:
        self.directory = directory
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.conf = directory / "slurm.conf"
        self._processes: dict[str, subprocess.Popen] = {}
        for name in ("state", "spool", "log", "run", "dev"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        for number in range(_GPUS):
            (directory / "dev" / f"nvidia{number}").symlink_to("/dev/null")
        for name in self.nodes:
            (directory / "tmp" / name).mkdir(parents=True, exist_ok=True)
        controller, *ports = [free_port("127.0.0.1") for _ in range(1 + nodes)]
        self.conf.write_text(self._configuration(controller, ports, cpus))
        # Emulated: Slurm counts them, shares them out and sets CUDA_VISIBLE_DEVICES.
        gpus = f"Name=gpu Type=h100 File={directory}/dev/nvidia[0-{_GPUS - 1}]"
        lines = [f"NodeName={name} {gpus}" for name in self.nodes]
        (directory / "gres.conf").write_text("\n".join(["AutoDetect=off", *lines, ""]))

    def _configuration(self, controller: int, ports: list[int], cpus: int) -> str:
        d, host = self.directory, socket.gethostname()
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} "
            f"RealMemory=16000 Gres=gpu:h100:{_GPUS} State=UNKNOWN"
            for name, port in zip(self.nodes, ports, strict=True)
        )
        return f"""\
ClusterName=warp
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it starts again (default 120 s)
AuthInfo=socket={d}/run/munge.socket,cred_expire=12
CredType=cred/munge
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool/%n
# the nodes share this machine's /tmp, and PMIx wants a directory per node and step there
TmpFS={d}/tmp/%n
SlurmctldPidFile={d}/run/slurmctld.pid
SlurmdPidFile={d}/run/slurmd.%n.pid
SlurmctldLogFile={d}/log/slurmctld.log
SlurmdLogFile={d}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
GresTypes=gpu
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2,max_rpc_cnt=0
JobRequeue=1
KillWait=30
KillOnBadExit=0
MessageTimeout=30
OverTimeLimit=0
MinJobAge=600
SlurmdTimeout=120
SlurmctldTimeout=30
ReturnToService=2
PropagateResourceLimits=NONE
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        self.start_munged()
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)
        self._await(lambda: self._idle() == len(self.nodes), "the nodes to be idle")

    def start_munged(self) -> None:
        run = self.directory / "run"
        key = run / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        socket_file = run / "munge.socket"
        words = ["munged", "--foreground", "--force", f"--key-file={key}"]
        words += [f"--socket={socket_file}", f"--pid-file={run}/munged.pid"]
        words += [f"--log-file={self.directory}/log/munged.log", f"--seed-file={run}/munge.seed"]
        self._spawn("munged", words)
        self._await(socket_file.exists, "munged")

    def start_controller(self) -> None:
        self._spawn("slurmctld", ["slurmctld", "-D", "-f", str(self.conf)])

    def start_node(self, node: str) -> None:
        self._spawn(node, ["slurmd", "-D", "-N", node, "-f", str(self.conf)])

    def stop_process(self, name: str, number: int = signal.SIGTERM) -> None:
        process = self._processes.pop(name)
        process.send_signal(number)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def stop(self) -> None:
        """End every job, step and daemon."""
        if "slurmctld" in self._processes:
            self.command("scancel", "--user=root", check=False)
            deadline = time.monotonic() + 15
            while time.monotonic() < deadline and self.command("squeue", "-h", check=False):
                time.sleep(0.5)
        for name in ["slurmctld", *self.nodes, "munged"]:
            if name in self._processes:
                self.stop_process(name)

    def command(self, *words: str, check: bool = True, cwd: Path | None = None) -> str:
        """Run a Slurm command against this cluster; returns what it prints."""
        result = subprocess.run(
            words,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd,
        )
        if check and result.returncode != 0:
            raise AssertionError(f"{' '.join(words)}: {result.stderr}")
        return result.stdout.strip()

    def logs(self) -> str:
        """The ends of the daemons' logs, for a failing test."""
        texts = []
        for log in sorted((self.directory / "log").iterdir()):
            texts.append(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}")
        return "\n".join(texts)

    def _idle(self) -> int:
        states = self.command("sinfo", "-h", "-N", "-o", "%T", check=False)
        return states.split().count("idle")

    def _spawn(self, name: str, words: list[str]) -> None:
        with (self.directory / "log" / f"{name}.out").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                words,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _await(self, condition, what: str) -> None:
        deadline = time.monotonic() + _STARTUP_S
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {_STARTUP_S} s for {what}\n{self.logs()}")
            time.sleep(0.1)


def main() -> int:
    cluster = Cluster(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 2)
    reason = missing()
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore SIGINT
        signal.signal(number, signal.default_int_handler)
    try:
        cluster.start()
        print(f"export SLURM_CONF={cluster.conf}", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        cluster.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
