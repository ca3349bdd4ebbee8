"""A recipe in a directory of its own, its stages the fault-injection program."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

PATIENCE_S = 120.0
ROOT = Path(__file__).resolve().parents[2]
FAKE = Path(__file__).with_name("fake_stage.py")


def fake_commands(python: str = sys.executable) -> dict[str, list[str]]:
    return {
        kind: [python, str(FAKE), kind, "{directory}", "{run}"]
        for kind in ("member", "merge", "evaluation", "benchmarks", "report")
    }


def member_of(total_steps: int, **trainer: int) -> dict[str, Any]:
    """A recipe's section ``member``: one process, a checkpoint every second step."""
    return {
        "run": {"total_steps": total_steps, "save_interval": 2},
        "trainer": {"devices": 1, "accelerator": "cpu", **trainer},
        "model": {"tensor_model_parallel_size": 1},
    }


class Sandbox:
    """A recipe in a directory of its own, and the commands on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run_directory = directory / "run"
        self.recipe = directory / "recipe.yaml"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "sft.nemo").write_text("sft")
        for name in ("train", "heldout"):
            (directory / f"{name}.jsonl").write_text('{"prompt": "In the beginning"}\n')
        self.values: dict[str, Any] = {
            "name": "fake",
            "run_directory": str(self.run_directory),
            "iterations": 2,
            "members": 2,
            "sft": str(directory / "sft.nemo"),
            "prompts": {n: str(directory / f"{n}.jsonl") for n in ("train", "heldout")},
            "rewards": {"given": {"weight": 1.0, "endpoint": str(directory / "endpoint.json")}},
            "member": member_of(4),
            "evaluation": {"etas": [0.0, 1.0], "settings": {"towards_sft": False}},
            "front": {"kappas": [0.0, 1.0]},
            "retries": {"without_progress": 2, "stop_grace_s": 20, "ready_deadline_s": 20},
            "commands": fake_commands(),
        }
        self.save()

    def save(self, **changes: Any) -> None:
        self.values |= changes
        self.recipe.write_text(yaml.safe_dump(self.values))

    def fault(self, stage: str, *lines: str) -> None:
        path = self.run_directory / "faults" / stage.replace("/", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines))

    def hold(self) -> None:
        """Members wait after step 2, which they save, for `release`."""
        path = self.run_directory / "faults" / "hold"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def release(self) -> None:
        (self.run_directory / "faults" / "hold").unlink()

    def has_saved(self, stage: str) -> bool:
        return (self.run_directory / stage / "checkpoints").exists()

    def wait_for(self, condition: Callable[[], Any], what: str = "") -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (value := condition()):
            assert time.monotonic() < deadline, what
            time.sleep(0.05)
        return value

    def start(self, command: str = "run", *words: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "nemo_warp.cli", command, str(self.recipe), *words],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def call(self, command: str = "run", *words: str, **environment: str) -> tuple[int, str]:
        process = self.start(command, *words, **environment)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def artifacts(self) -> dict[str, bytes]:
        """Everything the stages published, by relative path."""
        names = ("policy.nemo", "slerp.nemo", "init.nemo", "points.jsonl", "curves.png", "table.md")
        names += ("chosen.json",)
        files = [p for p in self.run_directory.rglob("*") if p.name in names]
        return {str(p.relative_to(self.run_directory)): p.read_bytes() for p in sorted(files)}

    def attempts(self, stage: str) -> int:
        directory = self.run_directory / stage / "attempts"
        return len(list(directory.iterdir())) if directory.exists() else 0
