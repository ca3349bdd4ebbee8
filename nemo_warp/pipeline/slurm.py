"""Slurm's commands: what is asked of them, and what they answer. No state is kept of jobs.

Jobs are found again by name: ``warp-<run>-i02-member`` where ``<run>`` is the recipe's name and a
hash of the run directory; the tasks of a member array have the member's number as index.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemo_warp.pipeline.plan import EVALUATION, FINAL, FRONT, MEMBER, MERGE, REPORT, Stage
from nemo_warp.pipeline.programs import node_counts
from nemo_warp.pipeline.recipe import Recipe
from nemo_warp.pipeline.state import QueuedJob
from nemo_warp.pipeline.steps import checkout, gpu_options

DRIVER = "driver"
_PATIENCE_S = 600.0
"""How long a controller that does not answer (restarting, overloaded) is asked again."""

_RESOURCES = {
    MEMBER: "member",
    MERGE: "merge",
    FINAL: "merge",
    REPORT: "driver",
    EVALUATION: "evaluation",
    FRONT: "evaluation",
    DRIVER: "driver",
}


class SlurmError(Exception):
    """Slurm refused a command or does not answer."""


@dataclass(frozen=True)
class JobShape:
    """What one job asks for."""

    nodes: int
    gpus_per_node: int
    time: str
    options: tuple[str, ...]


def in_job() -> bool:
    """Whether this process is the batch script of a job."""
    return "SLURM_JOB_ID" in os.environ


def own_job_id() -> str:
    """Id that means this job or this array task only.

    ``SLURM_JOB_ID`` of an array's last task is the id of the whole array: requeueing it would
    take the healthy siblings along.
    """
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def requeue_this_job() -> None:
    """Requeue this job before it ends, then wait for Slurm to end this process.

    Returns when the controller will not (the job is being cancelled, or may not be requeued).
    """
    try:
        ask(["scontrol", "requeue", own_job_id()])
    except SlurmError as error:
        print(f"cannot be requeued: {error}", flush=True)
        return
    time.sleep(300)


def run_tag(recipe: Recipe) -> str:
    """Tells this run's jobs from any other's, also after the recipe was renamed."""
    digest = hashlib.sha256(str(recipe.paths.root.resolve()).encode()).hexdigest()
    return f"{recipe.name}-{digest[:8]}"


def job_name(recipe: Recipe, kind: str, iteration: int = 0) -> str:
    """Name of the job that runs the stages of a kind in an iteration."""
    middle = f"-i{iteration:02d}" if iteration else ""
    return f"warp-{run_tag(recipe)}{middle}-{kind}"


def queue(recipe: Recipe, patience_s: float = _PATIENCE_S) -> dict[str, QueuedJob]:
    """This run's jobs by stage name (``driver`` for the driver's), pending and running.

    Raises:
        SlurmError: the controller does not answer; never take that for an empty queue.
    """
    stages: dict[tuple[str, int], str] = {(job_name(recipe, DRIVER), 0): DRIVER}
    for stage in recipe.stages:
        name = job_name(recipe, stage.kind, stage.iteration)
        stages[name, stage.member] = stage.name
    names = ",".join(sorted({name for name, _ in stages}))
    lines = ask(
        ["squeue", "--noheader", "--array", f"--name={names}", "--format=%j|%F|%K|%T|%r"],
        patience_s,
    )
    jobs: dict[str, QueuedJob] = {}
    for line in lines.splitlines():
        name, job, index, state, reason = line.split("|", 4)
        member = int(index) if index.isdigit() else 0
        job_id = f"{job}_{member}" if member else job
        found = QueuedJob(job_id, state, "" if reason == "None" else reason)
        own = in_job() and job == os.environ["SLURM_JOB_ID"]
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


def submit(words: Sequence[str]) -> str:
    """Submit; returns the job id.

    Raises:
        SlurmError: refused.
    """
    return ask(words).strip().split(";")[0]


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs; those that have ended meanwhile do not matter."""
    if job_ids:
        ask(["scancel", "--quiet", *job_ids])


def ask(words: Sequence[str], patience_s: float = _PATIENCE_S) -> str:
    """Run a Slurm command and return what it prints; asks again while the controller is away.

    Raises:
        SlurmError: it refused, is not installed, or did not answer for minutes.
    """
    deadline, pause = time.monotonic() + patience_s, 1.0
    while True:
        try:
            result = subprocess.run(
                words, capture_output=True, text=True, check=False, env=_clean_environment(words)
            )
        except FileNotFoundError:
            raise SlurmError(f"{words[0]} is not installed here; run this where Slurm is") from None
        if result.returncode == 0:
            return result.stdout
        message = result.stderr.strip()
        if not _controller_away(message) or time.monotonic() > deadline:
            raise SlurmError(f"{shlex.join(words)}: {message or f'exit code {result.returncode}'}")
        print(f"{words[0]}: {message}; asking again", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(2 * pause, 30.0)


def _controller_away(message: str) -> bool:
    signs = ("Unable to contact", "Socket timed out", "Connection refused", "slurm_load_jobs",
             "Zero Bytes were transmitted", "Communication connection failure")  # fmt: skip
    return any(sign in message for sign in signs) and "Invalid job id" not in message


def _clean_environment(words: Sequence[str]) -> dict[str, Any]:
    """Without this job's own limits, which a job submitted from here would inherit."""
    if words[0] != "sbatch":
        return dict(os.environ)
    kept = ("SLURM_CONF", "SLURM_CONF_SERVER")
    return {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k in kept}
