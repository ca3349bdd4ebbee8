"""Steps of one allocation: the policy on some nodes, a reward model on another."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from sandbox import ROOT

JOB = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from nemo_warp.pipeline.launch.steps import RunningStep, Step, slurm_allocation

out = Path({out!r})
cluster = dict(step_python=sys.executable, srun=[], gpu_option="--gpus-per-node", gpu_type=None,
               container=dict(image=None, mounts=[], options=[]))
allocation = slurm_allocation(cluster, 0, os.environ["SLURM_JOB_ID"])
rank = (sys.executable, {rank!r}, {out!r})
lock = os.open(out / "lock", os.O_CREAT)
actor = Step("actor", (*rank, "actor"), allocation.hosts[:2], 2, exit_file=out / "actor.exit")
actor = RunningStep(actor, allocation, out / "actor.log", lock)
reward = RunningStep(Step("reward", (*rank, "reward"), allocation.hosts[2:], 1), allocation,
                     out / "reward.log", lock)
while None in (actor.exit_code, reward.exit_code):
    time.sleep(0.1)
(out / "codes").write_text(f"{{actor.exit_code}} {{reward.exit_code}}")
"""

RANK = """
import json, os, socket, sys, time
out, name = sys.argv[1:]
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
if rank == 0:  # the ranks of all nodes meet where the environment says
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
keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "SLURMD_NODENAME")
with open(f"{out}/{name}.{rank}.json", "w") as stream:
    json.dump({key: os.environ[key] for key in keys}, stream)
sys.exit(85 if name == "actor" else 0)
"""


@pytest.mark.timeout(180)
def test_nodes_are_split_and_ranks_meet(cluster, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    values = {"root": str(ROOT), "out": str(tmp_path), "rank": str(tmp_path / "rank.py")}
    (tmp_path / "job.py").write_text(JOB.format(**values))
    cluster.command(
        "sbatch", "--nodes=3", "--ntasks-per-node=1", f"--output={tmp_path}/job.txt",
        f"--wrap=exec {sys.executable} {tmp_path}/job.py", cwd=ROOT,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "codes").exists():
        assert time.monotonic() < deadline, (tmp_path / "job.txt").read_text()
        time.sleep(0.2)
    assert (tmp_path / "codes").read_text() == "85 0", "the ranks' own exit code"
    found = {p.name: json.loads(p.read_text()) for p in tmp_path.glob("*.json")}
    nodes = {name: entry["SLURMD_NODENAME"] for name, entry in sorted(found.items())}
    assert nodes == {
        "actor.0.json": "node1", "actor.1.json": "node1", "actor.2.json": "node2",
        "actor.3.json": "node2", "reward.0.json": "node3",
    }  # fmt: skip
    assert [found[f"actor.{r}.json"]["LOCAL_RANK"] for r in range(4)] == ["0", "1", "0", "1"]
    assert {entry["WORLD_SIZE"] for name, entry in found.items() if "actor" in name} == {"4"}
