"""The programs of each kind of stage, as steps on an allocation's nodes."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_warp.pipeline.disk.request import Request
from nemo_warp.pipeline.launch.steps import Allocation, Step
from nemo_warp.pipeline.recipe.load import Recipe
from nemo_warp.pipeline.recipe.plan import BENCHMARKS, FINAL, FRONT, MEMBER, PICK, Stage
from nemo_warp.records import Completion, code_version, fsync_directory, hash_file, write_completion

_MODULES = {MEMBER: "nemo_warp.aligner.train", BENCHMARKS: "nemo_warp.aligner.benchmark"}
_MEASURE = "nemo_warp.aligner.evaluate"


def node_counts(
    request_config: dict[str, Any], rewards: Iterable[dict[str, Any]]
) -> tuple[int, int]:
    """Nodes of the actor, and of all reward models together (callables share the actor's)."""
    # A merge or a report has no trainer: one node.
    actor = request_config.get("trainer", {}).get("num_nodes", 1)
    return actor, sum(r.get("nodes", 1) for r in rewards if r.get("model"))


def servers(
    recipe: Recipe, request: Request, allocation: Allocation, directory: Path
) -> list[Step]:
    """A server for each reward and judge that is a callable or a model."""
    next_node, _ = node_counts(request.config, [])
    steps = []
    for name, reward in (request.rewards | request.judges).items():
        if reward.get("endpoint"):
            continue
        nodes = reward.get("nodes", 1) if reward.get("model") else 0
        # Models after the actor's nodes, one behind the other; callables take next to nothing and
        # share the actor's first node.
        hosts = allocation.hosts[next_node : next_node + nodes] if nodes else allocation.hosts[:1]
        next_node += nodes
        endpoint = directory / f"endpoint_{name}.json"
        words = [allocation.python, *_server_words(reward), "--run-id", run_id(recipe, request)]
        words += ["--endpoint-file", str(endpoint)]
        # On one machine servers listen on loopback only: they have no authentication.
        words += ["--host", "0.0.0.0"] if allocation.several_nodes else []
        ranks = reward.get("processes_per_node", 1) if nodes else 0
        steps.append(
            Step(f"reward-{name}", tuple(words), hosts, ranks, gpus=bool(nodes), endpoint=endpoint)
        )
    return steps


def _server_words(reward: dict[str, Any]) -> list[str]:
    extra = [str(word) for word in reward.get("arguments", [])]
    if reward.get("model"):
        words = ["-m", "nemo_warp.aligner.serve_reward_model", "--model", reward["model"]]
        return [*words, *extra]
    words = ["-m", "nemo_warp.rewards.serve", "--callable", reward["callable"], *extra]
    words += ["--batch"] if reward.get("batch") else []
    if reward.get("concurrency", 1) != 1:
        words += ["--concurrency", str(reward["concurrency"])]
    if reward.get("options"):
        words += ["--options", json.dumps(reward["options"], sort_keys=True)]
    return words


def run_id(recipe: Recipe, request: Request) -> str:
    """What reward servers and their client both know: a client of another run is refused."""
    return request.config.get("run", {}).get("name", recipe.name)


def programs(
    recipe: Recipe, stage: Stage, request: Request, allocation: Allocation, directory: Path
) -> list[Step]:
    """The stage's own programs, one after the other."""
    custom = recipe.values["commands"].get(_command_key(stage))
    paths = recipe.paths.stage(stage.name)
    if custom is not None:
        fill = {"directory": paths.directory, "config": paths.config, "run": recipe.paths.root}
        filled = [_filled(str(word), python=allocation.python, **fill) for word in custom]
        return [Step(stage.kind, (*filled, *_endpoints(request, directory)), allocation.hosts[:1])]
    if request.commands:
        return [
            Step(stage.kind, (allocation.python, *words), allocation.hosts[:1])
            for words in request.commands
        ]
    module = _MODULES.get(stage.kind, _MEASURE)
    options = ("--config", str(paths.config), *_endpoints(request, directory))
    words = (allocation.python, "-m", module, *options)
    trainer = request.config["trainer"]
    hosts = allocation.hosts[: trainer["num_nodes"]]
    # srun gives the highest exit code of its tasks, and a rank that was killed because another had
    # failed ends with 137: the first one's is in this file.
    exit_file = directory / f"{stage.kind}.exit"
    # TensorRT-LLM builds its engine shard by shard: MPI's rank must be torch's.
    mpi = request.config["rollout"]["trt_llm"]["enable"]
    return [Step(stage.kind, words, hosts, trainer["devices"], True, mpi, exit_file=exit_file)]


def _filled(word: str, **values: Any) -> str:
    try:
        return word.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        known = ", ".join(f"{{{name}}}" for name in values)
        raise ValueError(f"commands: {word!r} holds {error}; known are {known}") from error


def _command_key(stage: Stage) -> str:
    return {FRONT: "evaluation", PICK: "evaluation", FINAL: "merge"}.get(stage.kind, stage.kind)


def _endpoints(request: Request, directory: Path) -> tuple[str, ...]:
    """Overrides that tell the program where this attempt's servers are."""
    return tuple(
        f"{section}.{index}.endpoint={directory / f'endpoint_{name}.json'}"
        for section, served in (("rewards", request.rewards), ("judges", request.judges))
        for index, (name, reward) in enumerate(served.items())
        if not reward.get("endpoint")
    )


def stop_signal(stage: Stage) -> signal.Signals:
    """What makes the stage's program end well: members save; the others lose nothing."""
    # The same signal that Slurm sends before the time limit, so that there is one way of stopping.
    return signal.SIGUSR1 if stage.kind == MEMBER else signal.SIGTERM


def prepare(recipe: Recipe, stage: Stage) -> None:
    """Clear what an attempt that was killed left half-built (never what is published)."""
    paths = recipe.paths.stage(stage.name)
    for leftover in (paths.building, paths.report):
        shutil.rmtree(leftover, ignore_errors=True)


def publish(recipe: Recipe, stage: Stage, request: Request) -> None:
    """Name the outputs and write the completion record, for programs that write none themselves.

    Safe to be killed in and to repeat: outputs are renamed one by one, the record comes last.
    """
    paths = recipe.paths.stage(stage.name)
    if paths.completion.exists() or not (request.commands or request.building):
        return
    for built, (name, *others) in request.building.items():
        if (paths.building / built).exists():
            (paths.building / built).rename(paths.directory / name)
        for other in others:
            # A hard link: at eta = 1 the merged policy is the next init, and 14 GB need not be
            # there twice.
            (paths.directory / other).unlink(missing_ok=True)
            (paths.directory / other).hardlink_to(paths.directory / name)
    missing = [name for name in request.outputs if not (paths.directory / name).exists()]
    if missing:
        return
    # Renames first, then the record that names the files: after a power cut it must not be alone.
    fsync_directory(paths.directory)
    shutil.rmtree(paths.building, ignore_errors=True)
    files = {name: hash_file(paths.directory / name) for name in request.outputs}
    write_completion(
        paths.directory,
        Completion(
            request.kind,
            request.config_hash,
            files,
            {"inputs": request.inputs, **request.details},
            code_version(),
        ),
    )
