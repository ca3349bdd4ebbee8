"""The local driver from start to end, and what it does when something dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import pytest
from sandbox import Sandbox

from nemo_warp import exit_codes

MEMBERS = [f"iteration_0{i}/member_0{m}" for i in (1, 2) for m in (1, 2)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    """A run that nothing went wrong in: what every other must be equal to."""
    sandbox = Sandbox(tmp_path_factory.mktemp("finished"))
    code, output = sandbox.call()
    assert code == exit_codes.DONE, output
    return sandbox


def test_a_run_ends_with_everything(finished: Sandbox) -> None:
    code, output = finished.call("status", "--json")
    state = json.loads(output)
    assert code == exit_codes.DONE
    assert state["counts"]["done"] == len(state["stages"]) == 11
    assert state["next"].startswith("nothing, it is done")
    assert all(finished.attempts(stage["name"]) == 1 for stage in state["stages"])
    member = state["stages"][0]
    assert (member["step"], member["total"], member["reward"]) == (4, 4, 1.0)


def test_a_second_run_says_that_it_is_done(finished: Sandbox) -> None:
    before = finished.artifacts()
    code, output = finished.call()
    assert code == exit_codes.DONE
    assert "11 of 11 stages done" in output
    assert "fake is done." in output
    assert finished.artifacts() == before
    assert finished.attempts("iteration_01/merge") == 1


def test_only_what_depends_on_a_removed_member_is_made_again(
    finished: Sandbox, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("copy")
    sandbox = Sandbox(directory)
    shutil.copytree(finished.run_directory, sandbox.run_directory)
    for name in ("inputs.json", "recipe.yaml"):  # they hold the copied recipe's own paths
        (sandbox.run_directory / name).unlink()
    assert sandbox.call()[0] == exit_codes.DONE
    shutil.rmtree(sandbox.run_directory / "iteration_02/member_01")
    code, output = sandbox.call()
    assert code == exit_codes.DONE, output
    assert sandbox.attempts("iteration_02/member_01") == 1
    assert sandbox.attempts("iteration_02/merge") == 1, "same policies: the merge stands"
    shutil.rmtree(sandbox.run_directory / "iteration_01/member_02")
    (sandbox.run_directory / "faults").mkdir()
    os.environ["FAKE_SALT"] = "another machine"
    try:
        code, output = sandbox.call()
    finally:
        del os.environ["FAKE_SALT"]
    assert code == exit_codes.DONE, output
    superseded = sorted(p.name[4:] for p in (sandbox.run_directory / "superseded").iterdir())
    assert "iteration_01.member_01" not in superseded, "its sibling does not depend on it"
    assert superseded == [
        "final", "front", "iteration_01.evaluation", "iteration_01.merge",
        "iteration_02.evaluation", "iteration_02.member_01", "iteration_02.member_02",
        "iteration_02.merge", "report",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "fault", ["kill@2", "exit-1@3", "silent@3", "kill-supervisor@2", "exit-86@2"]
)
def test_a_member_that_dies_goes_on_from_its_checkpoint(
    finished: Sandbox, sandbox: Sandbox, fault: str
) -> None:
    sandbox.fault("iteration_01/member_01", fault)
    code, output = sandbox.call()
    assert code == exit_codes.DONE, output
    assert sandbox.artifacts() == finished.artifacts()
    second = sandbox.run_directory / "iteration_01/member_01/attempts/002/attempt.json"
    assert json.loads(second.read_text())["step"] == 2
    assert sandbox.attempts("iteration_01/member_02") == 1


def test_a_merge_that_dies_leaves_nothing_half_built(finished: Sandbox, sandbox: Sandbox) -> None:
    sandbox.fault("iteration_01/merge", "kill", "none")
    assert sandbox.call()[0] == exit_codes.DONE
    assert sandbox.artifacts() == finished.artifacts()
    assert not (sandbox.run_directory / "iteration_01/merge/building").exists()


def test_points_that_were_measured_are_kept(finished: Sandbox, sandbox: Sandbox) -> None:
    sandbox.fault("front", "kill@1")
    assert sandbox.call()[0] == exit_codes.DONE
    assert sandbox.artifacts() == finished.artifacts()


def test_failing_for_good_is_told_and_resume_goes_on(finished: Sandbox, sandbox: Sandbox) -> None:
    sandbox.fault("iteration_01/member_02", "exit-87@2")
    code, output = sandbox.call()
    assert code == exit_codes.FAILED
    assert "nemo-warp resume" in output
    code, output = sandbox.call("status")
    assert code == exit_codes.FAILED
    assert "made to exit with exit-87" in output
    assert "blocked by iteration_01/member_02" in output
    assert sandbox.attempts("iteration_01/member_02") == 1
    assert sandbox.call()[0] == exit_codes.FAILED, "run does not forgive"
    code, output = sandbox.call("resume")
    assert code == exit_codes.DONE, output
    assert sandbox.attempts("iteration_01/member_01") == 1
    assert sandbox.artifacts() == finished.artifacts()


def test_attempts_without_progress_are_capped(sandbox: Sandbox) -> None:
    sandbox.fault("iteration_01/member_01", *["exit-1@2"] * 9)
    code, _ = sandbox.call()
    assert code == exit_codes.FAILED
    assert sandbox.attempts("iteration_01/member_01") == 3, "one from step 0, two from step 2"
    code, output = sandbox.call("status")
    assert "2 attempts without progress at step 2" in output


def test_a_task_that_cannot_begin_is_not_repeated(sandbox: Sandbox) -> None:
    assert sandbox.call("run", "commands.member=[/no/such/program]")[0] == exit_codes.FAILED
    _, output = sandbox.call("status", "commands.member=[/no/such/program]")
    assert "/no/such/program" in output


def test_stop_saves_and_resume_goes_on(finished: Sandbox, sandbox: Sandbox) -> None:
    driver = sandbox.start("run", FAKE_STEP_S="0.7")
    metrics = sandbox.run_directory / "iteration_01/member_01/metrics.jsonl"
    _wait(metrics.exists)
    code, output = sandbox.call("stop", "--wait", "60")
    assert code == exit_codes.DONE, output
    assert driver.wait(60) == exit_codes.STOPPED_RESUMABLE
    driver.communicate()
    assert not (sandbox.run_directory / "iteration_01/merge").exists()
    code, output = sandbox.call("run")
    assert code == exit_codes.STOPPED_RESUMABLE, "run respects the stop"
    assert sandbox.call("status")[0] == exit_codes.STOPPED_RESUMABLE
    assert sandbox.call("resume")[0] == exit_codes.DONE
    assert sandbox.artifacts() == finished.artifacts()


def test_ctrl_c_saves_and_run_goes_on(finished: Sandbox, sandbox: Sandbox) -> None:
    driver = sandbox.start("run", FAKE_STEP_S="0.7")
    _wait((sandbox.run_directory / "iteration_01/member_01/metrics.jsonl").exists)
    driver.send_signal(signal.SIGINT)
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == exit_codes.STOPPED_RESUMABLE, output
    assert sandbox.call()[0] == exit_codes.DONE
    assert sandbox.artifacts() == finished.artifacts()


def test_two_drivers_do_not_meet(finished: Sandbox, sandbox: Sandbox) -> None:
    driver = sandbox.start("run", FAKE_STEP_S="0.3")
    _wait((sandbox.run_directory / "iteration_01/member_01/metrics.jsonl").exists)
    code, output = sandbox.call()
    assert code == exit_codes.IN_PROGRESS
    assert "another driver is at work" in output
    assert sandbox.call("status")[0] == exit_codes.IN_PROGRESS
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == exit_codes.DONE, output
    assert all(sandbox.attempts(name) == 1 for name in MEMBERS)
    assert sandbox.artifacts() == finished.artifacts()


def test_tasks_outlive_their_driver(finished: Sandbox, sandbox: Sandbox) -> None:
    driver = sandbox.start("run", FAKE_STEP_S="0.5")
    _wait((sandbox.run_directory / "iteration_01/member_01/metrics.jsonl").exists)
    driver.kill()
    driver.communicate()
    code, output = sandbox.call()
    assert code == exit_codes.DONE, output
    assert all(sandbox.attempts(name) == 1 for name in MEMBERS), "none was started twice"
    assert sandbox.artifacts() == finished.artifacts()


def test_twins_are_not_merged(sandbox: Sandbox) -> None:
    code, output = sandbox.call("run", FAKE_SALT="", FAKE_TWINS="1")
    assert code == exit_codes.FAILED
    assert "have the same prompt_order_hash" in output


def test_a_tampered_record_is_not_believed(sandbox: Sandbox) -> None:
    assert sandbox.call("run", "iterations=1")[0] == exit_codes.DONE
    path = sandbox.run_directory / "iteration_01/member_01/completion.json"
    record = json.loads(path.read_text())
    for change in ({"config_hash": "0" * 64}, {"details": {**record["details"], "step": 3}}):
        path.write_text(json.dumps({**record, **change}))
        code, output = sandbox.call("run", "iterations=1")
        assert code == exit_codes.FAILED
        assert "remove" in output
    path.write_text("{")
    assert sandbox.call("run", "iterations=1")[0] == exit_codes.FAILED


def test_status_needs_no_torch_and_little_time(finished: Sandbox) -> None:
    began = time.process_time()
    times = []
    for _ in range(2):
        before = os.times()
        assert finished.call("status", "--json", PYTHONPROFILEIMPORTTIME="")[0] == 0
        after = os.times()
        times.append(after.children_user - before.children_user)
    assert min(times) < 1.0, f"{min(times)} s of CPU, {time.process_time() - began} s here"


def _wait(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
