"""Steps of one allocation: the policy on some nodes, a reward model on another; GPUs and MPI."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster
from sandbox import ROOT

JOB = """
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from nemo_warp.pipeline.launch.steps import RunningStep, Step, slurm_allocation

out = Path({out!r})
cluster = dict(step_python=sys.executable, srun=[], mpi="pmix", **{gpus!r},
               container=dict(image=None, mounts=[], options=[]))
allocation = slurm_allocation(cluster, {per_node}, os.environ["SLURM_JOB_ID"])
lock = os.open(out / "lock", os.O_CREAT)

def start(name, hosts, ranks, *words, mpi=False, gpus=False):
    words = (sys.executable, {rank!r}, {out!r}, name, *words)
    step = Step(name, words, hosts, ranks, gpus, mpi, exit_file=out / f"{{name}}.exit")
    return RunningStep(step, allocation, out / f"{{name}}.log", lock)

def codes(**steps):
    while any(step.exit_code is None for step in steps.values()):
        time.sleep(0.1)
    return {{name: step.exit_code for name, step in steps.items()}}

def await_file(name):
    while not (out / name).exists():
        time.sleep(0.1)

hosts = allocation.hosts
{steps}
(out / "codes.part").write_text(json.dumps(found))
(out / "codes.part").rename(out / "codes")
"""

RANK = """
import ctypes, json, os, signal, socket, sys, time
out, name, *after = sys.argv[1:]
stopped = []
signal.signal(signal.SIGUSR1, lambda *_: stopped.append(1))

def mpi_rank():
    mpi = ctypes.CDLL("libmpi.so.40", mode=ctypes.RTLD_GLOBAL)
    mpi.MPI_Init(None, None)
    rank = ctypes.c_int()
    world = ctypes.addressof(ctypes.c_char.in_dll(mpi, "ompi_mpi_comm_world"))
    mpi.MPI_Comm_rank(ctypes.c_void_p(world), ctypes.byref(rank))
    mpi.MPI_Finalize()
    return rank.value

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:  # the ranks of all nodes meet where the environment says
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank == 0:
        with socket.create_server(("", address[1])) as listener:
            for _ in range(world - 1):
                listener.accept()
    else:
        for _ in range(100):
            try:
                socket.create_connection(address).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "SLURMD_NODENAME", "OMP_NUM_THREADS",
        "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_GPUS_PER_NODE", "SLURM_LOCALID")
found = {key: os.environ.get(key) for key in keys}
found["mpi"] = mpi_rank() if "mpi" in after else None
with open(f"{out}/{name}.{rank}.part", "w") as stream:
    json.dump(found, stream)
os.rename(f"{out}/{name}.{rank}.part", f"{out}/{name}.{rank}.json")
if "killed" in after:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)
if "signal" in after:
    while not stopped:
        time.sleep(0.05)
    if rank:  # they save one after the other; the first to end must not end the rest
        time.sleep(2)
    open(f"{out}/{name}.{rank}.saved", "w").close()
    sys.exit(85)
sys.exit(85 if name == "actor" else 0)
"""
WAYS = [
    {"gpu_option": option, "gpu_type": kind}
    for option in ("--gpus-per-node", "--gres")
    for kind in (None, "h100")
]
ASKED = ["--gpus-per-node=4", "--gpus-per-node=h100:4", "--gres=gpu:4", "--gres=gpu:h100:4"]


def submit(
    cluster: Cluster,
    out: Path,
    steps: str,
    *options: str,
    gpus: dict | None = None,
    number: int = 0,
) -> None:
    out.mkdir(exist_ok=True)
    (out / "rank.py").write_text(RANK)
    values = {"root": str(ROOT), "out": str(out), "rank": str(out / "rank.py"), "steps": steps}
    values |= {"gpus": gpus or WAYS[0], "per_node": number}
    (out / "job.py").write_text(JOB.format(**values))
    cluster.command(
        "sbatch", "--ntasks-per-node=1", f"--output={out}/job.txt", *options,
        f"--wrap=exec {sys.executable} {out}/job.py", cwd=ROOT,
    )  # fmt: skip


def ended(out: Path) -> tuple[dict[str, int], dict[str, dict]]:
    """The steps' exit codes, and what their ranks saw."""
    deadline = time.monotonic() + 150
    while not (out / "codes").exists():
        assert time.monotonic() < deadline, _texts(out)
        time.sleep(0.2)
    seen = {p.stem: json.loads(p.read_text()) for p in sorted(out.glob("*.json"))}
    return json.loads((out / "codes").read_text()), seen


def _texts(out: Path) -> str:
    return "\n".join(
        f"--- {p.name}\n{p.read_text()}" for p in (*out.glob("*.txt"), *out.glob("*.log"))
    )


