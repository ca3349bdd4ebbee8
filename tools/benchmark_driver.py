#!/usr/bin/env python3
"""What the driver costs: a round with many members, and the gaps between the stages of a run.

python tools/benchmark_driver.py --members 64 --iterations 5     # made-up run, no Slurm needed
python tools/benchmark_driver.py --run runs/tiny                 # gaps in a real one
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nemo_warp.pipeline.disk.opening import open_run  # noqa: E402
from nemo_warp.pipeline.disk.request import build_request  # noqa: E402
from nemo_warp.pipeline.recipe.load import Recipe, load_recipe  # noqa: E402
from nemo_warp.pipeline.recipe.plan import MEMBER, MERGE  # noqa: E402
from nemo_warp.records import (  # noqa: E402
    Completion,
    FileHash,
    write_completion,
    write_json_atomically,
)


def main() -> int:
    """Print the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a finished run: print the gaps in it")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--members", type=int, default=64)
    args = parser.parse_args()
    if args.run:
        gaps(load_recipe(args.run))
    else:
        with tempfile.TemporaryDirectory(prefix="warp-bench-") as directory:
            rounds(Path(directory), args.iterations, args.members)
    return 0


def rounds(directory: Path, iterations: int, members: int) -> None:
    """Time ``nemo-warp run`` under a Slurm that accepts everything, iteration by iteration."""
    recipe = _recipe(directory, iterations, members)
    open_run(recipe)
    environment = {**os.environ, "PATH": f"{_accepting_slurm(directory)}:{os.environ['PATH']}"}
    for iteration in range(1, iterations + 1):
        words = [sys.executable, "-m", "nemo_warp.cli", "run", str(directory / "recipe.yaml")]
        wall, cpu = _timed(words, environment)
        status, _ = _timed([*words[:3], "status", str(directory / "run")], environment)
        print(f"iteration {iteration} of {iterations} x {members} members: round {wall:.2f} s "
              f"({cpu:.2f} s CPU), status {status:.2f} s")  # fmt: skip
        _finish(recipe, iteration)


def _timed(words: list[str], environment: dict[str, str]) -> tuple[float, float]:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - began, after.ru_utime - before.ru_utime


def _recipe(directory: Path, iterations: int, members: int) -> Recipe:
    for name in ("sft.nemo", "train.jsonl", "heldout.jsonl"):
        (directory / name).write_text("{}\n")
    cluster = {"account": "a", "partition": "p"}
    (directory / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    values = {
        "name": "bench",
        "run_directory": str(directory / "run"),
        "iterations": iterations,
        "members": members,
        "sft": str(directory / "sft.nemo"),
        "prompts": {n: str(directory / f"{n}.jsonl") for n in ("train", "heldout")},
        "rewards": {"r": {"weight": 1.0, "callable": "a:b"}},
        "launcher": {"kind": "slurm"},
        "cluster": str(directory / "cluster.yaml"),
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(values))
    return load_recipe(directory / "recipe.yaml")


def _accepting_slurm(directory: Path) -> Path:
    """``squeue`` that sees nothing and ``sbatch`` that accepts everything."""
    programs = directory / "bin"
    programs.mkdir()
    for name, line in (("squeue", "true"), ("sbatch", "echo 1"), ("scancel", "true")):
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    return programs


def _finish(recipe: Recipe, iteration: int) -> None:
    """Write the records of an iteration's members and merge."""
    for stage in recipe.stages:
        if stage.iteration != iteration or stage.kind not in (MEMBER, MERGE):
            continue
        paths, request = recipe.paths.stage(stage.name), build_request(recipe, stage)
        paths.directory.mkdir(parents=True)
        write_json_atomically(paths.request, request.record())
        files = {name: FileHash(1, "0" * 64) for name in request.outputs}
        details = {}
        if stage.kind == MEMBER:
            run = request.config["run"]
            details = {"step": run["total_steps"], "seed": run["seed"]}
        completion = Completion(stage.kind, request.config_hash, files, details, "benchmark")
        write_completion(paths.directory, completion)


def gaps(recipe: Recipe) -> None:
    """From the last member's end to the next iteration's first step, without the merge."""
    for iteration in range(1, recipe.values["iterations"]):
        stages = [s for s in recipe.stages if s.iteration in (iteration, iteration + 1)]
        members = {s.name: s.iteration for s in stages if s.kind == MEMBER}
        merge = next(s.name for s in stages if s.kind == MERGE and s.iteration == iteration)
        finished = [recipe.paths.stage(n).completion for n, i in members.items() if i == iteration]
        last = max(path.stat().st_mtime for path in finished)
        began = _started(recipe, merge)
        ended = recipe.paths.stage(merge).completion.stat().st_mtime
        following = [name for name, i in members.items() if i == iteration + 1]
        first = min(_started(recipe, name) for name in following)
        step = min(_first_step(recipe, name) for name in following)
        parts = {
            "last member to merge": began - last,
            "merge": ended - began,
            "merge to next member": first - ended,
            "member's start to its first record": step - first,
        }
        listed = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts.items())
        print(f"iteration {iteration} -> {iteration + 1}: {listed}")


def _started(recipe: Recipe, name: str) -> float:
    last = sorted(recipe.paths.stage(name).attempts.iterdir())[-1]
    return json.loads((last / "attempt.json").read_text())["started"]


def _first_step(recipe: Recipe, name: str) -> float:
    """When the first record was written: creation time is not kept, so from the timings."""
    paths = recipe.paths.stage(name)
    timings = paths.directory / "timings.jsonl"
    files = [p for p in (timings, paths.metrics) if p.exists()]
    tensorboard = sorted((paths.directory / "tensorboard").glob("events*"))
    if tensorboard:  # events.out.tfevents.<seconds>.<host>...: opened when training begins
        return float(tensorboard[0].name.split(".")[3])
    return min(p.stat().st_mtime for p in files)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
