"""What an operator does with ``scancel``, and what a round does that is refused half-way.

The callers' shells hold variables that give orders to Slurm's commands and to parallel programs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from sandbox import member_of
from slurm_sandbox import SlurmSandbox

SHELL = {
    "SQUEUE_STATES": "RUNNING",
    "SQUEUE_PARTITION": "other",
    "SQUEUE_FORMAT": "%i",
    "SQUEUE_USERS": "nobody",
    "SBATCH_ARRAY_INX": "1-3",
    "SBATCH_PARTITION": "other",
    "SBATCH_NO_REQUEUE": "1",
    "SCANCEL_STATE": "PENDING",
    "SLURM_CLUSTERS": "elsewhere",
    "SLURM_NTASKS": "7",
    "SLURM_GPUS_PER_NODE": "3",
    "SLURM_JOB_NAME": "bash",
    "CUDA_VISIBLE_DEVICES": "5",
    "RANK": "3",
    "WORLD_SIZE": "8",
    "MASTER_ADDR": "elsewhere",
    "PMIX_RANK": "5",
}
CLUSTER = {"gpus_per_node": 2, "gpu_option": "--gres", "gpu_type": "h100"}


def _started(make: Callable, name: str, **changes) -> SlurmSandbox:
    """A run whose two members have saved and are held; started in that shell."""
    sandbox = make(name, cluster_changes=CLUSTER, member=member_of(60), **changes)
    sandbox.hold()
    code, output = sandbox.call("run", **SHELL)
    assert code == 75, output
    for member in (1, 2):
        sandbox.wait_until_running(f"iteration_01/member_0{member}")
    return sandbox


def _ids(sandbox: SlurmSandbox, kind: str = "") -> list[str]:
    return [job.split()[1] for job in sandbox.jobs() if f"-{kind}" in job.split()[0]]


def _released_after(sandbox: SlurmSandbox, attempt: int, record: str) -> None:
    """Members go on once the first one's attempt has left the record."""
    path = sandbox.run_directory / "iteration_01/member_01/attempts" / f"{attempt:03d}" / record
    sandbox.wait_for(path.exists, str(path))
    sandbox.release()


def _stays_cancelled(sandbox: SlurmSandbox, *stages: str) -> None:
    sandbox.wait_until_queue_is_empty()
    state = sandbox.state()
    assert state["exit_code"] == 1
    assert "nemo-warp resume" in state["next"]
    found = {s["name"]: s for s in state["stages"]}
    assert {n for n, s in found.items() if s["status"] == "failed"} == set(stages), found
    assert all("was cancelled" in found[name]["reason"] for name in stages)


def _finishes(sandbox: SlurmSandbox, **attempts: int) -> None:
    (sandbox.run_directory / "faults" / "hold").unlink(missing_ok=True)
    code, output = sandbox.call("resume", **SHELL)
    assert code == 75, output
    sandbox.wait_until_done()
    sandbox.wait_until_queue_is_empty()
    made = {name: sandbox.attempts(f"iteration_01/{name}") for name in attempts}
    assert made == attempts


def one_task(make: Callable) -> None:
    sandbox = _started(make, "one")
    first = next(job for job in _ids(sandbox, "member") if job.endswith("_1"))
    sandbox.cluster.command("scancel", first)
    _released_after(sandbox, 1, "exit.json")
    _stays_cancelled(sandbox, "iteration_01/member_01")
    assert sandbox.ending("iteration_01/member_01", 0)["asked"], "counts against nobody"
    assert (sandbox.run_directory / "iteration_01/member_02/completion.json").exists()
    assert not (sandbox.run_directory / "iteration_01/merge").exists()
    _finishes(sandbox, member_01=2, member_02=1, merge=1)
    assert sandbox.attempt("iteration_01/member_01", 1)["step"] > 0, "from what it had saved"


def whole_array(make: Callable) -> None:
    sandbox = _started(make, "array")
    array = _ids(sandbox, "member")[0].split("_")[0]
    sandbox.cluster.command("scancel", array)
    _stays_cancelled(sandbox, "iteration_01/member_01", "iteration_01/member_02")
    _finishes(sandbox, member_01=2, member_02=2, merge=1)


