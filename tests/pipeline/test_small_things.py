"""What goes wrong once in a year: deleted leftovers, odd paths, many members, cron's directory."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from sandbox import ROOT, Sandbox, member_of

from nemo_warp import exit_codes
from nemo_warp.cli import main
from nemo_warp.pipeline.commands.estimate import costs, disk_bytes, wall_hours
from nemo_warp.pipeline.commands.run import refuse_other_code
from nemo_warp.pipeline.disk import locks
from nemo_warp.pipeline.disk.contents import refuse_twins
from nemo_warp.pipeline.disk.opening import open_run
from nemo_warp.pipeline.disk.state import QueuedJob, Status, inspect
from nemo_warp.pipeline.launch import slurm, slurm_jobs
from nemo_warp.pipeline.launch.rounds import submit_round
from nemo_warp.pipeline.recipe.load import Recipe, load_recipe
from nemo_warp.records import Completion, RecordError


@pytest.fixture
def under_slurm(sandbox: Sandbox) -> Sandbox:
    sandbox.save(launcher={"kind": "slurm"}, cluster="cpu", iterations=1)
    return sandbox


def submitted(recipe: Recipe) -> list[list[str]]:
    """The lines of the first round."""
    with locks.hold(recipe.paths.driver_lock):
        open_run(recipe)
    lines: list[list[str]] = []

    def submit(words: list[str]) -> str:
        lines.append(words)
        return str(len(lines))

    submit_round(recipe, inspect(recipe), submit)
    return lines


def test_superseded_stages_keep_apart_after_some_were_deleted(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path)
    sandbox.save(iterations=1)
    assert sandbox.call()[0] == exit_codes.DONE
    superseded = sandbox.run_directory / "superseded"
    assert sandbox.call("run", "front.kappas=[0.0]", "--redo")[0] == exit_codes.DONE
    assert sorted(p.name for p in superseded.iterdir()) == ["001.front", "002.report"]
    shutil.rmtree(superseded / "001.front")
    (superseded / "notes").touch()
    assert sandbox.call("run", "front.kappas=[1.0]", "--redo")[0] == exit_codes.DONE
    names = sorted(p.name for p in superseded.iterdir())
    assert names == ["002.report", "003.front", "004.report", "notes"]


def test_the_first_failure_of_a_stage_that_is_made_again_is_retried(tmp_path: Path) -> None:
    """Its attempts begin anew, at 001: no reason to think that none was made."""
    sandbox = Sandbox(tmp_path)
    sandbox.save(iterations=1)
    sandbox.fault("front", "exit-1", "none")
    assert sandbox.call()[0] == exit_codes.DONE
    assert sandbox.attempts("front") == 2
    sandbox.fault("front", "exit-1")
    code, output = sandbox.call("run", "front.kappas=[0.0]", "--redo")
    assert code == exit_codes.DONE, output
    assert sandbox.attempts("front") == 2


def test_a_stop_stands_when_resume_cannot_go_on(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path)
    sandbox.save(iterations=1)
    sandbox.fault("iteration_01/member_01", "exit-2")
    assert sandbox.call()[0] == exit_codes.FAILED
    stop = sandbox.run_directory / "STOP"
    stop.touch()
    (sandbox.run_directory / "inputs.json").rename(tmp_path / "aside")
    code, output = sandbox.call("resume")
    assert code == exit_codes.FAILED, output
    assert stop.exists()


def test_paths_are_the_recipes_wherever_it_is_started(tmp_path: Path, monkeypatch) -> None:
    sandbox = Sandbox(tmp_path / "project" / "mine")
    sandbox.save(sft="sft.nemo", run_directory="runs/x", iterations=1)
    sandbox.save(
        prompts={"train": "./train.jsonl", "heldout": str(sandbox.directory / "heldout.jsonl")}
    )
    cron = tmp_path / "home"
    cron.mkdir()
    monkeypatch.chdir(cron)
    recipe = load_recipe(sandbox.recipe)
    assert recipe.paths.root == sandbox.directory / "runs" / "x"
    assert recipe.values["init"] == recipe.values["sft"] == str(sandbox.directory / "sft.nemo")
    assert recipe.values["prompts"]["train"] == str(sandbox.directory / "train.jsonl")
    by_hand = load_recipe(sandbox.recipe, ["run_directory=y", "sft=a.nemo"], files_here=False)
    assert by_hand.paths.root == cron / "y"
    assert by_hand.values["init"] == str(cron / "a.nemo")


def test_recipes_of_a_folder_share_what_is_beside_it(tmp_path: Path, monkeypatch) -> None:
    """As this repository's do; a run that was begun below the current directory is gone on with."""
    sandbox = Sandbox(tmp_path / "recipes" / "mine")
    (tmp_path / "data").mkdir()
    shutil.copy(sandbox.directory / "sft.nemo", tmp_path / "data" / "sft.nemo")
    sandbox.save(sft="data/sft.nemo", run_directory="runs/mine")
    monkeypatch.chdir("/")
    recipe = load_recipe(sandbox.recipe)
    assert recipe.paths.root == tmp_path / "runs" / "mine"
    assert recipe.values["sft"] == str(tmp_path / "data" / "sft.nemo")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    assert load_recipe(sandbox.recipe).paths.root == tmp_path / "runs" / "mine"
    (elsewhere / "runs" / "mine" / "recipe.yaml").touch()
    assert load_recipe(sandbox.recipe).paths.root == elsewhere / "runs" / "mine"
    variant = tmp_path / "variant.yaml"
    variant.write_text("base: recipes/mine/recipe.yaml\nrun_directory: runs/variant\n")
    assert load_recipe(variant).values["sft"] == str(tmp_path / "data" / "sft.nemo")


