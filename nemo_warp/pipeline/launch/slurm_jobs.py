"""A run's Slurm jobs: their names, what they ask for, which of them are in the queue.

No job id is kept. Jobs are found again by name: ``warp-<run>-i02-member`` where ``<run>`` is the
recipe's name and a hash of the run directory's first path; the tasks of a member array have the
member's number as index.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from nemo_warp.pipeline.disk.state import QueuedJob
from nemo_warp.pipeline.launch import slurm
from nemo_warp.pipeline.launch.programs import node_counts
from nemo_warp.pipeline.launch.steps import checkout, gpu_options
from nemo_warp.pipeline.recipe.load import Recipe
from nemo_warp.pipeline.recipe.plan import (
    BENCHMARKS,
    EVALUATION,
    FINAL,
    FRONT,
    MEMBER,
    MERGE,
    PICK,
    REPORT,
    Stage,
)
from nemo_warp.places import shared
from nemo_warp.records import write_text_atomically

DRIVER = "driver"
OWN_LAUNCHER = "launcher.kind=slurm"
"""On every job's command line: the job is Slurm's, whatever the stored recipe says by then."""

_OVER = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)
"""States of jobs that Slurm still remembers (for MinJobAge), but will do nothing more with."""
NEVER_SATISFIED = "DependencyNeverSatisfied"
"""Reason of a job whose dependency failed, and of one that Slurm removed because of that."""

RESOURCES = {
    MEMBER: "member",
    MERGE: "merge",
    FINAL: "merge",
    REPORT: "driver",
    EVALUATION: "evaluation",
    FRONT: "evaluation",
    PICK: "evaluation",
    BENCHMARKS: "evaluation",
    DRIVER: "driver",
}
"""Kind of stage -> whose `resources` of the recipe its job asks for."""


@dataclass(frozen=True)
class JobShape:
    """What one job asks for."""

    nodes: int
    gpus_per_node: int
    time: str
    options: tuple[str, ...]


@dataclass
class Look:
    """What Slurm knows of a run's jobs.

    Attributes:
        active: pending and running jobs by stage name (``driver`` for the driver's).
        cancelled: id of a job by stage name that was cancelled, by whomever.
        ids: of all of them, and of those that are over and still remembered.
    """

    active: dict[str, QueuedJob] = field(default_factory=dict)
    cancelled: dict[str, str] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)

    def cancelled_jobs(self, stage: str) -> list[str]:
        """The job of ``stage`` that was cancelled, if one was."""
        return [self.cancelled[stage]] if stage in self.cancelled else []


def run_tag(recipe: Recipe) -> str:
    """Tells this run's jobs from any other's, also after the recipe was renamed."""
    try:
        return recipe.paths.tag.read_text().strip()
    except FileNotFoundError:
        # Names are the only key to jobs; two users' runs of one recipe must not share them.
        digest = hashlib.sha256(str(recipe.paths.root.resolve()).encode()).hexdigest()
        return f"{recipe.name}-{digest[:8]}"


def keep_tag(recipe: Recipe) -> None:
    """Store `run_tag` before the first job is called by it; the driver lock must be held."""
    if not recipe.paths.tag.exists():
        write_text_atomically(recipe.paths.tag, run_tag(recipe) + "\n")


def job_name(recipe: Recipe, stage: Stage) -> str:
    """Name of the job that runs ``stage``."""
    return _job_name(run_tag(recipe), stage.kind, stage.iteration, begins_after(recipe, stage))


def _job_name(tag: str, kind: str, iteration: int, begins_after: int = 0) -> str:
    middle = f"-i{iteration:02d}" if iteration else ""
    window = f"-{begins_after + 1}" if begins_after else ""
    return f"warp-{tag}{middle}-{kind}{window}"


def begins_after(recipe: Recipe, stage: Stage) -> int:
    """The member before the first that one array holds with that of ``stage``; 0 for the others.

    An index is below MaxArraySize: more members than that are several arrays.
    """
    size = recipe.cluster["max_array_size"] - 1
    return (stage.member - 1) // size * size if stage.member else 0


def own_job(recipe: Recipe, stage: Stage) -> str | None:
    """Id of the job this process is in, if the driver submitted that for ``stage``.

    Only then are decisions the Slurm launcher's: which nodes to use, whether to requeue.
    """
    if recipe.values["launcher"]["kind"] != "slurm":
        return None
    return slurm.own_job_id(job_name(recipe, stage))


def queue(recipe: Recipe, patience_s: float = slurm.PATIENCE_S) -> dict[str, QueuedJob]:
    """This run's pending and running jobs by stage name (``driver`` for the driver's).

    Raises:
        SlurmError: the controller does not answer; never take that for an empty queue.
    """
    return look(recipe, patience_s).active


def look(recipe: Recipe, patience_s: float = slurm.PATIENCE_S) -> Look:
    """All of this run's jobs that Slurm knows, but for the one this process is in.

    Raises:
        SlurmError: the controller does not answer; never take that for an empty queue.
    """
    tag = run_tag(recipe)
    stages: dict[tuple[str, int], str] = {(_job_name(tag, DRIVER, 0), 0): DRIVER}
    for stage in recipe.stages:
        after = begins_after(recipe, stage)
        index = stage.member - after
        stages[_job_name(tag, stage.kind, stage.iteration, after), index] = stage.name
    names = ",".join(sorted({name for name, _ in stages}))
    # --array: one line per task, also for tasks that are still pending together.
    words = ["squeue", "--noheader", "--array", "--states=all", f"--name={names}"]
    found = Look()
    for line in slurm.ask([*words, "--format=%j|%F|%K|%T|%r"], patience_s).splitlines():
        # At most 4 splits: a reason is free text and may hold the separator.
        name, job, array_index, state, reason = line.split("|", 4)
        # %K is "N/A" for jobs that are no array.
        index = int(array_index) if array_index.isdigit() else 0
        found.ids.add(job)
        # Somebody else's jobs of these names, and this one's own, are not the run's.
        stage_name = stages.get((name, index))
        if stage_name is None or job == slurm.own_job_id(name):
            continue
        job_id = f"{job}_{index}" if index else job
        if state not in _OVER:
            known = QueuedJob(job_id, state, "" if reason == "None" else reason)
            found.active[stage_name] = known
        elif state == "CANCELLED" and reason != NEVER_SATISFIED:
            found.cancelled[stage_name] = job_id
    return found


def job_shape(recipe: Recipe, kind: str, iteration: int = 0, member: int = 0) -> JobShape:
    """Nodes, GPUs, time and options of a job of a kind.

    Args:
        iteration, member: whose; 0 is the largest of all.
    """
    cluster, wanted = recipe.cluster, recipe.values["resources"][RESOURCES[kind]]
    gpus = wanted["gpus_per_node"]
    gpus = cluster["gpus_per_node"] if gpus is None else gpus
    options = gpu_options(cluster, gpus) if gpus else []
    cpus, memory = wanted["cpus_per_node"], wanted["memory"]
    cpus = cluster["cpus_per_node"] if cpus is None else cpus
    memory = cluster["memory"] if memory is None else memory
    options += [f"--cpus-per-task={cpus}"] if cpus else []
    options += [f"--mem={memory}"] if memory is not None else []
    # The driver is a small script: a node of its own would be wasted on it.
    options += ["--exclusive"] if cluster["exclusive"] and RESOURCES[kind] != "driver" else []
    time_limit, nodes = str(wanted["time"]), _nodes(recipe, kind, iteration, member)
    return JobShape(nodes, gpus, time_limit, (*options, *map(str, wanted["options"])))


def _nodes(recipe: Recipe, kind: str, iteration: int, member: int) -> int:
    if kind == BENCHMARKS:
        return recipe.evaluation_config()["trainer"]["num_nodes"]
    if kind in (EVALUATION, FRONT, PICK):
        config = {"trainer": recipe.evaluation_config()["trainer"]}
        return sum(node_counts(config, [*recipe.rewards().values(), *recipe.judges.values()]))
    if kind != MEMBER:
        return 1
    alike = list(recipe.different_members())
    iterations = {iteration} if iteration else {i for i, _ in alike}
    members = {member} if member else {m for _, m in alike}
    return max(
        sum(
            node_counts(
                recipe.member_config(i, m), [*recipe.rewards(m).values(), *recipe.judges.values()]
            )
        )
        for i in iterations
        for m in members
    )


def stage_shape(recipe: Recipe, stage: Stage) -> JobShape:
    """What the job of ``stage`` asks for."""
    return job_shape(recipe, stage.kind, stage.iteration, stage.member)


def sbatch_stage(
    recipe: Recipe, stages: Sequence[Stage], after: Sequence[str], dependency: str = "afterok"
) -> list[str]:
    """The ``sbatch`` line for stages of one kind, iteration and shape (several: a member array)."""
    first = stages[0]
    shape, cluster = stage_shape(recipe, first), recipe.cluster
    words = _sbatch(recipe, first.kind, job_name(recipe, first), shape)
    name, after_member = first.name, begins_after(recipe, first)
    if first.kind == MEMBER:
        throttle = recipe.values["launcher"]["throttle"]
        indices = _ranges([stage.member - after_member for stage in stages])
        # Indices are the members' numbers, so a later array may hold only those that are missing.
        # (Heterogeneous jobs cannot be arrays, so servers share the member's own allocation.)
        words += [f"--array={indices}{f'%{throttle}' if throttle else ''}"]
        # B: only the batch script gets it, which passes it on to the program alone. Slurm sends it
        # up to 60 s early (seen: 56 s before the limit for @30).
        words += [f"--signal=B:USR1@{cluster['signal_margin_s']}"]
        # The script puts the array index into the braces.
        name = f"{name.rsplit('_', 1)[0]}_{{:02d}}"
    words += [f"--dependency={dependency}:{':'.join(after)}"] if after else []
    script = [str(shared("slurm") / "task.sh"), cluster["python"]]
    script += [str(recipe.paths.root), name, OWN_LAUNCHER]
    script += [f"--array-begins-after={after_member}"] if after_member else []
    return [*words, *cluster["sbatch"], *script]


def _ranges(numbers: Sequence[int]) -> str:
    """``1,2,5-9``: a line of 999 numbers is longer than some sites allow."""
    parts: list[str] = []
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        whole = len(found) > 2
        parts += [f"{found[0]}-{found[-1]}"] if whole else [str(number) for number in found]
    return ",".join(parts)


def sbatch_driver(recipe: Recipe) -> list[str]:
    """The ``sbatch`` line for the next round's driver, which begins in an hour (see `follow`)."""
    shape = job_shape(recipe, DRIVER)
    name = _job_name(run_tag(recipe), DRIVER, 0)
    words = _sbatch(recipe, DRIVER, name, shape, chdir=os.getcwd())
    words += ["--begin=now+1hour"]
    arguments = [word for word in recipe.arguments if word != OWN_LAUNCHER]
    script = [str(shared("slurm") / "warp_iter.sh"), *arguments]
    return [*words, *recipe.cluster["sbatch"], *script]


