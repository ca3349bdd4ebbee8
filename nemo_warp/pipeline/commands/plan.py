"""``nemo-warp plan``: what `run` would do, without doing any of it."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_warp import exit_codes
from nemo_warp.pipeline.commands.checks import check_before_start
from nemo_warp.pipeline.commands.common import add_recipe, in_words, load
from nemo_warp.pipeline.commands.estimate import (
    costs,
    device_bytes,
    disk_bytes,
    measured_seconds,
    memory,
    rounded,
    size,
    wall_hours,
)
from nemo_warp.pipeline.disk.request import planned_request
from nemo_warp.pipeline.disk.state import StageState, Status
from nemo_warp.pipeline.launch import programs, slurm_jobs
from nemo_warp.pipeline.launch.rounds import submit_round
from nemo_warp.pipeline.launch.steps import Allocation
from nemo_warp.pipeline.recipe.load import Recipe
from nemo_warp.pipeline.recipe.plan import MEMBER, MERGE, Stage
from nemo_warp.pipeline.recipe.validate import check_prompts

_RETENTION = {
    "all": "every training checkpoint stays (see nemo-warp clean)",
    "evaluated": "training checkpoints go when their iteration is merged and evaluated",
}
EPILOG = """\
Writes nothing and asks Slurm nothing. Job ids are shown as JOB1, JOB2, ..., nodes as node1, ...

  nemo-warp plan recipes/tiny
  nemo-warp plan recipes/gemma_7b cluster=h100
  nemo-warp plan recipes/gemma_7b --timings runs/earlier      # seconds per step as measured there
  nemo-warp plan recipes/tiny --json | jq '.stages[] | {name, needs, task}'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.epilog = EPILOG
    add_recipe(parser)
    parser.add_argument(
        "--timings", type=Path, metavar="PATH",
        help="an earlier run, or a timings.jsonl of it: seconds per step are taken from there",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="for programs: stages and commands")


@in_words
def main(args: argparse.Namespace) -> int:
    """Print the plan."""
    if args.timings is not None:
        args.overrides += [f"estimate.seconds_per_step={measured_seconds(args.timings):.6g}"]
    recipe = load(args, files_here=False)
    check_prompts(recipe.values, [recipe.member_config(*one) for one in recipe.different_members()])
    if args.json:
        print(json.dumps(as_json(recipe), indent=2))
        return exit_codes.DONE
    print("\n".join(describe(recipe)))
    try:
        check_before_start(recipe)
    except ValueError as error:
        print(f"\nrun would refuse this here: {error}")
    return exit_codes.DONE


def describe(recipe: Recipe) -> Iterator[str]:
    """The plan, line by line: what it costs first, then the stages, then every command."""
    values = recipe.values
    yield f"{recipe.name}: {values['iterations']} iterations x {values['members']} members"
    yield f"run directory {recipe.paths.root}"
    yield ""
    yield from _costs(recipe)
    yield ""
    yield from _memory(recipe)
    yield ""
    yield from _stages(recipe)
    yield ""
    yield from _commands(recipe)


def as_json(recipe: Recipe) -> dict[str, Any]:
    """The plan for another scheduler, which starts ``task`` when all of ``needs`` are done.

    Every stage ends with its completion record; ``task`` may be started again at any time.
    """
    stages = []
    for stage in recipe.stages:
        task = ["python", "-m", "nemo_warp.pipeline.task", str(recipe.paths.root), stage.name]
        allocation = _allocation(recipe, stage)
        resources = {"nodes": len(allocation.hosts) or 1, **_ranks(recipe, stage)}
        if recipe.values["launcher"]["kind"] == "slurm":
            resources = asdict(slurm_jobs.stage_shape(recipe, stage))
        stages.append(
            {
                "name": stage.name,
                "kind": stage.kind,
                "needs": list(stage.needs),
                "directory": str(recipe.paths.stage(stage.name).directory),
                "resources": resources,
                "task": task,
                "steps": _step_commands(recipe, stage, allocation),
            }
        )
    return {
        "name": recipe.name,
        "run_directory": str(recipe.paths.root),
        "cost": {name: asdict(cost) for name, cost in costs(recipe).items()},
        "wall_hours": wall_hours(recipe),
        "disk_bytes": disk_bytes(recipe),
        "memory_bytes": None if (found := memory(recipe)) is None else asdict(found),
        "stages": stages,
    }


