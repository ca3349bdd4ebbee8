"""The local driver from start to end, and what it does when something dies."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time

import pytest
from sandbox import Sandbox

from nemo_warp import exit_codes
from nemo_warp.pipeline import task
from nemo_warp.pipeline.commands.view import Live
from nemo_warp.pipeline.disk import attempts
from nemo_warp.pipeline.launch import programs
from nemo_warp.pipeline.launch.local import LocalDriver, device_shares
from nemo_warp.pipeline.recipe.load import load_recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    """Two iterations in which nothing went wrong."""
    sandbox = Sandbox(tmp_path_factory.mktemp("finished"))
    code, output = sandbox.call()
    assert code == exit_codes.DONE, output
    return sandbox


@pytest.fixture
def short(sandbox: Sandbox) -> Sandbox:
    sandbox.save(iterations=1)
    return sandbox


@pytest.fixture(scope="module")
def expected(finished: Sandbox) -> dict[str, bytes]:
    """What the stages of iteration 1 publish, however often they died."""
    artifacts = finished.artifacts()
    return {name: data for name, data in artifacts.items() if name.startswith("iteration_01")}


def assert_same(sandbox: Sandbox, expected: dict[str, bytes]) -> None:
    found = sandbox.artifacts()
    assert {name: found.get(name) for name in expected} == expected


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


def test_only_what_depends_on_a_removed_member_is_made_again(tmp_path_factory) -> None:
    sandbox = Sandbox(tmp_path_factory.mktemp("removed"))
    assert sandbox.call()[0] == exit_codes.DONE
    shutil.rmtree(sandbox.run_directory / "iteration_02/member_01")
    code, output = sandbox.call()
    assert code == exit_codes.DONE, output
    assert sandbox.attempts("iteration_02/member_01") == 1
    assert sandbox.attempts("iteration_02/merge") == 1, "same policies: the merge stands"
    assert not (sandbox.run_directory / "superseded").exists()
    shutil.rmtree(sandbox.run_directory / "iteration_01/member_02")
    code, output = sandbox.call("run", FAKE_SALT="another machine")
    assert code == exit_codes.DONE, output
    superseded = sorted(p.name[4:] for p in (sandbox.run_directory / "superseded").iterdir())
    assert superseded == [  # all but its sibling
        "final", "front", "iteration_01.evaluation", "iteration_01.merge",
        "iteration_02.evaluation", "iteration_02.member_01", "iteration_02.member_02",
        "iteration_02.merge", "report",
    ]  # fmt: skip


def test_everything_dies_once(sandbox: Sandbox, finished: Sandbox) -> None:
    faults = {
        "iteration_01/member_01": "kill@2",
        "iteration_01/member_02": "exit-1@3",
        "iteration_01/merge": "kill",
        "iteration_01/evaluation": "silent@1",
        "iteration_02/member_01": "silent@3",
        "iteration_02/member_02": "kill-supervisor@2",
        "iteration_02/merge": "kill-supervisor",
        "iteration_02/evaluation": "exit-86@1",
        "front": "kill@1",
        "final": "exit-1",
    }
    for stage, fault in faults.items():
        sandbox.fault(stage, fault)
    code, output = sandbox.call()
    assert code == exit_codes.DONE, output
    assert sandbox.artifacts() == finished.artifacts()
    assert all(sandbox.attempts(stage) == 2 for stage in faults)
    for stage in ("iteration_01/member_01", "iteration_02/member_02"):
        second = sandbox.run_directory / stage / "attempts/002/attempt.json"
        assert json.loads(second.read_text())["step"] >= 2, "from its checkpoint"
    assert not list(sandbox.run_directory.rglob("building"))


def test_failing_for_good_is_told_and_resume_goes_on(
    short: Sandbox, expected: dict[str, bytes]
) -> None:
    short.fault("iteration_01/member_02", "exit-87@2")
    code, output = short.call()
    assert code == exit_codes.FAILED
    assert "nemo-warp resume" in output
    code, output = short.call("status")
    assert code == exit_codes.FAILED
    assert "made to exit with exit-87" in output
    assert "blocked by iteration_01/member_02" in output
    assert short.attempts("iteration_01/member_02") == 1
    assert short.call()[0] == exit_codes.FAILED, "run does not forgive"
    code, output = short.call("resume")
    assert code == exit_codes.DONE, output
    assert short.attempts("iteration_01/member_01") == 1
    assert_same(short, expected)


def test_attempts_without_progress_are_capped(short: Sandbox) -> None:
    short.fault("iteration_01/member_01", *["exit-1@2"] * 9)
    code, output = short.call()
    assert code == exit_codes.FAILED
    assert "2 attempts without progress at step 2" in output
    assert short.attempts("iteration_01/member_01") == 3, "one from step 0, two from step 2"


def test_a_program_that_does_not_exist(short: Sandbox) -> None:
    code, output = short.call("run", "commands.member=[/no/such/program]")
    assert code == exit_codes.FAILED
    assert "cannot be started: [Errno 2] No such file or directory: '/no/such/program'" in output


def test_stop_saves_and_resume_goes_on(short: Sandbox, expected: dict[str, bytes]) -> None:
    short.hold()
    driver = short.start("run")
    _wait(lambda: short.has_saved("iteration_01/member_01"))
    code, output = short.call("stop", "--wait", "60")
    assert code == exit_codes.DONE, output
    driver.communicate(timeout=120)
    assert driver.returncode == exit_codes.STOPPED_RESUMABLE
    assert not (short.run_directory / "iteration_01/merge").exists()
    code, output = short.call("run")
    assert code == exit_codes.STOPPED_RESUMABLE, "run respects the stop"
    assert short.call("status")[0] == exit_codes.STOPPED_RESUMABLE
    short.release()
    assert short.call("resume")[0] == exit_codes.DONE
    assert_same(short, expected)


def test_ctrl_c_saves_and_run_goes_on(short: Sandbox, expected: dict[str, bytes]) -> None:
    short.hold()
    driver = short.start("run")
    _wait(lambda: short.has_saved("iteration_01/member_01"))
    driver.send_signal(signal.SIGINT)
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == exit_codes.STOPPED_RESUMABLE, output
    short.release()
    assert short.call()[0] == exit_codes.DONE
    assert_same(short, expected)


def test_two_drivers_and_a_killed_one(short: Sandbox, expected: dict[str, bytes]) -> None:
    short.hold()
    driver = short.start("run")
    for member in (1, 2):
        _wait((short.run_directory / f"iteration_01/member_0{member}/attempts").exists)
    code, output = short.call()
    assert code == exit_codes.IN_PROGRESS
    assert "another driver is at work" in output
    assert short.call("status")[0] == exit_codes.IN_PROGRESS
    driver.kill()
    driver.communicate()
    second = short.start("run")
    short.release()
    output, _ = second.communicate(timeout=120)
    code = second.returncode
    assert code == exit_codes.DONE, output
    assert all(short.attempts(f"iteration_01/member_0{m}") == 1 for m in (1, 2)), (
        "not started twice"
    )
    assert_same(short, expected)


def test_twins_are_not_merged(short: Sandbox) -> None:
    code, output = short.call("run", FAKE_TWINS="1")
    assert code == exit_codes.FAILED
    assert "have the same seed" in output


def test_a_record_that_contradicts_is_not_believed(finished: Sandbox) -> None:
    path = finished.run_directory / "iteration_01/member_01/completion.json"
    text = path.read_text()
    record = json.loads(text)
    changes = ({"config_hash": "0" * 64}, {"details": {**record["details"], "step": 3}})
    try:
        for bad in (*(json.dumps({**record, **change}) for change in changes), "{"):
            path.write_text(bad)
            code, output = finished.call()
            assert code == exit_codes.FAILED
            assert "to make it again" in output or "delete it to redo" in output
    finally:
        path.write_text(text)


def test_without_its_pins_a_run_is_refused(finished: Sandbox) -> None:
    pins = finished.run_directory / "inputs.json"
    aside = pins.rename(pins.with_suffix(".aside"))
    try:
        for command in ("status", "run"):
            code, output = finished.call(command)
            assert code == exit_codes.FAILED
            assert "Traceback" not in output
            assert "inputs.json cannot be read" in output
    finally:
        aside.rename(pins)


def test_status_takes_little_time(finished: Sandbox) -> None:
    times = []
    for _ in range(3):
        before = os.times()
        assert finished.call("status", "--json")[0] == exit_codes.DONE
        times.append(os.times().children_user - before.children_user)
    assert min(times) < 1.0, "seconds of CPU"


def test_somebody_elses_job_is_left_alone(short: Sandbox) -> None:
    """A local run inside an allocation: a failing member must not requeue the user's own job."""
    folder, log = short.directory / "bin", short.directory / "scontrol.log"
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$*" >> {log}\n')
    (folder / "scontrol").chmod(0o755)
    short.fault("iteration_01/member_01", "exit-1", "exit-1")
    inside = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "8"}
    code, output = short.call("run", PATH=f"{folder}:{os.environ['PATH']}", **inside)
    assert code == exit_codes.FAILED, output
    assert not log.exists(), log.read_text()


