"""Where everything of a run is. No other module builds a path below the run directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_warp.records import COMPLETION_FILE


@dataclass(frozen=True)
class RunPaths:
    """The files of one run directory."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe; its presence makes a directory a run directory."""
        return self.root / "recipe.yaml"

    @property
    def driver_lock(self) -> Path:
        """Held by the driver while it looks and launches: two drivers never act at once."""
        return self.root / "locks" / "driver.lock"

    @property
    def stop(self) -> Path:
        """While it exists nothing starts and running members save and stop."""
        return self.root / "STOP"

    @property
    def inputs(self) -> Path:
        """Fingerprints of the inputs the run was started with."""
        return self.root / "inputs.json"

    @property
    def redo(self) -> Path:
        """Names of finished stages that somebody wants to be made again."""
        return self.root / "locks" / "redo.json"

    @property
    def other_code(self) -> Path:
        """The iteration and the version of the code that somebody wants to end it with."""
        return self.root / "locks" / "other_code.txt"

    @property
    def notified(self) -> Path:
        """The last event that `notify` was told of."""
        return self.root / "locks" / "notified.txt"

    @property
    def superseded(self) -> Path:
        """Stage directories that were moved aside because an input changed; may be deleted."""
        return self.root / "superseded"

    @property
    def slurm_logs(self) -> Path:
        """Output of the batch scripts (the stages' own logs are in their attempts)."""
        return self.root / "slurm"

    @property
    def last_round(self) -> Path:
        """How far everything was when the last driver looked: rounds that move nothing end."""
        return self.slurm_logs / "last_round.txt"

    @property
    def tag(self) -> Path:
        """What this run's jobs are called, however a node names the run directory."""
        return self.root / "locks" / "tag.txt"

    def task_log(self, name: str) -> Path:
        """Output of the local tasks of a stage (the program's own is in its attempts)."""
        return self.root / "local" / f"{name.replace('/', '.')}.txt"

    def stage(self, name: str) -> StagePaths:
        """The files of the stage ``name``, e.g. ``iteration_01/member_02``."""
        flat = name.replace("/", ".")
        return StagePaths(
            self.root / name,
            self.root / "locks" / f"{flat}.lock",
            self.root / "cancelled" / f"{flat}.json",
        )


@dataclass(frozen=True)
class StagePaths:
    """The files of one stage.

    Attributes:
        directory: everything else is below it.
        lock: outside the directory, which may be moved aside.
        cancelled: whether somebody cancelled its job, which may never have begun.
    """

    directory: Path
    lock: Path
    cancelled: Path

    @property
    def request(self) -> Path:
        """What this stage is asked to do, and the hashes of what it reads."""
        return self.directory / "stage.json"

    @property
    def config(self) -> Path:
        """Configuration of the member or the evaluation, complete."""
        return self.directory / "config.yaml"

    @property
    def completion(self) -> Path:
        """The record that ends the stage."""
        return self.directory / COMPLETION_FILE

    @property
    def metrics(self) -> Path:
        """A member's metrics, a JSON object per line."""
        return self.directory / "metrics.jsonl"

    @property
    def points(self) -> Path:
        """An evaluation's points, a JSON object per line."""
        return self.directory / "points.jsonl"

    @property
    def chosen(self) -> Path:
        """What the search for a KL chose."""
        return self.directory / "chosen.json"

    @property
    def checkpoints(self) -> Path:
        """A member's training checkpoints, ``step_00000040`` and so on."""
        return self.directory / "checkpoints"

    @property
    def policy(self) -> Path:
        """What a member or the final merge publishes."""
        return self.directory / "policy.nemo"

    @property
    def slerp(self) -> Path:
        """A merge's eta = 1 output."""
        return self.directory / "slerp.nemo"

    @property
    def next_init(self) -> Path:
        """A merge's output at the recipe's eta: where the next iteration starts."""
        return self.directory / "init.nemo"

    @property
    def building(self) -> Path:
        """Where a merge writes before its outputs are renamed into place."""
        return self.directory / "building"

    @property
    def report(self) -> Path:
        """A merge's report."""
        return self.directory / "report"

    @property
    def attempts(self) -> Path:
        """One directory per attempt: ``001``, ``002``, ..."""
        return self.directory / "attempts"
