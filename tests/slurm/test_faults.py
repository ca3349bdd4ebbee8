"""What can go wrong under Slurm, on a real one, with the fault-injection program as stages.

The scenarios run side by side, since most of their time is waiting; each has its own recipe.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from sandbox import member_of
from slurm_sandbox import SlurmSandbox

SLOW = {"FAKE_STEP_S": "0.5"}


def member_killed(make) -> None:
    sandbox = make("killed")
    sandbox.fault("iteration_01/member_01", "kill@2")
    sandbox.submit()
    sandbox.wait_until_done()
    first = sandbox.ending("iteration_01/member_01", 0)
    assert first["exit_code"] == 137
    second = sandbox.attempt("iteration_01/member_01", 1)
    assert second["step"] == 2, "resumed from its checkpoint"
    assert second["slurm"]["SLURM_RESTART_COUNT"] == "1", "the same job, requeued"
    assert sandbox.attempts("iteration_01/member_01") == 2
    assert sandbox.attempts("iteration_01/member_02") == 1
    assert sandbox.attempts("iteration_01/merge") == 1


def supervisor_killed(make) -> None:
    """The batch script itself is gone: the job fails, the next driver submits it again."""
    sandbox = make("supervisor")
    sandbox.fault("iteration_01/member_02", "kill-supervisor@2")
    sandbox.submit()
    sandbox.wait_until_done()
    assert sandbox.attempts("iteration_01/member_02") == 2
    assert sandbox.attempts("iteration_01/member_01") == 1
    assert sandbox.attempt("iteration_01/member_02", 1)["step"] == 2


def time_limit(make) -> None:
    """Slurm signals 35 to 65 s after the start: up to a minute before the margin, never at once."""
    sandbox = make(
        "limit",
        member={
            "run": {"total_steps": 270, "save_interval": 270},
            "trainer": {"devices": 1, "accelerator": "cpu"},
            "model": {"tensor_model_parallel_size": 1},
        },
        resources={"member": {"time": "00:02:00"}, "driver": {"memory": None}},
        cluster_changes={"signal_margin_s": 55, "environment": SLOW},
        members=1,
        patience_s=400.0,
    )
    sandbox.submit()
    sandbox.wait_until_done()
    tries = sandbox.attempts("iteration_01/member_01")
    assert tries > 2, "135 s of steps do not fit before two signals"
    for number in range(tries - 1):
        ending = sandbox.ending("iteration_01/member_01", number)
        assert ending["exit_code"] == 85
        assert "SIGUSR1" in ending["reason"]
        assert not ending["asked"]
    steps = [sandbox.attempt("iteration_01/member_01", i)["step"] for i in range(tries)]
    assert steps == sorted(set(steps)), "every attempt went on where the last one saved"


def requeued_by_hand(make) -> None:
    sandbox = make("requeue", member=member_of(50))
    sandbox.hold()
    sandbox.submit()
    sandbox.wait_until_running("iteration_01/member_01")
    sandbox.wait_until_running("iteration_01/member_02")
    job = next(j for j in sandbox.jobs() if "member" in j and j.split()[1].endswith("_1"))
    sandbox.cluster.command("scontrol", "requeue", job.split()[1])
    sandbox.wait_until_attempt("iteration_01/member_01", 2)
    sandbox.release()
    sandbox.wait_until_done()
    assert sandbox.attempts("iteration_01/member_01") == 2
    assert sandbox.attempts("iteration_01/member_02") == 1, "its sibling was left alone"


def reward_server_killed(make) -> None:
    reward = {"weight": 1.0, "callable": "nemo_warp.rewards.library:vader_compound"}
    sandbox = make("reward", rewards={"vader": reward}, members=1, evaluation=EVALUATION)
    retries = {"without_progress": 2, "stop_grace_s": 60, "ready_deadline_s": 120}
    sandbox.save(member=member_of(60), retries=retries)
    sandbox.hold()
    sandbox.submit()
    sandbox.wait_until_running("iteration_01/member_01")
    attempt = sandbox.run_directory / "iteration_01/member_01/attempts/001"
    endpoint = json.loads((attempt / "endpoint_vader.json").read_text())
    os.kill(endpoint["pid"], signal.SIGKILL)
    sandbox.wait_for((attempt / "exit.json").exists, "the attempt to end")
    sandbox.release()
    ending = sandbox.ending("iteration_01/member_01", 0)
    assert "reward-vader ended with exit code 137" in ending["reason"]
    assert ending["exit_code"] == 137, "the true exit code of the first step to die"
    saved = sorted((attempt.parents[1] / "checkpoints").iterdir())
    assert saved, "the member saved before it ended"
    sandbox.wait_until_done()
    assert sandbox.attempt("iteration_01/member_01", 1)["step"] == int(saved[-1].name[5:])


def merge_killed(make) -> None:
    sandbox = make("merge")
    sandbox.fault("iteration_01/merge", "kill", "kill-supervisor")
    sandbox.save(retries={"without_progress": 3, "stop_grace_s": 20, "ready_deadline_s": 20})
    sandbox.submit()
    sandbox.wait_until_done()
    assert sandbox.attempts("iteration_01/merge") == 3
    assert not (sandbox.run_directory / "iteration_01/merge/building").exists()
    assert sandbox.attempts("iteration_01/member_01") == 1


def driver_cancelled(make) -> None:
    sandbox = make("driver", iterations=2, member=member_of(30))
    sandbox.hold()
    sandbox.submit()

    def pending_driver() -> str | None:
        drivers = [j.split()[1] for j in sandbox.jobs() if "-driver" in j]
        return drivers[0] if drivers else None

    sandbox.cluster.command("scancel", sandbox.wait_for(pending_driver, "the next driver"))
    sandbox.release()
    sandbox.wait_until_queue_is_empty()
    assert (sandbox.run_directory / "iteration_01/merge/completion.json").exists()
    assert not (sandbox.run_directory / "iteration_02").exists()
    sandbox.submit()
    sandbox.wait_until_done()
    assert all(sandbox.attempts(f"iteration_0{i}/member_0{m}") == 1 for i in (1, 2) for m in (1, 2))


def submitted_twice(make) -> None:
    sandbox = make("twice")
    threads = [threading.Thread(target=sandbox.submit) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sandbox.wait_until_done()
    sandbox.wait_until_queue_is_empty()
    logs = [log.name for log in (sandbox.run_directory / "slurm").iterdir()]
    assert sum("-member." in name for name in logs) == 2, logs
    assert sum("-merge." in name for name in logs) == 1, logs
    assert sandbox.attempts("iteration_01/member_01") == 1


def failing_for_good(make) -> None:
    sandbox = make("good")
    sandbox.fault("iteration_01/member_01", "exit-2@2")
    sandbox.submit()
    sandbox.wait_for(lambda: sandbox.attempts("iteration_01/member_02"), "the members")
    sandbox.wait_until_queue_is_empty()
    state = sandbox.state()
    assert state["exit_code"] == 1
    assert "resume" in state["next"]
    failed = sandbox.stage("iteration_01/member_01")
    assert failed["status"] == "failed"
    assert "made to exit with exit-2" in failed["reason"]
    assert sandbox.attempts("iteration_01/member_01") == 1, "not tried again"
    assert not (sandbox.run_directory / "iteration_01/merge").exists(), "M - 1 are not merged"
    (sandbox.run_directory / "faults" / "iteration_01.member_01").unlink()
    code, output = sandbox.call("resume")
    assert code == 75, output
    assert "--array=1 " in output, "only the missing member"
    sandbox.wait_until_done()
    assert sandbox.attempts("iteration_01/member_02") == 1


def config_edited(make) -> None:
    """Whatever of the old recipe is done or at work by then: the refusal names the key."""
    sandbox = make("edited", iterations=2, merge={"eta": 0.3})
    sandbox.hold()
    sandbox.submit()
    sandbox.wait_until_running("iteration_01/member_01")
    sandbox.save(merge={"eta": 0.5})
    sandbox.release()
    sandbox.wait_until_queue_is_empty()
    log = next(iter((sandbox.run_directory / "slurm").glob("*-driver.*"))).read_text()
    assert "error: " in log
    assert "merge.eta (0.3 -> 0.5)" in log
    assert not (sandbox.run_directory / "iteration_02").exists(), "nothing was submitted"
    sandbox.save(merge={"eta": 0.3})
    sandbox.submit()
    sandbox.wait_until_done()


def stopped(make) -> None:
    sandbox = make("stopped", member=member_of(40))
    sandbox.hold()
    sandbox.submit()
    sandbox.wait_until_running("iteration_01/member_01")
    code, output = sandbox.call("stop", "--wait", "120")
    assert code == 0, output
    sandbox.wait_until_queue_is_empty()
    ending = sandbox.ending("iteration_01/member_01", 0)
    assert (ending["exit_code"], ending["asked"]) == (85, True)
    assert sandbox.state()["exit_code"] == 85, "what a stop cancels is no failure"
    sandbox.release()
    assert sandbox.call("resume")[0] == 75
    sandbox.wait_until_done()
    assert sandbox.attempts("iteration_01/member_01") == 2


def never_begins(make) -> None:
    """Jobs that die before they can make an attempt do not go round for ever."""
    sandbox = make("broken")
    python = sandbox.directory / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *pipeline.task*) exit 127 ;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    sandbox.save(cluster_overrides={"python": str(python)})
    sandbox.submit()
    sandbox.wait_for(lambda: "rounds in which no stage began" in sandbox.history(), "the driver")
    sandbox.wait_until_queue_is_empty()
    code, output = sandbox.call("run")  # as cron does, every ten minutes
    assert code == 1
    assert "rounds in which no stage began" in output
    assert sandbox.jobs() == []


EVALUATION = {"etas": [0.0, 1.0], "settings": {"towards_sft": False}}


SCENARIOS = [
    time_limit,
    reward_server_killed,
    config_edited,
    failing_for_good,
    member_killed,
    supervisor_killed,
    requeued_by_hand,
    merge_killed,
    driver_cancelled,
    submitted_twice,
    stopped,
    never_begins,
]


@pytest.fixture(scope="module")
def running(make_sandbox, request: pytest.FixtureRequest):
    """The scenarios that were selected, all under way."""
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    chosen = [c.params["scenario"] for c in calls if c is not None and "scenario" in c.params]
    with ThreadPoolExecutor(max(1, len(chosen))) as pool:
        yield {scenario: pool.submit(scenario, make_sandbox) for scenario in chosen}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_ends_right(running: dict[object, Future], scenario) -> None:
    running[scenario].result()


@pytest.mark.timeout(300)
def test_node_down_and_back(running: dict[object, Future], make_sandbox) -> None:
    for future in running.values():
        future.exception()  # the others are over
    from slurm_sandbox import kill_tree, parent

    sandbox: SlurmSandbox = make_sandbox(
        "node", cluster_changes={"exclusive": True}, member=member_of(80)
    )
    cluster = sandbox.cluster
    sandbox.hold()
    sandbox.submit()
    pids = {m: sandbox.wait_until_running(f"iteration_01/member_0{m}") for m in (1, 2)}
    lost = next(
        m for m in pids if sandbox.attempt(f"iteration_01/member_0{m}", -1)["hosts"] == ["node2"]
    )
    stepd = parent(pids[lost])
    cluster.stop_process("node2", signal.SIGKILL)
    kill_tree(stepd)
    # At once, instead of when SlurmdTimeout is over: that would be short on a busy machine.
    cluster.command("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=lost")
    cluster.start_node("node2")
    sandbox.release()
    sandbox.wait_until_done()
    assert sandbox.attempts(f"iteration_01/member_0{lost}") == 2
    assert sandbox.attempt(f"iteration_01/member_0{lost}", 1)["step"] > 0
    assert sandbox.attempts(f"iteration_01/member_0{3 - lost}") == 1


@pytest.mark.timeout(300)
def test_controller_restarted(running: dict[object, Future], make_sandbox) -> None:
    sandbox: SlurmSandbox = make_sandbox("controller", member=member_of(50))
    sandbox.hold()
    sandbox.submit()
    for member in (1, 2):
        sandbox.wait_until_running(f"iteration_01/member_0{member}")
    time.sleep(8)  # the controller saves its state every few seconds
    sandbox.cluster.stop_process("slurmctld", signal.SIGKILL)
    time.sleep(3)
    sandbox.cluster.start_controller()
    sandbox.release()
    sandbox.wait_until_done()
    assert sandbox.attempts("iteration_01/member_01") == 1
    assert sandbox.attempts("iteration_01/member_02") == 1
