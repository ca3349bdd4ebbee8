"""Whether a run could live in a directory: locks, space, Slurm's word on each kind of job."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_warp.disk_errors import in_a_sentence
from nemo_warp.health import Check, Status
from nemo_warp.pipeline.commands.checks import lacking_space
from nemo_warp.pipeline.commands.estimate import disk_bytes, size
from nemo_warp.pipeline.commands.housekeeping import bytes_below
from nemo_warp.pipeline.disk import locks
from nemo_warp.pipeline.launch import slurm, slurm_jobs
from nemo_warp.pipeline.launch.steps import checkout
from nemo_warp.pipeline.recipe.load import Recipe, load_recipe
from nemo_warp.places import named

_PATIENCE_S = 10.0
_NODES_WITHIN_S = 60
"""How long the trial on two nodes may wait in the queue."""


def checks_of_run(place: Path, overrides: Sequence[str] = ()) -> Iterator[Check]:
    """Of a run directory, of the one that a recipe names, or of any directory.

    What is tried is written below the directory, or below the one it would be made in, and removed.

    Args:
        place: of the three.
        overrides: ``a.b=c`` arguments of the recipe.
    """
    recipe, root, source = None, place, named(place, "recipes")
    if source.is_file() or (source / "recipe.yaml").exists():
        try:
            recipe = load_recipe(place, overrides, files_here=False)
        except ValueError as error:
            yield Check("recipe", Status.MISSING, str(error), advice=f"nemo-warp plan {place}")
            return
        root = recipe.paths.root
    there = next(p for p in (root, *root.absolute().parents) if p.is_dir())
    with_slurm = recipe is not None and recipe.values["launcher"]["kind"] == "slurm"
    try:
        with tempfile.TemporaryDirectory(prefix=".nemo-warp-doctor-", dir=there) as scratch:
            yield from _locks(Path(scratch), recipe if with_slurm else None)
    except OSError as error:
        said = in_a_sentence(error) or str(error)
        yield Check("run directory", Status.MISSING, said, "writable", "choose another directory")
    yield _space(recipe, there)
    if recipe is not None and with_slurm:
        yield from _submissions(recipe)


def _locks(scratch: Path, recipe: Recipe | None) -> Iterator[Check]:
    try:
        with locks.hold(scratch / "here"):
            held = locks.is_held(scratch / "here")
    except OSError as error:
        said = in_a_sentence(error) or str(error)
        yield Check("locks", Status.MISSING, said, advice="see docs/pipeline.md, Under Slurm")
        return
    status = Status.OK if held and not locks.is_held(scratch / "here") else Status.MISSING
    found = "held on this machine" if status is Status.OK else "flock keeps nobody out here"
    yield Check("locks", status, found, advice="" if held else "choose another file system")
    if recipe is not None:
        yield _locks_between_nodes(scratch, recipe)


def _locks_between_nodes(scratch: Path, recipe: Recipe) -> Check:
    """Two tasks on two nodes; a queue without two free nodes leaves it open."""
    cluster = recipe.cluster
    words = ["srun", f"--account={cluster['account']}", f"--partition={cluster['partition']}"]
    words += ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--gres=none", "--mpi=none"]
    # --immediate: give up if two nodes are not free soon, instead of waiting in the queue.
    words += ["--time=5", f"--immediate={_NODES_WITHIN_S}", "--job-name=warp-doctor", "--quiet"]
    words += [f"--chdir={checkout()}", *cluster["sbatch"], cluster["python"]]
    words += ["-m", "nemo_warp.pipeline.disk.flock_probe"]
    name, by_hand = "locks, 2 nodes", shlex.join([*words, str(scratch.parent)])
    line = f"docs/pipeline.md, Under Slurm; by hand: {by_hand}"
    try:
        slurm.ask([*words, str(scratch)], patience_s=4 * _NODES_WITHIN_S)
    except slurm.SlurmError as error:
        said = str(error).partition(": ")[2]
        told = [text for text in said.splitlines() if text.startswith("error: ")]
        if told:
            return Check(name, Status.MISSING, told[0].removeprefix("error: "), advice=line)
        return Check(name, Status.DIFFERS, f"not tried: {said.splitlines()[-1]}", "held", line)
    return Check(name, Status.OK, "held between two nodes")


def _space(recipe: Recipe | None, there: Path) -> Check:
    free = shutil.disk_usage(there).free
    parts = disk_bytes(recipe) if recipe is not None else None
    if recipe is None or parts is None:
        found = f"{size(free)} free, no estimate"
        advice = "the recipe's estimate.parameters says what is needed"
        return Check("space", Status.DIFFERS, found, "as estimated", advice)
    used = bytes_below(recipe.paths.root) if recipe.paths.root.is_dir() else 0
    found = f"{size(free)} free, {size(max(0, sum(parts.values()) - used))} still needed"
    lacking = lacking_space(recipe, used)
    return Check("space", Status.MISSING if lacking else Status.OK, found, advice=lacking or "")


def _submissions(recipe: Recipe) -> Iterator[Check]:
    """The controller, then every kind of job as ``sbatch --test-only`` sees it."""
    asked = _asked("controller", ["scontrol", "ping"], "ask who runs the cluster")
    yield asked
    if asked.status is Status.MISSING:
        return
    seen = set()
    for stage in recipe.stages:
        resources = slurm_jobs.RESOURCES[stage.kind]
        asked_for = (resources, slurm_jobs.stage_shape(recipe, stage))
        if resources != slurm_jobs.DRIVER and asked_for not in seen:
            seen.add(asked_for)
            yield _tried(resources, slurm_jobs.sbatch_stage(recipe, [stage], []))
    yield _tried("driver", slurm_jobs.sbatch_driver(recipe))


def _tried(kind: str, words: Sequence[str]) -> Check:
    # --begin is left out: Slurm would test whether the job could start in an hour.
    line = [words[0], "--test-only", *(w for w in words[1:] if not w.startswith("--begin="))]
    advice = "change resources, cluster or cluster_overrides of the recipe"
    return _asked(f"sbatch {kind}", line, advice)


def _asked(name: str, words: list[str], advice: str) -> Check:
    try:
        said = slurm.ask(words, _PATIENCE_S, with_errors=True).split("\n")[0]
    except slurm.SlurmError as error:
        said = str(error).rpartition("error: ")[2].splitlines()[-1]
        return Check(name, Status.MISSING, said, advice=advice)
    # scontrol ping succeeds as long as it can print who is down.
    if name == "controller" and "DOWN" in said:
        return Check(name, Status.MISSING, said, advice=advice)
    return Check(name, Status.OK, said.removeprefix("sbatch: "))