def test_many_members_are_ranges_and_windows(under_slurm: Sandbox) -> None:
    under_slurm.save(members=999)
    recipe = load_recipe(under_slurm.recipe)
    arrays = [w for line in submitted(recipe) for w in line if w.startswith("--array=")]
    assert arrays == ["--array=1-999"]
    under_slurm.save(members=7, cluster_overrides={"max_array_size": 4})
    recipe = load_recipe(under_slurm.recipe)
    lines = [line for line in submitted(recipe) if any(w.startswith("--array=") for w in line)]
    words = [[w for w in line if re.match("--(array|job-name)", w)] for line in lines]
    tag = slurm_jobs.run_tag(recipe)
    assert words == [
        [f"--job-name=warp-{tag}-i01-member", "--array=1-3"],
        [f"--job-name=warp-{tag}-i01-member-4", "--array=1-3", "--array-begins-after=3"],
        [f"--job-name=warp-{tag}-i01-member-7", "--array=1", "--array-begins-after=6"],
    ]
    merge = next(line for line in submitted(recipe) if any("-merge" in w for w in line))
    assert "--dependency=afterok:2:3:4" in merge


def test_jobs_of_a_window_are_found_again(under_slurm: Sandbox, monkeypatch) -> None:
    under_slurm.save(members=7, cluster_overrides={"max_array_size": 4})
    recipe = load_recipe(under_slurm.recipe)
    name = f"warp-{slurm_jobs.run_tag(recipe)}-i01-member"
    lines = [f"{name}|10|2|RUNNING|None", f"{name}-4|11|3|SUSPENDED|None",
             f"{name}-7|12|1|PENDING|Priority"]  # fmt: skip
    monkeypatch.setattr(slurm, "ask", lambda *_, **__: "\n".join(lines))
    found = slurm_jobs.look(recipe).active
    assert {name: job.job_id for name, job in found.items()} == {
        "iteration_01/member_02": "10_2",
        "iteration_01/member_06": "11_3",
        "iteration_01/member_07": "12_1",
    }
    open_run(recipe)
    states = inspect(recipe, found)
    held = states["iteration_01/member_06"]
    assert (held.status, held.reason) == (Status.RUNNING, "suspended")
    assert states["iteration_01/member_07"].status is Status.QUEUED
    assert not QueuedJob("1", "PENDING").running
    for number, job in ((6, "11_3"), (7, "12_1")):
        stage = next(s for s in recipe.stages if s.member == number)
        monkeypatch.setenv("SLURM_JOB_ID", "99")
        monkeypatch.setenv("SLURM_JOB_NAME", slurm_jobs.job_name(recipe, stage))
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", job.partition("_")[0])
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", job.partition("_")[2])
        assert slurm_jobs.own_job(recipe, stage) == job


def test_a_percent_sign_in_the_run_directory(under_slurm: Sandbox) -> None:
    root = under_slurm.directory / "100%j"
    under_slurm.save(run_directory=str(root))
    for line in submitted(load_recipe(under_slurm.recipe)):
        for word in line:
            if word.startswith("--output="):
                assert word.startswith(f"--output={under_slurm.directory}/100%%j/slurm/warp-")


def test_nodes_without_a_container_run_the_python_that_submits(under_slurm: Sandbox) -> None:
    recipe = load_recipe(under_slurm.recipe)
    assert recipe.cluster["python"] == recipe.cluster["step_python"] == sys.executable


