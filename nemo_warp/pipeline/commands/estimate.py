"""What a recipe costs: node- and GPU-hours, disk. Products of the recipe's ``estimate`` section."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from nemo_warp.core.footprint import Footprint, member_footprint
from nemo_warp.core.transformer import KNOWN
from nemo_warp.pipeline.launch import slurm_jobs
from nemo_warp.pipeline.recipe.load import Recipe
from nemo_warp.pipeline.recipe.plan import EVALUATION, FRONT, MEMBER

_CHECKPOINT_BYTES = 2 + 4 + 8 + 4
"""Per parameter: bf16 weights, fp32 masters, two Adam moments, the fp32 anchor."""
_PARTS_OF_A_STEP = ("rollout", "train", "evaluation", "save")
"""Of a record of timings.jsonl: what together is a step; the other parts are inside of these."""
_POLICY_BYTES = {"same": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Cost:
    """Hours of all stages of a kind together; None where the recipe gives no estimate."""

    jobs: int
    nodes: int
    gpus: int
    hours_each: float | None

    @property
    def node_hours(self) -> float | None:
        """Jobs x nodes x hours."""
        return None if self.hours_each is None else self.jobs * self.nodes * self.hours_each

    @property
    def gpu_hours(self) -> float | None:
        """Jobs x GPUs x hours."""
        return None if self.hours_each is None else self.jobs * self.gpus * self.hours_each


def costs(recipe: Recipe) -> dict[str, Cost]:
    """Cost of the members of each iteration and of the evaluations.

    Members that cost the same are one row (``members of iteration 1``); where they differ in
    steps, nodes or GPUs, each kind has its own (``members 1, 3 of iteration 1``).
    """
    found: dict[str, Cost] = {}
    for iteration in range(1, recipe.values["iterations"] + 1):
        rows = _members(recipe, iteration)
        for (nodes, gpus, hours), members in rows.items():
            whose = f"members {', '.join(map(str, members))}" if len(rows) > 1 else "members"
            found[f"{whose} of iteration {iteration}"] = Cost(len(members), nodes, gpus, hours)
    iterations = recipe.values["iterations"]
    points = sum(recipe.num_points(i) for i in range(1, iterations + 1)) / iterations
    for name, kind, jobs, number in (
        ("evaluations", EVALUATION, iterations, points),
        ("final front", FRONT, 1, len(recipe.values["front"]["kappas"])),
    ):
        nodes, gpus = _shape(recipe, kind)
        found[name] = Cost(jobs, nodes, gpus, _hours(seconds_each(recipe, kind), number))
    return found


def seconds_each(recipe: Recipe, kind: str) -> float | None:
    """Of a member's step or an evaluation's point, as the recipe's ``estimate`` has it."""
    key = "seconds_per_step" if kind == MEMBER else "evaluation_seconds_per_point"
    return recipe.values["estimate"][key]


def _members(recipe: Recipe, iteration: int) -> dict[tuple[int, int, float | None], list[int]]:
    """Nodes, GPUs and hours -> the members of an iteration that cost that."""
    numbers = list(range(1, recipe.values["members"] + 1))
    rows: dict[tuple[int, int, float | None], list[int]] = {}
    for member in numbers if recipe.values["per_member"] else [1]:
        row = (*_shape(recipe, MEMBER, iteration, member), member_hours(recipe, iteration, member))
        rows.setdefault(row, []).append(member)
    return rows if recipe.values["per_member"] else dict.fromkeys(rows, numbers)


def member_hours(recipe: Recipe, iteration: int, member: int = 1) -> float | None:
    """Hours of one member of ``iteration``."""
    return _hours(seconds_each(recipe, MEMBER), recipe.total_steps(iteration, member))