def the_merge(make: Callable) -> None:
    sandbox = _started(make, "merge-cancelled")
    sandbox.cluster.command("scancel", *_ids(sandbox, "merge"))
    sandbox.release()
    _stays_cancelled(sandbox, "iteration_01/merge")
    _finishes(sandbox, member_01=1, member_02=1, merge=1)


def the_driver(make: Callable) -> None:
    sandbox = _started(make, "driver-cancelled", iterations=2)
    sandbox.cluster.command("scancel", *_ids(sandbox, "driver"))
    sandbox.release()
    sandbox.wait_until_queue_is_empty()
    assert "no driver is at work" in sandbox.state()["next"]
    code, output = sandbox.call("run", **SHELL)
    assert code == 75, output
    sandbox.wait_until_done()
    assert sandbox.attempts("iteration_01/member_01") == 1


def everything(make: Callable) -> None:
    """All of a user's jobs, as ``scancel --user`` does: here those of this run."""
    sandbox = _started(make, "everything")
    sandbox.cluster.command("scancel", *_ids(sandbox))
    sandbox.wait_until_queue_is_empty()
    names = ("member_01", "member_02", "merge", "evaluation")
    stages = [f"iteration_01/{name}" for name in names]
    _stays_cancelled(sandbox, *stages, "front", "final", "report")
    _finishes(sandbox, member_01=2, member_02=2, merge=1, evaluation=1)


def preempted(make: Callable) -> None:
    """Slurm itself starts it again: nobody cancelled it."""
    sandbox = _started(make, "preempted")
    first = next(job for job in _ids(sandbox, "member") if job.endswith("_1"))
    sandbox.cluster.command("scontrol", "requeue", first)
    _released_after(sandbox, 2, "attempt.json")
    sandbox.wait_until_done()
    ending = sandbox.ending("iteration_01/member_01", 0)
    assert "requeued" in ending["reason"], ending
    assert not ending["asked"]
    made = [sandbox.attempts(f"iteration_01/member_0{m}") for m in (1, 2)]
    assert made == [2, 1]


def a_colleagues_plain_run(make: Callable) -> None:
    """Without launcher.kind=slurm: what is queued stays what it is, and runs where it should."""
    sandbox = _started(make, "colleague")
    before = _ids(sandbox)
    code, output = sandbox.call("run", "launcher.kind=local")
    assert code == 2, output
    assert "launcher.kind: " in output
    assert "still at work or queued" in output
    assert _ids(sandbox) == before
    sandbox.release()
    sandbox.wait_until_done()
    assert sandbox.attempt("iteration_01/merge", 0)["slurm"]["SLURM_JOB_ID"]
    sandbox.wait_until_queue_is_empty()
    assert sandbox.call("run", "launcher.kind=local")[0] == 0, "once nothing is queued"


def told_by_signal(make: Callable) -> None:
    """SIGUSR1 is ours (before the time limit): saved, requeued, done."""
    sandbox = _started(make, "told")
    first = next(job for job in _ids(sandbox, "member") if job.endswith("_1"))
    sandbox.cluster.command("scancel", "--signal=USR1", "--batch", first)
    _released_after(sandbox, 2, "attempt.json")
    sandbox.wait_until_done()
    assert sandbox.ending("iteration_01/member_01", 0)["exit_code"] == 85
    assert sandbox.attempt("iteration_01/member_01", 1)["slurm"]["SLURM_RESTART_COUNT"] == "1"


def members_that_differ(make: Callable) -> None:
    """Nodes and steps of each are its own; the merge waits for both arrays."""
    sandbox = make(
        "differ",
        iterations=2,
        cluster_changes={"gpus_per_node": 1},
        member=member_of(4),
        per_iteration=[{}, {"member": {"run": {"total_steps": 6}}}],
        per_member=[{}, {"member": {"trainer": {"num_nodes": 2}, "run": {"total_steps": 8}}}],
    )
    code, output = sandbox.call("run", **SHELL)
    assert code == 75, output
    lines = [line for line in output.splitlines() if "--array=" in line]
    assert [("--nodes=1 " in line, "--nodes=2 " in line) for line in lines] == [
        (True, False), (False, True),
    ]  # fmt: skip
    arrays = [line.split(":")[0] for line in lines]
    assert f"--dependency=afterok:{':'.join(arrays)} " in output
    sandbox.wait_until_done()
    found = {s["name"]: s["total"] for s in sandbox.state()["stages"] if s["kind"] == "member"}
    assert list(found.values()) == [4, 8, 6, 8]
    for iteration in (1, 2):
        hosts = [sandbox.attempt(f"iteration_0{iteration}/member_0{m}", 0)["hosts"] for m in (1, 2)]
        assert [len(h) for h in hosts] == [1, 2]