def test_costs_are_those_of_each_member(under_slurm: Sandbox) -> None:
    """By hand: 60 s a step, so 60, 120, 60 steps are 1, 2, 1 hours; the second has 2 nodes."""
    more = {"trainer": {"num_nodes": 2}, "run": {"total_steps": 120, "keep_checkpoints": 4}}
    under_slurm.save(
        members=3,
        iterations=2,
        member=member_of(60),
        per_member=[{}, {"member": more}, {}],
        estimate={"seconds_per_step": 60, "evaluation_seconds_per_point": 1e-9, "parameters": 1000},
    )
    recipe = load_recipe(under_slurm.recipe)
    rows = {name: (c.jobs, c.nodes, c.hours_each) for name, c in costs(recipe).items()}
    assert rows["members 1, 3 of iteration 1"] == (2, 1, 1.0)
    assert rows["members 2 of iteration 2"] == (1, 2, 2.0)
    assert wall_hours(recipe) == pytest.approx(2 * 2.0)
    disk, keep = disk_bytes(recipe), recipe.values["member"]["run"]["keep_checkpoints"]
    assert disk is not None
    assert disk["training checkpoints"] == 1000 * 18 * 2 * (2 * keep + 4)


def test_an_agreement_to_other_code_is_kept_for_the_next_driver(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path)
    sandbox.save(iterations=1)
    assert sandbox.call()[0] == exit_codes.DONE
    (sandbox.run_directory / "iteration_01/merge/completion.json").unlink()
    recipe = load_recipe(sandbox.run_directory)
    with pytest.raises(ValueError, match="--other-code"):
        refuse_other_code(recipe, "another")
    refuse_other_code(recipe, "another", agreed=True)
    refuse_other_code(recipe, "another")  # the next driver, or cron
    with pytest.raises(ValueError, match="--other-code"):
        refuse_other_code(recipe, "a third")


def test_sides_are_not_changed_while_jobs_are_queued(
    under_slurm: Sandbox, monkeypatch, capsys
) -> None:
    """A colleague's plain `run` of a Slurm recipe; the queue's answer is given."""
    recipe = load_recipe(under_slurm.recipe)
    lines = [f"warp-{slurm_jobs.run_tag(recipe)}-i01-member|10|1|PENDING|Priority"]
    answers = {"squeue": "", "sbatch": "17", "scontrol": "", "scancel": ""}
    monkeypatch.setattr(slurm, "ask", lambda words, *_, **__: answers[words[0]])
    assert main(["run", str(under_slurm.recipe)]) == exit_codes.IN_PROGRESS
    answers["squeue"] = lines[0]
    capsys.readouterr()
    assert main(["run", str(under_slurm.recipe), "launcher.kind=local"]) == exit_codes.MISCONFIGURED
    said = capsys.readouterr().err
    assert "was started with slurm, and 10_1 are still at work or queued" in said
    assert "use launcher.kind=slurm" in said
    assert load_recipe(under_slurm.run_directory).values["launcher"]["kind"] == "slurm"


def test_a_stage_that_failed_for_good_is_told_at_once(tmp_path: Path) -> None:
    """`status` and the run's own code, while its sibling still runs."""
    sandbox = Sandbox(tmp_path)
    sandbox.save(iterations=1)
    sandbox.fault("iteration_01/member_01", "exit-2@1")
    sandbox.hold()
    driver = sandbox.start()
    ending = sandbox.run_directory / "iteration_01/member_01/attempts/001/exit.json"
    sandbox.wait_for(lambda: ending.exists() and sandbox.has_saved("iteration_01/member_02"))
    code, output = sandbox.call("status", "--json")
    states = {s["name"]: s["status"] for s in json.loads(output)["stages"]}
    assert code == exit_codes.FAILED
    assert states["iteration_01/member_01"] == "failed"
    assert states["iteration_01/member_02"] == "running"
    sandbox.release()
    driver.communicate(timeout=120)
    assert driver.returncode == exit_codes.FAILED


def test_equal_orders_of_prompts_say_nothing_equal_seeds_do() -> None:
    """With one prompt, or duplicates of one, every order is the same."""

    def member(seed: int) -> Completion:
        details = {"seed": seed, "prompt_order_hash": "of one prompt"}
        return Completion("member", "", {}, details, "")

    refuse_twins({"member_01": member(1), "member_02": member(2)})
    with pytest.raises(RecordError, match=r"member_03 and member_01 have the same seed \(1\)"):
        refuse_twins({"member_01": member(1), "member_02": member(2), "member_03": member(1)})


