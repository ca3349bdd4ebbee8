"""A recipe that is changed on the way: what is redone, what stays, and what is refused."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import yaml
from sandbox import Sandbox

from nemo_warp import exit_codes
from nemo_warp.pipeline.commands.checks import check_callable, check_endpoint
from nemo_warp.pipeline.commands.run import refuse_other_code
from nemo_warp.pipeline.recipe.load import load_recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    sandbox = Sandbox(tmp_path_factory.mktemp("changes"))
    code, output = sandbox.call()
    assert code == exit_codes.DONE, output
    return sandbox


def made(sandbox: Sandbox) -> dict[str, int]:
    """Finished stages with the time of their record: made again, they get another one."""
    records = sandbox.run_directory.rglob("completion.json")
    kept = (r for r in records if "superseded" not in r.parts)
    return {str(r.parent.relative_to(sandbox.run_directory)): r.stat().st_mtime_ns for r in kept}


CHANGES = [
    # members measure with judges, but are not made by them
    (
        ["judges={tone: {endpoint: tone.json}}"],
        {"iteration_01/evaluation", "iteration_02/evaluation", "front"},
    ),
    (["evaluation.etas=[0.0,0.5,1.0]"], {"iteration_01/evaluation", "iteration_02/evaluation"}),
    (["front.kappas=[0.0,0.5,1.0]"], {"front"}),
    (["iterations=3"], {"front", "final"}),
    (["per_iteration=[{},{eta: 0.5},{}]"], {"iteration_02/merge", "iteration_03/member_01"}),
]


def test_a_change_names_what_it_would_redo_and_redo_does_that_only(finished: Sandbox) -> None:
    """One after the other on one run; every change stays in force for the next."""
    words: list[str] = []
    for change, redone in CHANGES:
        words = [w for w in words if not w.startswith(change[0].partition("=")[0])] + change
        before, stored = made(finished), (finished.run_directory / "recipe.yaml").read_bytes()
        code, output = finished.call("run", *words)
        assert code == exit_codes.MISCONFIGURED, output
        assert all(f"{name} (" in output for name in redone), output
        assert "--redo" in output
        assert "Traceback" not in output
        assert made(finished) == before, "nothing was touched"
        assert (finished.run_directory / "recipe.yaml").read_bytes() == stored
        code, output = finished.call("run", *words, "--redo")
        assert code == exit_codes.DONE, output
        after = made(finished)
        again = {name for name, at in before.items() if after[name] != at}
        if "per_iteration" in change[0]:  # the third iteration begins from another init
            assert not {name for name in again if name.startswith("iteration_01")}
            assert not again & {f"iteration_02/member_0{m}" for m in (1, 2)}
        else:
            assert again == redone | {"report"}, change
    code, output = finished.call("run", *words)
    assert (code, made(finished)) == (exit_codes.DONE, after), "agreed to once, and over"


def test_layouts_limits_and_places_change_nothing(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path)
    sandbox.save(iterations=1)
    assert sandbox.call()[0] == exit_codes.DONE
    before = made(sandbox)
    moved = sandbox.directory / "moved.nemo"
    (sandbox.directory / "sft.nemo").rename(moved)
    sandbox.save(sft=str(moved), retries={**sandbox.values["retries"], "without_progress": 5})
    changes = ("launcher.side_by_side=1", "member.run.time_limit=60", "member.trainer.devices=2")
    code, output = sandbox.call("run", *changes)
    assert code == exit_codes.DONE, output
    assert made(sandbox) == before


def test_another_input_is_a_change_like_any_other(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path)
    sandbox.save(iterations=1)
    assert sandbox.call()[0] == exit_codes.DONE
    (sandbox.directory / "heldout.jsonl").write_text('{"prompt": "In the end"}\n')
    code, output = sandbox.call()
    assert code == exit_codes.MISCONFIGURED
    assert "changed: the contents of prompts.heldout; " in output
    assert "iteration_01/member_01 (prompts.heldout changed)" in output
    assert sandbox.call("run", "--redo")[0] == exit_codes.DONE


def test_sides_are_not_changed_while_stages_are_at_work(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path)
    sandbox.save(iterations=1)
    sandbox.hold()
    driver = sandbox.start("run")
    _wait(lambda: sandbox.has_saved("iteration_01/member_01"))
    driver.kill()
    driver.communicate()
    code, output = sandbox.call("run", "seed=77")
    assert code == exit_codes.MISCONFIGURED, output
    assert "changed: seed (1234 -> 77); iteration_01/member_01" in output
    assert "at work on what this change would make again" in output
    assert sandbox.call("stop", "--wait", "60")[0] == exit_codes.DONE


def test_callables_are_found_without_running_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.path.insert(0, sys.path[0])  # the first entry is the program's own
    (tmp_path / "mine.py").write_text(
        "raise SystemExit('imported')\ntry:\n    from json import dumps as a\n"
        "except E:\n    a = 1\n"
        "b = c = 0\nasync def d(texts): local = 1\n"
    )
    for function in ("a", "b", "c", "d"):
        check_callable(f"mine:{function}", "rewards.x.callable")
    with pytest.raises(ValueError, match=r"rewards.x.callable: .*mine.py has no 'local'"):
        check_callable("mine:local", "rewards.x.callable")
    with pytest.raises(ValueError, match=r"no module 'mine\.sub'"):
        check_callable("mine.sub:f", "rewards.x.callable")
    check_callable("only_in_the_container:f", "rewards.x.callable", elsewhere=True)
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(ValueError, match=r"broken.py, line 1"):
        check_callable("broken:f", "rewards.x.callable")


def test_endpoints_and_space_are_looked_at_first(sandbox: Sandbox) -> None:
    with pytest.raises(ValueError, match=r"rewards.x.endpoint: no such file"):
        check_endpoint(sandbox.directory / "none.json", "rewards.x.endpoint")
    (sandbox.directory / "half.json").write_text("{")
    with pytest.raises(ValueError, match="is not an endpoint file"):
        check_endpoint(sandbox.directory / "half.json", "rewards.x.endpoint")
    sandbox.save(estimate={"parameters": 1e15})
    code, output = sandbox.call("run")
    assert code == exit_codes.MISCONFIGURED
    assert "TB are needed below" in output
    assert not (sandbox.run_directory / "iteration_01").exists()
    assert "run would refuse this here" in sandbox.call("plan")[1]
    code, output = sandbox.call("status")
    assert code == exit_codes.MISCONFIGURED
    assert "has not been started, and run would refuse it here: run_directory: about" in output


def test_an_iteration_is_made_by_one_version_of_the_code(finished: Sandbox) -> None:
    recipe = load_recipe(finished.run_directory)
    refuse_other_code(recipe, "another")  # every iteration is merged
    record = finished.run_directory / f"iteration_0{recipe.values['iterations']}/merge"
    aside = (record / "completion.json").rename(record / "aside.json")
    try:
        with pytest.raises(ValueError, match=r"member_01 was made by nemo_warp .*--other-code"):
            refuse_other_code(recipe, "another")
    finally:
        aside.rename(record / "completion.json")


def test_notify_retention_and_clean(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path)
    told = sandbox.directory / "told.jsonl"
    script = sandbox.directory / "tell.sh"
    script.write_text(f"#!/bin/sh\ncat >> {told}\necho >> {told}\n")
    script.chmod(0o755)
    sandbox.save(iterations=1, notify=str(script))
    sandbox.fault("iteration_01/member_02", "exit-87@2")
    assert sandbox.call()[0] == exit_codes.FAILED
    assert sandbox.call()[0] == exit_codes.FAILED, "told once"
    code, output = sandbox.call("logs")
    assert code == exit_codes.DONE
    assert "made to exit with exit-87" in output
    assert sandbox.call("resume")[0] == exit_codes.DONE
    events = [json.loads(line)["event"] for line in told.read_text().splitlines()]
    assert events == ["failed", "done"]
    checkpoints = sandbox.run_directory / "iteration_01/member_01/checkpoints"
    before = sandbox.artifacts()
    code, output = sandbox.call("clean", "--dry-run")
    assert "iteration_01/member_01/checkpoints" in output
    assert checkpoints.exists()
    assert sandbox.call("clean")[0] == exit_codes.DONE
    assert not checkpoints.exists()
    assert sandbox.artifacts() == before
    assert sandbox.call()[0] == exit_codes.DONE, "still done"
    (sandbox.run_directory / "iteration_01/evaluation/completion.json").unlink()
    checkpoints.mkdir()
    assert sandbox.call("run", "retention=evaluated")[0] == exit_codes.DONE
    assert not checkpoints.exists()


def test_status_of_a_reader_and_its_arguments(finished: Sandbox) -> None:
    code, output = finished.call("status", "--json", "launcher.side_by_side=1")
    assert code == exit_codes.DONE, output
    rows = {row["kind"]: row for row in json.loads(output)["cost"]}
    assert rows["member"]["attempts"] >= 4
    assert rows["member"]["node_hours"] > 0
    assert rows["member"]["left_node_hours"] == 0
    code, output = finished.call("status", "--cost")
    assert "together" in output


def _wait(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, os.times()
        time.sleep(0.05)


def test_a_finished_run_publishes_the_policy_at_a_kl(tmp_path: Path) -> None:
    """`pick` makes its stage, the policy and the report; the front and all before it stay."""
    sandbox = Sandbox(tmp_path)
    sandbox.save(iterations=1, benchmarks={"tasks": ["verses"], "kappas": [0, 1]})
    code, output = sandbox.call("pick", "--kl", "5")
    assert code == exit_codes.MISCONFIGURED and "has not been started" in output
    assert sandbox.call()[0] == exit_codes.DONE
    before = made(sandbox)
    assert "benchmarks" in before and "pick" not in before
    code, output = sandbox.call("pick", "--kl", "5")
    assert code == exit_codes.DONE, output
    assert "kappa 0.5: KL 5.00 of 5 nats, reward 0.500" in output
    after = made(sandbox)
    assert {n for n, at in before.items() if after[n] != at} == {"final", "report"}
    record = json.loads((sandbox.run_directory / "final/completion.json").read_text())
    assert record["details"]["chosen"]["kappa"] == 0.5
    config = yaml.safe_load((sandbox.run_directory / "final/config.yaml").read_text())
    assert config == {"kappa": 0.5}
    code, output = sandbox.call("pick", "--kl", "5")
    assert (code, made(sandbox)) == (exit_codes.DONE, after), "chosen already"
    code, output = sandbox.call("pick", "--kl", "2.5", "--tolerance", "0.2")
    assert code == exit_codes.DONE and "kappa 0.25" in output
    (sandbox.directory / "heldout.jsonl").write_text('{"prompt": "In the end"}\n')
    code, output = sandbox.call("pick", "--kl", "3")
    assert code == exit_codes.MISCONFIGURED
    assert "an input has changed, which would redo iteration_01/member_01" in output