@pytest.mark.timeout(180)
def test_nodes_are_split_and_ranks_meet(cluster, tmp_path: Path) -> None:
    steps = (
        "found = codes(actor=start('actor', hosts[:2], 2), reward=start('reward', hosts[2:], 1))"
    )
    submit(cluster, tmp_path, steps, "--nodes=3")
    codes, found = ended(tmp_path)
    assert codes == {"actor": 85, "reward": 0}, "the ranks' own exit code"
    nodes = {name: entry["SLURMD_NODENAME"] for name, entry in found.items()}
    assert nodes == {
        "actor.0": "node1", "actor.1": "node1", "actor.2": "node2", "actor.3": "node2",
        "reward.0": "node3",
    }  # fmt: skip
    assert [found[f"actor.{r}"]["LOCAL_RANK"] for r in range(4)] == ["0", "1", "0", "1"]
    assert {entry["WORLD_SIZE"] for name, entry in found.items() if "actor" in name} == {"4"}
    assert {entry["OMP_NUM_THREADS"] for entry in found.values()} == {"1"}, "one CPU was allocated"


@pytest.mark.timeout(180)
def test_steps_get_the_gpus_they_ask_for(cluster, tmp_path: Path) -> None:
    """However the site wants to be asked; callables and merges in the same job get none."""
    steps = (
        "member = start('member', hosts, 1, gpus=True)\n"
        "reward = start('reward', hosts, 0)\n"
        "found = codes(member=member, reward=reward) | {'command': member.command}"
    )
    for way, asked in zip(WAYS, ASKED, strict=True):
        submit(cluster, tmp_path / asked, steps, "--nodes=1", asked, gpus=way, number=4)
    for asked in ASKED:
        codes, seen = ended(tmp_path / asked)
        assert asked in codes.pop("command")
        assert codes == {"member": 0, "reward": 0}, _texts(tmp_path / asked)
        assert len(seen["member.0"]["CUDA_VISIBLE_DEVICES"].split(",")) == 4
        assert not seen["reward.0"]["CUDA_VISIBLE_DEVICES"]
        assert seen["reward.0"]["RANK"] is None
        assert seen["reward.0"]["SLURM_JOB_ID"], "a program may want to say where it ran"


@pytest.mark.timeout(180)
@pytest.mark.skipif(not Path("/usr/lib/x86_64-linux-gnu/pmix2/lib/libpmix.so").exists(),
                    reason="apt-get install libpmix-dev (Slurm's plugin loads it)")  # fmt: skip
def test_a_task_per_rank_and_mpi_knows_them(cluster, tmp_path: Path) -> None:
    """Signals, exit codes, and the same rank for MPI as for torch."""
    mpi = "'mpi', " if shutil.which("mpirun") else ""  # MPI_Comm_rank needs Open MPI
    steps = (
        f"saved = start('saved', hosts, 2, {mpi}'signal', mpi=True)\n"
        "killed = start('killed', hosts, 2, 'killed', mpi=True)\n"
        "plain = start('plain', hosts, 2, mpi=True)\n"
        "for rank in range(4): await_file(f'saved.{rank}.json')\n"
        "saved.send(signal.SIGUSR1)\n"
        "found = codes(saved=saved, killed=killed, plain=plain)"
    )
    submit(cluster, tmp_path, steps, "--nodes=2", "--gpus-per-node=2", number=2)
    codes, seen = ended(tmp_path)
    assert codes == {"saved": 85, "killed": 137, "plain": 0}, _texts(tmp_path)
    assert len(list(tmp_path.glob("saved.*.saved"))) == 4, "all had the time to save"
    for rank in range(4):
        entry = seen[f"saved.{rank}"]
        assert (entry["RANK"], entry["LOCAL_RANK"]) == (str(rank), str(rank % 2))
        assert entry["LOCAL_RANK"] == entry["SLURM_LOCALID"], "a task each"
        assert entry["GROUP_RANK"] == str(rank // 2)
        assert entry["mpi"] == (rank if mpi else None)


@pytest.mark.timeout(240)
@pytest.mark.skipif(not Path("/usr/lib/x86_64-linux-gnu/pmix2/lib/libpmix.so").exists(),
                    reason="apt-get install libpmix-dev (Slurm's plugin loads it)")  # fmt: skip
def test_a_requeued_job_has_its_tasks_again(cluster, tmp_path: Path) -> None:
    """Several tasks per node: the first attempt's are gone, the second's have the same ranks."""
    steps = (
        "import subprocess\n"
        "attempt = int(os.environ.get('SLURM_RESTART_COUNT', 0))\n"
        "words = [] if attempt else ['signal']\n"
        "step = start(f'attempt{attempt}', hosts, 2, *words, mpi=True)\n"
        "if not attempt:\n"
        "    for rank in range(4): await_file(f'attempt0.{rank}.json')\n"
        "    subprocess.run(['scontrol', 'requeue', os.environ['SLURM_JOB_ID']], check=True)\n"
        "    time.sleep(300)\n"
        "found = codes(step=step)"
    )
    submit(cluster, tmp_path, steps, "--nodes=2", "--requeue")
    codes, seen = ended(tmp_path)
    assert codes == {"step": 0}, _texts(tmp_path)
    for rank in range(4):
        first, second = seen[f"attempt0.{rank}"], seen[f"attempt1.{rank}"]
        for key in ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "SLURM_JOB_ID"):
            assert first[key] == second[key], key
    assert not _running(f"{tmp_path} attempt0"), "nothing of the first attempt is left"


def _running(words: str) -> list[str]:
    """Command lines that hold ``words``."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                command = (process / "cmdline").read_text().replace("\0", " ")
                found += [command] if words in command else []
    return found