def follow(driver: str, after: Sequence[str]) -> list[str]:
    """The ``scontrol`` line that lets ``driver`` begin once ``after`` have ended, however."""
    jobs = ":".join(after)
    return ["scontrol", "update", f"JobId={driver}", "StartTime=now", f"Dependency=afterany:{jobs}"]


def _sbatch(
    recipe: Recipe, kind: str, name: str, shape: JobShape, chdir: str | None = None
) -> list[str]:
    cluster = recipe.cluster
    partition = cluster["driver_partition" if RESOURCES[kind] == "driver" else "partition"]
    logs = str(recipe.paths.slurm_logs).replace("%", "%%")  # % begins one of Slurm's symbols
    output = "%A_%a.txt" if kind == MEMBER else "%j.txt"
    words = ["sbatch", "--parsable", f"--job-name={name}", f"--account={cluster['account']}"]
    words += [f"--partition={partition}", f"--time={shape.time}", f"--nodes={shape.nodes}"]
    # --requeue: without it, a site's default may leave a job dead after a node failure.
    words += ["--ntasks-per-node=1", *shape.options, "--requeue", "--kill-on-invalid-dep=yes"]
    # Appended: a requeued job opens the same file again and would truncate it.
    words += [f"--output={logs}/{name}.{output}", "--open-mode=append"]
    words += [f"--chdir={chdir or checkout()}"]
    pairs = {"NEMO_WARP_ROOT": str(checkout()), "NEMO_WARP_PYTHON": cluster["python"]}
    pairs |= {key: str(value) for key, value in cluster["environment"].items()}
    # ALL: the environment was cleaned before (environment.for_slurm), and sites need their modules.
    return [*words, "--export=ALL," + ",".join(f"{k}={v}" for k, v in pairs.items())]
