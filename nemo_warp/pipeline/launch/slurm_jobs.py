"""A run's Slurm jobs: their names, what they ask for, which of them are in the queue.

No job id is kept. Jobs are found again by name: ``warp-<run>-i02-member`` where ``<run>`` is the
recipe's name and a hash of the run directory; the tasks of a member array have the member's number
as index.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_warp.pipeline.disk.state import QueuedJob
from nemo_warp.pipeline.launch import slurm
from nemo_warp.pipeline.launch.programs import node_counts
from nemo_warp.pipeline.launch.steps import checkout, gpu_options
from nemo_warp.pipeline.recipe.load import Recipe
from nemo_warp.pipeline.recipe.plan import EVALUATION, FINAL, FRONT, MEMBER, MERGE, REPORT, Stage

DRIVER = "driver"

_RESOURCES = {
    MEMBER: "member",
    MERGE: "merge",
    FINAL: "merge",
    REPORT: "driver",
    EVALUATION: "evaluation",
    FRONT: "evaluation",
    DRIVER: "driver",
}


@dataclass(frozen=True)
class JobShape:
    """What one job asks for."""

    nodes: int
    gpus_per_node: int
    time: str
    options: tuple[str, ...]


def run_tag(recipe: Recipe) -> str:
    """Tells this run's jobs from any other's, also after the recipe was renamed."""
    digest = hashlib.sha256(str(recipe.paths.root.resolve()).encode()).hexdigest()
    return f"{recipe.name}-{digest[:8]}"


def job_name(recipe: Recipe, kind: str, iteration: int = 0) -> str:
    """Name of the job that runs the stages of a kind in an iteration."""
    middle = f"-i{iteration:02d}" if iteration else ""
    return f"warp-{run_tag(recipe)}{middle}-{kind}"


def queue(recipe: Recipe, patience_s: float = slurm.PATIENCE_S) -> dict[str, QueuedJob]:
    """This run's jobs by stage name (``driver`` for the driver's), pending and running.

    Raises:
        SlurmError: the controller does not answer; never take that for an empty queue.
    """
    stages: dict[tuple[str, int], str] = {(job_name(recipe, DRIVER), 0): DRIVER}
    for stage in recipe.stages:
        name = job_name(recipe, stage.kind, stage.iteration)
        stages[name, stage.member] = stage.name
    names = ",".join(sorted({name for name, _ in stages}))
    lines = slurm.ask(
        ["squeue", "--noheader", "--array", f"--name={names}", "--format=%j|%F|%K|%T|%r"],
        patience_s,
    )
    jobs: dict[str, QueuedJob] = {}
    for line in lines.splitlines():
        name, job, index, state, reason = line.split("|", 4)
        member = int(index) if index.isdigit() else 0
        job_id = f"{job}_{member}" if member else job
        found = QueuedJob(job_id, state, "" if reason == "None" else reason)
        own = slurm.in_job() and job == os.environ["SLURM_JOB_ID"]
        if (name, member) in stages and not own:
            jobs[stages[name, member]] = found
    return jobs


def job_shape(recipe: Recipe, kind: str) -> JobShape:
    """Nodes, GPUs, time and options of the jobs of a kind; members of all iterations alike."""
    cluster, wanted = recipe.cluster, recipe.values["resources"][_RESOURCES[kind]]
    nodes = 1
    if kind in (MEMBER, EVALUATION, FRONT):
        counts = [0] if kind != MEMBER else range(1, recipe.values["members"] + 1)
        nodes = max(_nodes(recipe, member, kind) for member in counts)
    gpus = wanted["gpus_per_node"]
    gpus = cluster["gpus_per_node"] if gpus is None else gpus
    options = gpu_options(cluster, gpus) if gpus else []
    cpus, memory = wanted["cpus_per_node"], wanted["memory"]
    cpus = cluster["cpus_per_node"] if cpus is None else cpus
    memory = cluster["memory"] if memory is None else memory
    options += [f"--cpus-per-task={cpus}"] if cpus else []
    options += [f"--mem={memory}"] if memory is not None else []
    options += ["--exclusive"] if cluster["exclusive"] and _RESOURCES[kind] != "driver" else []
    time_limit = str(wanted["time"])
    return JobShape(nodes, gpus, time_limit, (*options, *map(str, wanted["options"])))


def _nodes(recipe: Recipe, member: int, kind: str) -> int:
    if kind == MEMBER:
        config = recipe.member_config(1, member)
    else:
        config = {"trainer": recipe.evaluation_config()["trainer"]}
    return sum(node_counts(config, recipe.rewards(member).values()))


def sbatch_stage(
    recipe: Recipe, stages: Sequence[Stage], after: Sequence[str], dependency: str = "afterok"
) -> list[str]:
    """The ``sbatch`` line for stages of one kind and iteration (several: a member array)."""
    first = stages[0]
    shape, cluster = job_shape(recipe, first.kind), recipe.cluster
    words = _sbatch(recipe, first.kind, first.iteration, shape)
    name = first.name
    if first.kind == MEMBER:
        throttle = recipe.values["launcher"]["throttle"]
        indices = ",".join(str(stage.member) for stage in stages)
        words += [f"--array={indices}{f'%{throttle}' if throttle else ''}"]
        words += [f"--signal=B:USR1@{cluster['signal_margin_s']}"]
        name = f"{name.rsplit('_', 1)[0]}_{{:02d}}"
    words += [f"--dependency={dependency}:{':'.join(after)}"] if after else []
    script = [str(checkout() / "slurm" / "task.sh"), cluster["python"]]
    return [*words, *cluster["sbatch"], *script, str(recipe.paths.root), name]


def sbatch_driver(recipe: Recipe, after: Sequence[str]) -> list[str]:
    """The ``sbatch`` line for the next round's driver; runs whatever became of ``after``."""
    shape = job_shape(recipe, DRIVER)
    words = _sbatch(recipe, DRIVER, 0, shape, chdir=os.getcwd())
    words += [f"--dependency=afterany:{':'.join(after)}"] if after else []
    arguments = [word for word in recipe.arguments if word != "launcher.kind=slurm"]
    script = [str(checkout() / "slurm" / "warp_iter.sh"), *arguments]
    return [*words, *recipe.cluster["sbatch"], *script]


def _sbatch(
    recipe: Recipe, kind: str, iteration: int, shape: JobShape, chdir: str | None = None
) -> list[str]:
    cluster = recipe.cluster
    partition = cluster["driver_partition" if _RESOURCES[kind] == "driver" else "partition"]
    name, logs = job_name(recipe, kind, iteration), recipe.paths.slurm_logs
    output = "%A_%a.txt" if kind == MEMBER else "%j.txt"
    words = ["sbatch", "--parsable", f"--job-name={name}", f"--account={cluster['account']}"]
    words += [f"--partition={partition}", f"--time={shape.time}", f"--nodes={shape.nodes}"]
    words += ["--ntasks-per-node=1", *shape.options, "--requeue", "--kill-on-invalid-dep=yes"]
    words += [f"--output={logs}/{name}.{output}", "--open-mode=append"]
    words += [f"--chdir={chdir or checkout()}"]
    pairs = {"NEMO_WARP_ROOT": str(checkout()), "NEMO_WARP_PYTHON": cluster["python"]}
    pairs |= {key: str(value) for key, value in cluster["environment"].items()}
    return [*words, "--export=ALL," + ",".join(f"{k}={v}" for k, v in pairs.items())]
