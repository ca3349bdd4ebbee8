"""The plan: order, submission lines (golden), cost."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from sandbox import ROOT, Sandbox

from nemo_warp.pipeline.commands.estimate import costs, disk_bytes
from nemo_warp.pipeline.commands.plan import describe
from nemo_warp.pipeline.recipe.load import load_recipe
from nemo_warp.pipeline.recipe.plan import build_plan

GOLDEN = Path(__file__).with_name("golden")
"""Checked by eye when they change. To write them anew: UPDATE_GOLDEN=1 pytest tests/pipeline."""


def test_every_stage_comes_after_what_it_needs() -> None:
    plan = build_plan(iterations=3, members=2)
    assert [s.name for s in plan[:4]] == [
        "iteration_01/member_01", "iteration_01/member_02", "iteration_01/merge",
        "iteration_01/evaluation",
    ]  # fmt: skip
    assert [s.name for s in plan[-3:]] == ["front", "final", "report"]
    seen: set[str] = set()
    for stage in plan:
        assert set(stage.needs) <= seen
        seen.add(stage.name)
    assert len(plan) == 3 * 4 + 3
    whole = [s.name for s in build_plan(1, 1, pick=True, benchmarks=True)]
    assert whole[3:] == ["front", "pick", "final", "benchmarks", "report"]
    second = next(s for s in plan if s.name == "iteration_02/member_01")
    assert second.needs == ("iteration_01/merge",), "not the evaluation"


@pytest.mark.parametrize("recipe", ["gemma_7b", "llama3_8b", "length_penalty"])
def test_plan_is_the_golden_one(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = describe(load_recipe(Path("recipes") / recipe, files_here=False))
    text = "\n".join(lines).replace(str(ROOT), "CHECKOUT") + "\n"
    file = GOLDEN / f"{recipe}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


def test_cost_of_gemma_7b() -> None:
    """By hand: 33 000 steps x 25 s x 2 members x 3 nodes x 8 GPUs, and 18 bytes a parameter."""
    recipe = load_recipe(ROOT / "recipes" / "gemma_7b", files_here=False)
    members = [c for name, c in costs(recipe).items() if name.startswith("members")]
    assert sum(c.gpu_hours or 0 for c in members) == pytest.approx(33_000 * 25 / 3600 * 2 * 24)
    assert sum(c.node_hours or 0 for c in members) == pytest.approx(33_000 * 25 / 3600 * 2 * 3)
    evaluations = costs(recipe)["evaluations"]
    points = 6 + 4 * 12  # from the init, and from SFT where that is another
    assert evaluations.gpu_hours == pytest.approx(points * 120 / 3600 * 24)
    disk = disk_bytes(recipe)
    assert disk is not None
    assert disk["training checkpoints"] == 8_540_000_000 * 18 * 2 * 10
    assert disk["policies"] == 8_540_000_000 * 4 * 10
    assert disk["merged"] == 8_540_000_000 * 4 * 11


def test_members_may_be_throttled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    overrides = ["launcher.throttle=1", "resources.member.options=[--qos=high]"]
    lines = list(describe(load_recipe(Path("recipes/gemma_7b"), overrides, files_here=False)))
    arrays = [line for line in lines if "--array" in line]
    assert len(arrays) == 2, "rounds 1 to 4 differ in numbers only"
    assert all("--array=1,2%1 " in line and " --qos=high " in line for line in arrays)


def test_plan_writes_nothing(sandbox: Sandbox) -> None:
    code, output = sandbox.call("plan")
    assert code == 0, output
    assert "member_02    T 4" in output
    assert "iterations 1 to 2, seeds 720644447, 986376441, 2128274515" in output
    assert not sandbox.run_directory.exists()


def test_the_batch_scripts_are_clean() -> None:
    scripts = sorted((ROOT / "slurm").glob("*.sh"))
    assert len(scripts) == 2
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert script.stat().st_mode & 0o111