@pytest.mark.parametrize(
    ("gpus", "stages", "expected"),
    [([0, 1, 2, 3], 2, ["0,1", "2,3"]), ([4, 5, 6, 7, 9], 2, ["4,5", "6,7,9"]), ([], 2, [])],
)
def test_all_gpus_are_shared_out(gpus: list[int], stages: int, expected: list[str]) -> None:
    assert device_shares({"gpus": gpus, "side_by_side": stages}) == expected


def test_gpus_of_tasks_that_a_killed_driver_left(short: Sandbox) -> None:
    short.save(launcher={"gpus": [0, 1, 2], "side_by_side": 3})
    recipe = load_recipe(short.recipe)
    left = ("iteration_01/member_01", "iteration_01/member_02")
    for name, devices in zip(left, ("0", "2"), strict=True):
        attempts.begin(recipe.paths.stage(name), {"devices": devices})
    driver = LocalDriver(recipe, Live(recipe))
    assert driver._free_devices(set(left)) == "1"
    assert driver._free_devices({left[1]}) == "0"


@pytest.mark.parametrize(
    ("launcher", "devices", "message"),
    [({"gpus": [0], "side_by_side": 2}, 1, "1 devices for launcher.side_by_side = 2"),
     ({"gpus": [0, 1, 1]}, 1, "repeats a device"),
     ({"gpus": [0, 1, 2], "side_by_side": 2}, 2, "trainer.devices is 2, .* gets 1")],
)  # fmt: skip
def test_gpus_that_do_not_go_round(short: Sandbox, launcher, devices: int, message: str) -> None:
    member = {**short.values["member"], "trainer": {"devices": devices, "accelerator": "gpu"}}
    short.save(launcher=launcher, member=member)
    with pytest.raises(ValueError, match=message):
        load_recipe(short.recipe)


def test_ctrl_c_reaches_what_is_just_starting(short: Sandbox) -> None:
    short.save(members=4, launcher={"side_by_side": 4})
    short.hold()
    driver = short.start("run")
    _wait((short.run_directory / "local").exists)
    driver.send_signal(signal.SIGINT)
    output, _ = driver.communicate(timeout=120)  # which nobody releases
    assert driver.returncode == exit_codes.STOPPED_RESUMABLE, output
    assert not list(short.run_directory.glob("iteration_01/member_*/completion.json"))


def test_an_io_error_is_not_final(
    finished: Sandbox, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO while a merged file is hashed: the next attempt succeeds."""
    run = tmp_path / "run"
    shutil.copytree(finished.run_directory, run)
    shutil.rmtree(run / "iteration_02/merge")

    def fail(_path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "init.nemo")

    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        with monkeypatch.context() as patched:
            patched.setattr(programs, "hash_file", fail)
            assert task.main([str(run), "iteration_02/merge"]) == exit_codes.FAILED
        ending = json.loads((run / "iteration_02/merge/attempts/001/exit.json").read_text())
        assert "Input/output error: 'init.nemo'" in ending["reason"]
        assert task.main([str(run), "iteration_02/merge"]) == exit_codes.DONE
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _wait(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
