"""What a recipe costs: node- and GPU-hours, disk. Products of the recipe's ``estimate`` section."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_warp.pipeline.launch import slurm_jobs
from nemo_warp.pipeline.recipe.load import Recipe
from nemo_warp.pipeline.recipe.plan import EVALUATION, FRONT, MEMBER

_CHECKPOINT_BYTES = 2 + 4 + 8 + 4
"""Per parameter: bf16 weights, fp32 masters, two Adam moments, the fp32 anchor."""
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
    """Cost of the members of each iteration (``members of iteration 1``) and of the evaluations."""
    assumed = recipe.values["estimate"]
    members, found = recipe.values["members"], {}
    for iteration in range(1, recipe.values["iterations"] + 1):
        hours = _hours(assumed["seconds_per_step"], recipe.total_steps(iteration))
        nodes, gpus = _shape(recipe, MEMBER)
        found[f"members of iteration {iteration}"] = Cost(members, nodes, gpus, hours)
    iterations = recipe.values["iterations"]
    points = sum(recipe.num_points(i) for i in range(1, iterations + 1)) / iterations
    for name, kind, jobs, number in (
        ("evaluations", EVALUATION, iterations, points),
        ("final front", FRONT, 1, len(recipe.values["front"]["kappas"])),
    ):
        nodes, gpus = _shape(recipe, kind)
        hours = _hours(assumed["evaluation_seconds_per_point"], number)
        found[name] = Cost(jobs, nodes, gpus, hours)
    return found


def disk_bytes(recipe: Recipe) -> dict[str, int] | None:
    """Bytes by what they are for, or None without ``estimate.parameters``."""
    parameters = recipe.values["estimate"]["parameters"]
    if parameters is None:
        return None
    values = recipe.values
    runs = values["iterations"] * values["members"]
    keep, dtype = values["member"]["run"]["keep_checkpoints"], values["member"]["export"]["dtype"]
    merged = _POLICY_BYTES["float32" if "float32" in values["merge"]["arguments"] else "same"]
    return {
        "training checkpoints": int(parameters * _CHECKPOINT_BYTES * keep * runs),
        "policies": int(parameters * _POLICY_BYTES[dtype] * runs),
        "merged": int(parameters * merged * (2 * values["iterations"] + 1)),
    }


def _hours(seconds_each: float | None, number: float) -> float | None:
    return None if seconds_each is None else seconds_each * number / 3600


def _shape(recipe: Recipe, kind: str) -> tuple[int, int]:
    """Nodes and GPUs of one job."""
    if recipe.values["launcher"]["kind"] == "slurm":
        job = slurm_jobs.job_shape(recipe, kind)
        return job.nodes, job.nodes * job.gpus_per_node
    return 1, len(recipe.values["launcher"]["gpus"]) // recipe.values["launcher"]["side_by_side"]