def driver_refused(make: Callable) -> None:
    """No node has that much memory: nothing is submitted, since nothing would follow it."""
    sandbox = make("no-driver", resources={"driver": {"memory": "900G"}})
    code, output = sandbox.call("run", **SHELL)
    assert code == 1
    assert "--mem=900G" in output
    assert "memory" in output.lower()
    assert sandbox.jobs() == []


def members_refused(make: Callable) -> None:
    """The follower that was there first has nothing to follow, and goes."""
    resources = {"driver": {"memory": None}, "member": {"options": ["--partition=nowhere"]}}
    sandbox = make("no-members", resources=resources)
    code, output = sandbox.call("run", **SHELL)
    assert code == 1
    assert "invalid partition" in output
    sandbox.wait_until_queue_is_empty()


def merge_refused(make: Callable) -> None:
    """What was taken is followed; the next round says again what is refused, and ends."""
    resources = {"driver": {"memory": None}, "merge": {"options": ["--partition=nowhere"]}}
    sandbox = make("no-merge", resources=resources)
    code, output = sandbox.call("run", **SHELL)
    assert code == 75
    assert "not submitted: sbatch" in output
    assert sorted(j.split()[0].rsplit("-", 1)[1] for j in sandbox.jobs()) == [
        "driver", "member", "member",
    ]  # fmt: skip
    sandbox.wait_until_queue_is_empty()
    assert "invalid partition" in sandbox.history()
    assert sandbox.stage("iteration_01/member_02")["status"] == "done"
    sandbox.save(resources={"driver": {"memory": None}})
    assert sandbox.call("run")[0] == 75
    sandbox.wait_until_done()


LOSES_ANSWERS = """\
#!/bin/bash
# The controller takes the job, and its answer is lost: once for each job name.
name=$(printf '%s\\n' "$@" | grep -m1 -- --job-name=)
answer=$({sbatch} "$@") || exit $?
mark={directory}/lost.${{name#--job-name=}}
[[ -e $mark ]] && {{ echo "$answer"; exit 0; }}
touch "$mark"
echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2
exit 1
"""


def answers_lost(make: Callable) -> None:
    sandbox = make("lost")
    programs = sandbox.directory / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(
        LOSES_ANSWERS.format(sbatch="/usr/bin/sbatch", directory=sandbox.directory)
    )
    (programs / "sbatch").chmod(0o755)
    code, output = sandbox.call("run", **SHELL, PATH=f"{programs}:{os.environ['PATH']}")
    assert code == 75, output
    lines = [line for line in output.splitlines() if "sbatch --parsable" in line]
    sandbox.wait_until_done()
    sandbox.wait_until_queue_is_empty()
    assert len(lines) == output.count("Socket timed out") == 7
    logs = [log.name for log in (sandbox.run_directory / "slurm").iterdir()]
    assert sum("-member." in name for name in logs) == 2, logs
    assert sum("-merge." in name for name in logs) == 1, logs


def as_documented(make: Callable) -> None:
    """conf/cluster/cpu.yaml as it is, on ``python tests/slurm/cluster.py``."""
    sandbox = make("documented", patience_s=120.0)
    sandbox.save(cluster="cpu", resources={})
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    code, output = sandbox.call("run", PATH=path)
    assert code == 75, output
    sandbox.wait_until_done()


SCENARIOS = [
    merge_refused,
    one_task,
    whole_array,
    the_merge,
    the_driver,
    everything,
    preempted,
    told_by_signal,
    a_colleagues_plain_run,
    members_that_differ,
    answers_lost,
    as_documented,
    driver_refused,
    members_refused,
]


@pytest.fixture(scope="module")
def running(make_sandbox, request: pytest.FixtureRequest):
    """The scenarios that were selected, all under way."""
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    chosen = [c.params["operator"] for c in calls if c is not None and "operator" in c.params]
    with ThreadPoolExecutor(max(1, len(chosen))) as pool:
        yield {scenario: pool.submit(scenario, make_sandbox) for scenario in chosen}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("operator", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_ends_as_meant(running: dict[object, Future], operator) -> None:
    running[operator].result()