def test_a_reward_server_that_cannot_start_says_why_itself(tmp_path: Path) -> None:
    """A real server: its own error is the reason, its log is named, and nobody retries it."""
    sandbox = Sandbox(tmp_path)
    reward = {"weight": 1.0, "callable": "broken_reward:score"}
    retries = {**sandbox.values["retries"], "ready_deadline_s": 300}
    sandbox.save(iterations=1, members=1, rewards={"day": reward}, retries=retries)
    text = "raise RuntimeError('the lexicon is gone')\n\ndef score(prompt, response): return 1.0\n"
    (tmp_path / "broken_reward.py").write_text(text)
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    code, output = sandbox.call("run", PYTHONPATH=path)
    assert code == exit_codes.FAILED, output
    code, output = sandbox.call("status", PYTHONPATH=path)
    assert code == exit_codes.FAILED
    assert "reward-day ended with exit code 2" in output
    assert "the lexicon is gone" in output
    assert "attempts/001/reward-day.log" in output
    assert sandbox.attempts("iteration_01/member_01") == 1


def test_logs_follow_until_the_stage_has_ended(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path)
    sandbox.save(iterations=1)
    talking = sandbox.directory / "talking.py"
    talking.write_text(
        "import sys, time\nfrom pathlib import Path\nprint('first', flush=True)\n"
        f"while not Path({str(tmp_path / 'go')!r}).exists():\n    time.sleep(0.05)\n"
        "print('10%\\r20%\\rlast', flush=True)\nsys.exit(2)\n"
    )
    sandbox.save(commands={**sandbox.values["commands"], "member": [sys.executable, str(talking)]})
    driver = sandbox.start()
    log = sandbox.run_directory / "iteration_01/member_01/attempts/001/log.txt"
    sandbox.wait_for(lambda: log.exists() and "first" in log.read_text())
    words = [sys.executable, "-m", "nemo_warp.cli", "logs", str(sandbox.run_directory)]
    words += ["iteration_01/member_01", "-f"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        seen: list[str] = []
        while "first\n" not in seen:
            seen.append(follower.stdout.readline())
        (tmp_path / "go").touch()
        timer = threading.Timer(120, follower.kill)
        timer.start()
        seen += follower.stdout.readlines()
    timer.cancel()
    assert follower.returncode == exit_codes.DONE, "it ends with the stage"
    assert seen == [f"==> {log} <==\n", "first\n", "10%\n", "20%\n", "last\n"]
    driver.communicate(timeout=120)


def test_plan_takes_seconds_per_step_from_an_earlier_run(sandbox: Sandbox, capsys) -> None:
    """By hand: (1 + 2 + 0.5 + 0.5) and 2 seconds: 3 a step; 2 x 2 members x 4 steps = 48 s."""
    earlier = sandbox.directory / "earlier" / "iteration_01" / "member_01"
    earlier.mkdir(parents=True)
    records = [{"step": 1, "rollout": 1, "train": 2, "evaluation": 0.5, "save": 0.5},
               {"step": 2, "rollout": 2, "train": None, "generate": 1}]  # fmt: skip
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (earlier / "timings.jsonl").write_text(lines + '{"step": 3, "rollo')  # still being written
    earlier_run = str(sandbox.directory / "earlier")
    assert main(["plan", "--json", "--timings", earlier_run, str(sandbox.recipe)]) == 0
    cost = json.loads(capsys.readouterr().out)["cost"]
    members = [row for name, row in cost.items() if name.startswith("members")]
    assert sum(r["jobs"] * r["hours_each"] for r in members) == pytest.approx(48 / 3600, rel=1e-4)
    (earlier / "timings.jsonl").write_text("{}\n[]\n")
    assert main(["plan", "--timings", earlier_run, str(sandbox.recipe)]) == 2
    assert "timings.jsonl, line 2 is no timing" in capsys.readouterr().err


def test_another_scheduler_can_drive_what_plan_says(sandbox: Sandbox, capsys) -> None:
    """`plan --json` in the order of its needs, nothing else; the result is `run`'s."""
    sandbox.save(iterations=1)
    assert main(["plan", "--json", str(sandbox.recipe)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not sandbox.run_directory.exists()
    other = Sandbox(sandbox.directory / "other")
    other.save(iterations=1)
    assert other.call()[0] == exit_codes.DONE
    assert main(["run", str(sandbox.recipe), "--prepare"]) == 0
    assert sorted(p.name for p in sandbox.run_directory.iterdir()) == [
        "inputs.json", "locks", "recipe.yaml",
    ]  # fmt: skip
    done: set[str] = set()
    for stage in plan["stages"]:
        assert set(stage["needs"]) <= done
        assert stage["resources"] == {"nodes": 1, "processes_per_node": 1}
        assert stage["steps"], stage
        task = [sys.executable if word == "python" else word for word in stage["task"]]
        subprocess.run(task, cwd=ROOT, check=True, capture_output=True)
        assert (Path(stage["directory"]) / "completion.json").exists()
        done.add(stage["name"])
    assert sandbox.artifacts() == other.artifacts()
    assert plan["disk_bytes"] is None
    assert os.path.isabs(plan["run_directory"])
