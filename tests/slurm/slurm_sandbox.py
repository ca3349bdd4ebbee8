"""A fault-injection recipe on the emulated cluster."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from cluster import Cluster
from sandbox import ROOT, Sandbox

from nemo_warp.pipeline.launch import slurm_jobs
from nemo_warp.pipeline.recipe.load import load_recipe

PATIENCE_S = 240.0


class SlurmSandbox(Sandbox):
    """Adds the cluster: submit, wait, look."""

    def __init__(self, directory: Path, cluster: Cluster, **changes: Any) -> None:
        super().__init__(directory)
        self.cluster = cluster
        cluster_changes = changes.pop("cluster_changes", {})
        self.patience_s = changes.pop("patience_s", PATIENCE_S)
        file = directory / "cluster.yaml"
        values = {
            "account": "default",
            "partition": "debug",
            "gpus_per_node": 0,
            "exclusive": False,
            "python": sys.executable,
            "signal_margin_s": 5,
            **cluster_changes,
        }
        file.write_text(yaml.safe_dump(values))
        defaults = {
            "iterations": 1,
            "launcher": {"kind": "slurm"},
            "cluster": str(file),
            "resources": {"driver": {"memory": None}},
        }
        self.save(**{**defaults, **changes})

    def submit(self) -> str:
        """``sbatch slurm/warp_iter.sh RECIPE``; the job's id."""
        output = self.directory / "driver-%j.txt"
        words = ["sbatch", "--parsable", f"--output={output}", "slurm/warp_iter.sh"]
        return self.cluster.command(*words, str(self.recipe), cwd=ROOT)

    def state(self) -> dict[str, Any]:
        """``nemo-warp status --json``."""
        code, output = self.call("status", "--json")
        assert code in (0, 1, 75, 85), output
        return json.loads(output[output.index("{") :])

    def stage(self, name: str) -> dict[str, Any]:
        return next(s for s in self.state()["stages"] if s["name"] == name)

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + self.patience_s
        while True:
            value = condition()
            if value:
                return value
            if time.monotonic() > deadline:
                raise AssertionError(f"waited for {what}\n{self.history()}")
            time.sleep(0.5)

    def wait_until_done(self) -> None:
        """Every stage is done (seen on disk, so that Slurm is not asked all the time)."""
        self.wait_for((self.run_directory / "report" / "completion.json").exists, "the report")

    def wait_until_running(self, stage: str) -> int:
        """The stage has an attempt that has saved; the supervisor's process id."""
        self.wait_for(lambda: self.has_saved(stage), f"{stage} to save")
        return self.attempt(stage, -1)["pid"]

    def wait_until_attempt(self, stage: str, number: int) -> None:
        self.wait_for(lambda: self.attempts(stage) >= number, f"attempt {number} at {stage}")

    def wait_until_queue_is_empty(self) -> None:
        self.wait_for(lambda: not self.jobs(), "the queue to be empty")

    def jobs(self) -> list[str]:
        """``name id state`` of this run's jobs."""
        lines = self.cluster.command("squeue", "-h", "-r", "-o", "%j %i %T").splitlines()
        return [line for line in lines if self.tag in line]

    @functools.cached_property
    def tag(self) -> str:
        return slurm_jobs.run_tag(load_recipe(self.recipe))

    def attempt(self, stage: str, index: int) -> dict[str, Any]:
        directories = sorted((self.run_directory / stage / "attempts").iterdir())
        return json.loads((directories[index] / "attempt.json").read_text())

    def ending(self, stage: str, index: int) -> dict[str, Any]:
        directories = sorted((self.run_directory / stage / "attempts").iterdir())
        return json.loads((directories[index] / "exit.json").read_text())

    def history(self) -> str:
        """What the jobs wrote, for a failing test."""
        logs = [*self.directory.glob("driver-*.txt"), *(self.run_directory / "slurm").glob("*")]
        texts = [f"--- {log.name}\n{log.read_text()[-1500:]}" for log in sorted(logs)]
        return "\n".join([*self.jobs(), *texts])


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all its descendants, as when their node loses power."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    for process in found:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