def _ranks(recipe: Recipe, stage: Stage) -> dict[str, int]:
    trainer = planned_request(recipe, stage).config.get("trainer", {})
    return {"processes_per_node": trainer.get("devices", 1)}


def _stages(recipe: Recipe) -> Iterator[str]:
    """A line per stage; iterations that differ in nothing but their seeds are said once."""
    yield "stages"
    by_iteration: dict[tuple[str, ...], list[int]] = {}
    for iteration in range(1, recipe.values["iterations"] + 1):
        stages = [s for s in recipe.stages if s.iteration == iteration and "/" in s.name]
        lines = tuple(
            f"    {s.name.partition('/')[2]:<12} {_detail(recipe, s)}".rstrip() for s in stages
        )
        by_iteration.setdefault(lines, []).append(iteration)
    for lines, iterations in by_iteration.items():
        yield f"  {_counted('iteration', iterations)}, seeds {_seeds(recipe, iterations)}"
        yield from lines
    yield f"  {', '.join(s.name for s in recipe.stages if '/' not in s.name)}"


def _counted(noun: str, numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"{noun} {numbers[0]}"
    consecutive = numbers[-1] - numbers[0] + 1 == len(numbers)
    return f"{noun}s {f'{numbers[0]} to {numbers[-1]}' if consecutive else numbers}"


def _seeds(recipe: Recipe, iterations: list[int]) -> str:
    members = range(1, recipe.values["members"] + 1)
    seeds = [str(recipe.seed(i, m)) for i in iterations for m in members]
    return ", ".join(seeds[:4]) + (f" and {len(seeds) - 4} more" if len(seeds) > 4 else "")


def _detail(recipe: Recipe, stage: Stage) -> str:
    if stage.kind == MEMBER:
        weights = recipe.rewards(stage.member)
        rewards = " + ".join(f"{reward['weight']:g} {name}" for name, reward in weights.items())
        config = recipe.member_config(stage.iteration, stage.member)
        penalty = config["length_penalty"]
        return (
            f"T {config['run']['total_steps']}, lr "
            f"{config['optim']['lr']:g}, reward {rewards}"
            f"{f' - {penalty:g} per token' if penalty else ''}"
        )
    if stage.kind == MERGE:
        return f"next init at eta {recipe.eta(stage.iteration):g}"
    return ""


def _commands(recipe: Recipe) -> Iterator[str]:
    if recipe.values["launcher"]["kind"] == "slurm":
        yield from _submissions(recipe)
        yield ""
    yield "steps (of one job of each kind)"
    seen = set()
    for stage in recipe.stages:
        if stage.kind not in seen:
            seen.add(stage.kind)
            yield from _steps(recipe, stage)
    yield "  every port is a free one of its node, chosen when the step starts"


def _submissions(recipe: Recipe) -> Iterator[str]:
    """What the rounds submit if nothing fails."""
    # The real functions of the driver, with a `submit` that only writes down: the plan cannot
    # differ from what is run.
    states = {s.name: StageState(s, Status.WAITING) for s in recipe.stages}
    rounds: list[list[str]] = []
    submitted = itertools.count(1)

    def submit(words: list[str]) -> str:
        rounds[-1].append(shlex.join(words))
        return f"JOB{next(submitted)}" if words[0] == "sbatch" else ""

    for _ in range(recipe.values["iterations"]):
        rounds.append([])
        jobs, _ = submit_round(recipe, states, submit)
        done = set(jobs)
        states = {
            name: StageState(state.stage, Status.DONE if name in done else state.status)
            for name, state in states.items()
        }
    yield from _grouped(rounds)


def _grouped(rounds: list[list[str]]) -> Iterator[str]:
    """Rounds that differ in the iteration's and the jobs' numbers only are written out once."""
    equal: dict[tuple[str, ...], list[int]] = {}
    for number, lines in enumerate(rounds, start=1):
        equal.setdefault(_shape_of(lines, number), []).append(number)
    for numbers in equal.values():
        others = f" (round {numbers[0]}'s numbers)" if len(numbers) > 1 else ""
        yield f"{_counted('round', numbers)}{others}"
        yield from (f"  {line}" for line in rounds[numbers[0] - 1])


def _shape_of(lines: list[str], number: int) -> tuple[str, ...]:
    """The round's lines with what counts up from round to round made relative."""
    jobs = [int(j) for line in lines for j in re.findall(r"\bJOB(\d+)", line)]
    first = min(jobs, default=0)
    relative = [re.sub(r"\bJOB(\d+)", lambda m: f"JOB+{int(m[1]) - first}", li) for li in lines]
    return tuple(
        re.sub(r"(\biteration_|-i)(\d{2,3})\b", lambda m: f"{m[1]}{int(m[2]) - number}", line)
        for line in relative
    )


def _allocation(recipe: Recipe, stage: Stage) -> Allocation:
    """Where the stage will run, its nodes called node1, node2, ..."""
    if recipe.values["launcher"]["kind"] != "slurm":
        return Allocation("python")
    shape = slurm_jobs.stage_shape(recipe, stage)
    hosts = tuple(f"node{number}" for number in range(1, shape.nodes + 1))
    return Allocation(recipe.cluster["step_python"], hosts, recipe.cluster, shape.gpus_per_node)


def _step_commands(recipe: Recipe, stage: Stage, allocation: Allocation) -> list[list[str]]:
    """Command lines of the stage's reward servers and of its own programs."""
    request = planned_request(recipe, stage)
    attempt = recipe.paths.stage(stage.name).attempts / "001"
    steps = programs.servers(recipe, request, allocation, attempt)
    steps += programs.programs(recipe, stage, request, allocation, attempt)
    return [list(step.command(allocation, master_port=0)) for step in steps]


def _steps(recipe: Recipe, stage: Stage) -> Iterator[str]:
    yield f"  {stage.name}"
    for words in _step_commands(recipe, stage, _allocation(recipe, stage)):
        yield f"    {shlex.join(words)}"


def _costs(recipe: Recipe) -> Iterator[str]:
    found, wall = costs(recipe), wall_hours(recipe)
    yield "cost (products of the recipe's section estimate)"
    for name, cost in found.items():
        jobs = f"  {name:<24} {cost.jobs} jobs x {cost.nodes} nodes"
        if cost.hours_each is None:
            yield f"{jobs}; no estimate"
        else:
            hours = _hours(cost.node_hours, cost.gpu_hours)
            yield f"{jobs} x {rounded(cost.hours_each)} h = {hours}"
    known = [cost for cost in found.values() if cost.hours_each is not None]
    nodes = sum(cost.node_hours or 0.0 for cost in known)
    yield f"  {'together':<24} {_hours(nodes, sum(cost.gpu_hours or 0.0 for cost in known))}"
    if wall is not None:
        yield f"  wall time {rounded(wall)} h, if nothing waits for nodes"
    disk = disk_bytes(recipe)
    keeps = recipe.values["retention"]
    yield f"  retention {keeps}: " + _RETENTION[keeps]
    if disk is None:
        yield "  disk: give estimate.parameters"
        return
    parts = ", ".join(f"{name} {size(number)}" for name, number in disk.items())
    yield f"  disk {size(sum(disk.values()))} below {recipe.paths.root}: {parts}"


def _memory(recipe: Recipe) -> Iterator[str]:
    found = memory(recipe)
    if found is None:
        yield "memory of a member's rank: give estimate.model"
        return
    yield "memory of a member's rank (an estimate, for the longest sequences that are allowed)"
    yield from (f"  {line}" for line in found.lines(device_bytes(recipe)))


def _hours(node_hours: float | None, gpu_hours: float | None) -> str:
    words = f"{rounded(node_hours or 0.0)} node-hours"
    return f"{words}, {rounded(gpu_hours)} GPU-hours" if gpu_hours else words