def wall_hours(recipe: Recipe) -> float | None:
    """From start to end if nothing waits in a queue; merges, which take minutes, are left out.

    An iteration's evaluation runs beside the next one's members; the last one beside the front.
    """
    values, launcher = recipe.values, recipe.values["launcher"]
    local = launcher["kind"] == "local"
    at_a_time = launcher["side_by_side"] if local else launcher["throttle"] or values["members"]
    # Members that do not fit side by side come one wave after another.
    waves = -(-values["members"] // at_a_time)
    iterations = range(1, values["iterations"] + 1)
    numbers = range(1, values["members"] + 1) if values["per_member"] else (1,)
    # A merge waits for the longest member.
    members = [max((member_hours(recipe, i, m) or 0.0) for m in numbers) for i in iterations]
    each = seconds_each(recipe, EVALUATION)
    if seconds_each(recipe, MEMBER) is None or each is None:
        return None
    points = max(recipe.num_points(values["iterations"]), len(values["front"]["kappas"]))
    return waves * sum(members) + each * points / 3600


def measured_seconds(timings: Path) -> float:
    """Seconds per step of an earlier run.

    Args:
        timings: a member's ``timings.jsonl``, or a directory with any number of them below it.

    Raises:
        ValueError: there are none, or they hold no step.
    """
    files = [timings] if timings.is_file() else sorted(timings.rglob("timings.jsonl"))
    steps, seconds = 0, 0.0
    for file in files:
        # Without the last piece: empty, or a line that is being written.
        for number, line in enumerate(file.read_text().split("\n")[:-1], start=1):
            try:
                record = json.loads(line)
                seconds += sum(record.get(part) or 0.0 for part in _PARTS_OF_A_STEP)
                steps += 1
            except (ValueError, AttributeError, TypeError) as error:
                raise ValueError(f"{file}, line {number} is no timing ({error})") from None
    if not steps or not seconds:
        raise ValueError(f"{timings} holds no timings.jsonl with steps; give a member's, or a run")
    return seconds / steps


def disk_bytes(recipe: Recipe) -> dict[str, int] | None:
    """Bytes by what they are for, or None without ``estimate.parameters``."""
    parameters = recipe.values["estimate"]["parameters"]
    if parameters is None:
        return None
    values = recipe.values
    runs = values["iterations"] * values["members"]
    # With retention, this iteration's and those of the one before, which is being evaluated.
    kept = min(runs, 2 * values["members"]) if values["retention"] == "evaluated" else runs
    members = [recipe.member_config(*one) for one in recipe.different_members()]
    keep = sum(member["run"]["keep_checkpoints"] for member in members) / len(members)
    policy = sum(_POLICY_BYTES[member["export"]["dtype"]] for member in members) / len(members)
    merged = _POLICY_BYTES["float32" if "float32" in values["merge"]["arguments"] else "same"]
    return {
        "training checkpoints": int(parameters * _CHECKPOINT_BYTES * keep * kept),
        "policies": int(parameters * policy * runs),
        "merged": int(parameters * merged * (2 * values["iterations"] + 1)),
    }


def memory(recipe: Recipe) -> Footprint | None:
    """Of the member whose rank holds most, or None without ``estimate.model``."""
    model = recipe.values["estimate"]["model"]
    if model is None:
        return None
    found = [
        member_footprint(KNOWN[model], recipe.member_config(*one))
        for one in recipe.different_members()
    ]
    return max(found, key=lambda footprint: footprint.peak)


def device_bytes(recipe: Recipe) -> float | None:
    """Memory of a GPU, as the cluster file says; None where it does not, or without a cluster."""
    if recipe.values["launcher"]["kind"] != "slurm":
        return None
    gigabytes = recipe.cluster["gpu_memory"]
    return None if gigabytes is None else gigabytes * 1e9


def _hours(seconds_each: float | None, number: float) -> float | None:
    return None if seconds_each is None else seconds_each * number / 3600


def _shape(recipe: Recipe, kind: str, iteration: int = 0, member: int = 0) -> tuple[int, int]:
    """Nodes and GPUs of one job."""
    if recipe.values["launcher"]["kind"] == "slurm":
        job = slurm_jobs.job_shape(recipe, kind, iteration, member)
        return job.nodes, job.nodes * job.gpus_per_node
    return 1, len(recipe.values["launcher"]["gpus"]) // recipe.values["launcher"]["side_by_side"]


def size(number: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{rounded(number)} {unit}"
        number /= 1000
    return f"{number:.2f} TB"


def rounded(value: float) -> str:
    """Three digits, or all those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
