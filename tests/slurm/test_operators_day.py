"""One day of an operator on the real Slurm, and what the doctor says of the cluster before it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import pytest
from cluster import Cluster
from sandbox import ROOT, Sandbox, member_of
from slurm_sandbox import SlurmSandbox

from nemo_warp.cli import main

GOOD = "def score(prompt, response):\n    return 1.0\n"
BROKEN = 'raise RuntimeError("the lexicon is gone")\n' + GOOD


def _finished_members(sandbox: SlurmSandbox) -> dict[str, int]:
    """Policies of finished members and when they were written."""
    found = sandbox.run_directory.glob("iteration_*/member_*/completion.json")
    return {
        str(f.parent.relative_to(sandbox.run_directory)): (f.parent / "policy.nemo")
        .stat()
        .st_mtime_ns
        for f in found
    }


def _go(sandbox: SlurmSandbox, command: str) -> str:
    path = f"{sandbox.directory}{os.pathsep}{ROOT}"
    code, output = sandbox.call(command, PYTHONPATH=path)
    assert code == 75, output
    return output


def _held(sandbox: SlurmSandbox, iteration: int) -> None:
    for member in (1, 2):
        sandbox.wait_until_running(f"iteration_{iteration:02d}/member_{member:02d}")


@pytest.mark.timeout(600)
def test_an_operators_day(make_sandbox: Callable[..., SlurmSandbox]) -> None:
    """Whatever was broken, changed, cancelled and moved: the result is that of an undisturbed run.

    No finished member is trained twice.
    """
    reward = {"weight": 1.0, "callable": "reward_of_the_day:score"}
    sandbox = make_sandbox("day", iterations=2, member=member_of(6), rewards={"day": reward})
    sandbox.save(retries={"without_progress": 2, "stop_grace_s": 60, "ready_deadline_s": 120})
    module = sandbox.directory / "reward_of_the_day.py"

    module.write_text(GOOD)
    sandbox.hold()
    _go(sandbox, "run")
    _held(sandbox, 1)
    module.write_text(BROKEN)  # what runs has imported it; the next servers cannot
    sandbox.release()
    sandbox.wait_until_queue_is_empty()
    state = sandbox.state()
    assert state["exit_code"] == 1
    failed = {s["name"]: s["reason"] for s in state["stages"] if s["status"] == "failed"}
    assert set(failed) == {
        "iteration_01/evaluation", "iteration_02/member_01", "iteration_02/member_02",
    }  # fmt: skip
    assert all("the lexicon is gone" in reason for reason in failed.values()), failed
    assert all(sandbox.attempts(name) == 1 for name in failed), "for good: nobody retries it"
    done = _finished_members(sandbox)
    assert set(done) == {"iteration_01/member_01", "iteration_01/member_02"}

    module.write_text(GOOD)
    sandbox.hold()
    _go(sandbox, "resume")
    _held(sandbox, 2)
    sandbox.save(per_iteration=[{}, {"eta": 0.5}])
    _go(sandbox, "run")
    sandbox.save(iterations=3, per_iteration=[{}, {"eta": 0.5}, {}])
    _go(sandbox, "run")

    sandbox.cluster.command("scancel", *(job.split()[1] for job in sandbox.jobs()))
    sandbox.wait_until_queue_is_empty()
    assert all("was cancelled" in s["reason"] for s in sandbox.state()["stages"]
               if s["status"] == "failed")  # fmt: skip
    before = sandbox.attempts("iteration_02/member_01")
    _go(sandbox, "resume")
    sandbox.wait_until_attempt("iteration_02/member_01", before + 1)
    sandbox.wait_until_attempt("iteration_02/member_02", before + 1)

    assert sandbox.call("stop", "--wait", "120")[0] == 0
    sandbox.wait_until_queue_is_empty()
    sandbox.run_directory = sandbox.run_directory.rename(sandbox.directory / "moved")
    sandbox.save(run_directory=str(sandbox.run_directory))
    sandbox.release()
    _go(sandbox, "resume")
    sandbox.wait_until_done()
    sandbox.wait_until_queue_is_empty()

    state = sandbox.state()
    assert state["exit_code"] == 0
    finished = _finished_members(sandbox)
    assert {name: finished[name] for name in done} == done, "not trained twice"
    assert not (sandbox.run_directory / "superseded").exists(), "nothing was made in vain"
    assert sandbox.artifacts() == _undisturbed(sandbox).artifacts()


def _undisturbed(sandbox: SlurmSandbox) -> Sandbox:
    """The same on this machine alone; the members of this test ask no reward."""
    other = Sandbox(sandbox.directory / "undisturbed")
    kept = ("iterations", "member", "per_iteration", "merge")
    other.save(**{key: sandbox.values[key] for key in kept if key in sandbox.values})
    code, output = other.call()
    assert code == 0, output
    return other


@pytest.mark.timeout(180)
def test_doctor_of_a_run_directory(
    make_sandbox: Callable[..., SlurmSandbox], cluster: Cluster, capsys: pytest.CaptureFixture
) -> None:
    sandbox = make_sandbox("doctor", estimate={"parameters": 1e6})
    assert main(["doctor", "--profile", "slurm", "--run-directory", str(sandbox.recipe)]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    said = {rest: mark for mark, rest in (line for line in lines if len(line) == 2)}
    for text in ("held between two nodes", "UP", "still needed"):
        assert any(text in rest and mark == "ok" for rest, mark in said.items()), said
    for kind in ("member", "merge", "evaluation", "driver"):
        rows = [rest for rest in said if rest.startswith(f"sbatch {kind} ")]
        assert rows and said[rows[0]] == "ok", said
        assert "to start at" in rows[0]
    assert sandbox.jobs() == []
    assert not sandbox.run_directory.exists()
    assert not list(sandbox.directory.glob(".nemo-warp-doctor-*"))
    refused = {"merge": {"options": ["--partition=nowhere"]}, "driver": {"memory": "900G"}}
    sandbox.save(resources=refused, estimate={"parameters": 1e15})
    words = ["doctor", "--profile", "slurm", "--json", "--run-directory"]
    assert main([*words, str(sandbox.recipe)]) == 1
    checks = {c["name"]: c for c in json.loads(capsys.readouterr().out)["checks"]}
    missing = {name for name, check in checks.items() if check["status"] == "missing"}
    assert missing == {"space", "sbatch merge", "sbatch driver"}
    assert "Invalid partition" in checks["sbatch merge"]["found"]
