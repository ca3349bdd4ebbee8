"""``nemo-warp plan``: what `run` would do, without doing any of it."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator

from nemo_warp import exit_codes
from nemo_warp.pipeline.commands.common import add_recipe, in_words, load
from nemo_warp.pipeline.commands.estimate import costs, disk_bytes
from nemo_warp.pipeline.disk.request import planned_request
from nemo_warp.pipeline.disk.state import StageState, Status
from nemo_warp.pipeline.launch import programs, slurm_jobs
from nemo_warp.pipeline.launch.rounds import submit_round
from nemo_warp.pipeline.launch.steps import Allocation
from nemo_warp.pipeline.recipe.load import Recipe
from nemo_warp.pipeline.recipe.plan import MEMBER, MERGE, Stage
from nemo_warp.pipeline.recipe.validate import check_counts, check_files, check_prompts

EPILOG = """\
Writes nothing and asks Slurm nothing. Job ids are shown as JOB1, JOB2, ..., nodes as node1, ...

  nemo-warp plan recipes/tiny
  nemo-warp plan recipes/gemma_7b cluster=h100
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.epilog = EPILOG
    add_recipe(parser)


@in_words
def main(args: argparse.Namespace) -> int:
    """Print the plan."""
    recipe = load(args, files_here=False)
    check_prompts(recipe.values)
    print("\n".join(describe(recipe)))
    try:
        check_files(recipe.values)
        check_counts(recipe.values)
    except ValueError as error:
        print(f"\nrun would refuse this here: {error}")
    return exit_codes.DONE


def describe(recipe: Recipe) -> Iterator[str]:
    """The plan, line by line."""
    values = recipe.values
    yield f"{recipe.name}: {values['iterations']} iterations x {values['members']} members"
    yield f"run directory {recipe.paths.root}"
    yield ""
    yield from _stages(recipe)
    yield ""
    yield from _commands(recipe)
    yield ""
    yield from _costs(recipe)


def _stages(recipe: Recipe) -> Iterator[str]:
    yield "stages"
    for stage in recipe.stages:
        yield f"  {stage.name:<24} {_detail(recipe, stage)}".rstrip()


def _detail(recipe: Recipe, stage: Stage) -> str:
    if stage.kind == MEMBER:
        weights = recipe.rewards(stage.member)
        rewards = " + ".join(f"{reward['weight']:g} {name}" for name, reward in weights.items())
        config = recipe.member_config(stage.iteration, stage.member)
        penalty = config["length_penalty"]
        return (
            f"T {config['run']['total_steps']}, seed {config['run']['seed']}, lr "
            f"{config['optim']['lr']:g}, reward {rewards}"
            f"{f' - {penalty:g} per token' if penalty else ''}"
        )
    if stage.kind == MERGE:
        return f"init of iteration {stage.iteration + 1} at eta {recipe.eta(stage.iteration):g}"
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
    states = {s.name: StageState(s, Status.WAITING) for s in recipe.stages}
    lines: list[str] = []

    def submit(words: list[str]) -> str:
        lines.append(shlex.join(words))
        return f"JOB{sum(line.startswith('sbatch') for line in lines)}"

    for number in range(1, recipe.values["iterations"] + 1):
        lines.append(f"round {number}")
        jobs, _ = submit_round(recipe, states, submit)
        done = set(jobs)
        states = {
            name: StageState(state.stage, Status.DONE if name in done else state.status)
            for name, state in states.items()
        }
    for line in lines:
        yield line if line.startswith("round") else f"  {line}"


def _steps(recipe: Recipe, stage: Stage) -> Iterator[str]:
    allocation = Allocation("python")
    if recipe.values["launcher"]["kind"] == "slurm":
        shape = slurm_jobs.stage_shape(recipe, stage)
        hosts = tuple(f"node{number}" for number in range(1, shape.nodes + 1))
        allocation = Allocation(
            recipe.cluster["step_python"], hosts, recipe.cluster, shape.gpus_per_node
        )
    request = planned_request(recipe, stage)
    attempt = recipe.paths.stage(stage.name).attempts / "001"
    yield f"  {stage.name}"
    steps = programs.servers(recipe, request, allocation, attempt)
    for step in [*steps, *programs.programs(recipe, stage, request, allocation, attempt)]:
        yield f"    {shlex.join(step.command(allocation, master_port=0))}"


def _costs(recipe: Recipe) -> Iterator[str]:
    yield "cost (products of the recipe's section estimate)"
    found = costs(recipe)
    for name, cost in found.items():
        jobs = f"  {name:<24} {cost.jobs} jobs x {cost.nodes} nodes"
        if cost.hours_each is None:
            yield f"{jobs}; no estimate"
        else:
            hours = _hours(cost.node_hours, cost.gpu_hours)
            yield f"{jobs} x {_number(cost.hours_each)} h = {hours}"
    known = [cost for cost in found.values() if cost.hours_each is not None]
    nodes = sum(cost.node_hours or 0.0 for cost in known)
    yield f"  {'together':<24} {_hours(nodes, sum(cost.gpu_hours or 0.0 for cost in known))}"
    disk = disk_bytes(recipe)
    if disk is None:
        yield "  disk: give estimate.parameters"
        return
    parts = ", ".join(f"{name} {_size(size)}" for name, size in disk.items())
    yield f"  disk {_size(sum(disk.values()))} below {recipe.paths.root}: {parts}"


def _hours(node_hours: float | None, gpu_hours: float | None) -> str:
    words = f"{_number(node_hours or 0.0)} node-hours"
    return f"{words}, {_number(gpu_hours)} GPU-hours" if gpu_hours else words


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _size(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{_number(size)} {unit}"
        size /= 1000
    return f"{size:.2f} TB"
