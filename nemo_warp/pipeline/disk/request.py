"""What a stage is asked to do: its configuration, the contents it reads, its command.

A request follows from the recipe and from the completion records of the stages before it. Its copy
on disk (``stage.json``) is compared with the request that is wanted later: if an input was made
again and is different, the finished stage is no longer the one that is wanted.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_warp.config import identity_hash
from nemo_warp.pipeline.disk.contents import Contents, OnDisk, Unknown, refuse_twins
from nemo_warp.pipeline.recipe.load import Recipe
from nemo_warp.pipeline.recipe.paths import StagePaths
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
    member_name,
    merge_name,
)
from nemo_warp.records import RecordError, config_hash


@dataclass(frozen=True)
class Request:
    """What one stage is asked to do.

    Attributes:
        kind: as in `nemo_warp.pipeline.recipe.plan`.
        config: its whole configuration, plain; written to ``config.yaml``.
        inputs: name -> hash of the contents of everything it reads.
        reads: the files among them.
        outputs: files it has to leave behind.
        commands: words after the interpreter, of programs to run one after the other (none for
            members and evaluations, which are parallel jobs).
        building: file written below ``building/`` -> its names once published.
        rewards, judges: what the stage asks, by name, in the order of its configuration.
    """

    kind: str
    config: dict[str, Any]
    inputs: dict[str, str]
    reads: tuple[Path, ...]
    outputs: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...] = ()
    building: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rewards: dict[str, dict[str, Any]] = field(default_factory=dict)
    judges: dict[str, dict[str, Any]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    """What the completion record tells beside the inputs, of stages whose programs write none."""

    @functools.cached_property
    def config_hash(self) -> str:
        """What the completion record must carry."""
        return identity_hash(self.config)

    def record(self) -> dict[str, Any]:
        """What ``stage.json`` holds."""
        return {"kind": self.kind, "config_hash": self.config_hash, "inputs": self.inputs}


def build_request(recipe: Recipe, stage: Stage) -> Request:
    """The request of ``stage``; every stage it needs must be done.

    Raises:
        RecordError: a record before it is missing or contradicts the recipe.
    """
    contents = OnDisk(recipe)
    if stage.kind == MERGE:
        members = [name for name in stage.needs if name != merge_name(stage.iteration - 1)]
        refuse_twins({name: contents.completion(name) for name in members})
    return request_of(recipe, stage, contents)


def planned_request(recipe: Recipe, stage: Stage) -> Request:
    """`build_request` before anything has run: inputs have no hashes yet."""
    return request_of(recipe, stage, Unknown())


def request_of(recipe: Recipe, stage: Stage, contents: Contents) -> Request:
    """The request of ``stage`` if its inputs have these contents."""
    return _BUILDERS[stage.kind](recipe, stage, contents)


def read_request(paths: StagePaths) -> dict[str, Any] | None:
    """The record of the request a stage directory was made for, or None."""
    try:
        return json.loads(paths.request.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RecordError(f"{paths.request} cannot be read ({error}); remove the stage") from error


def _init_of(recipe: Recipe, iteration: int, contents: Contents) -> tuple[Path, str]:
    """theta_init of ``iteration`` and the hash of its contents."""
    if iteration == 1:
        return Path(recipe.values["init"]), contents.pinned("init")
    name = merge_name(iteration - 1)
    path = recipe.paths.stage(name).next_init
    return path, contents.published(name, path.name)


def _member(recipe: Recipe, stage: Stage, contents: Contents) -> Request:
    init, init_hash = _init_of(recipe, stage.iteration, contents)
    config = recipe.member_config(stage.iteration, stage.member)
    config["run"]["directory"] = str(recipe.paths.stage(stage.name).directory)
    config["init"] = str(init)
    rewards = recipe.rewards(stage.member)
    inputs = {"init": init_hash, "sft": contents.pinned("sft"), **_hashes(rewards, contents)}
    inputs |= {key: contents.pinned(key) for key in ("prompts.train", "prompts.heldout")}
    reads = (init, Path(recipe.values["sft"]), *map(Path, recipe.values["prompts"].values()))
    # Judges are none of its inputs: what is only measured makes no other member.
    outputs = ("policy.nemo",)
    return Request(MEMBER, config, inputs, reads, outputs, rewards=rewards, judges=recipe.judges)


def _merge(recipe: Recipe, stage: Stage, contents: Contents) -> Request:
    values, merge = recipe.values, recipe.paths.stage(stage.name)
    names = [member_name(stage.iteration, m) for m in range(1, values["members"] + 1)]
    policies = {name: recipe.paths.stage(name).policy for name in names}
    init, init_hash = _init_of(recipe, stage.iteration, contents)
    inputs = {name: contents.published(name, path.name) for name, path in policies.items()}
    inputs |= {"init": init_hash, "sft": contents.pinned("sft")}
    settings = {**values["merge"], "eta": recipe.eta(stage.iteration)}
    config = {key: value for key, value in settings.items() if value is not None}
    towards = Path(values["sft"]) if config["towards"] == "sft" else None
    # The next init is written while the layers are in memory anyway: one pass gives both.
    names_by_eta: dict[float | str, tuple[str, ...]] = {
        1.0: (merge.slerp.name,),
        config["eta"]: (merge.next_init.name,),
    }
    if config["eta"] == 1.0:
        # One output under two names, which publishing makes a hard link.
        names_by_eta = {1.0: (merge.slerp.name, merge.next_init.name)}
    policy_paths = _checkpoints(recipe, names) or list(policies.values())
    words = _merge_words(merge, init, policy_paths, names_by_eta, config["arguments"], towards)
    outputs = (merge.slerp.name, merge.next_init.name)
    reads = (init, *policy_paths)
    return Request(MERGE, config, inputs, reads, outputs, (words,), _building(names_by_eta))


def _checkpoints(recipe: Recipe, names: list[str]) -> list[Path]:
    """Training checkpoints to average along the runs, where the recipe wants that."""
    steps = recipe.values["merge"]["average_steps"] or []
    return [recipe.paths.stage(n).checkpoints / f"step_{s:08d}" for n in names for s in steps]


def _merge_words(
    paths: StagePaths,
    init: Path,
    policies: list[Path],
    etas: Iterable[float | str],
    arguments: Iterable[Any],
    towards: Path | None,
) -> tuple[str, ...]:
    """The merger: every eta in one pass over the data."""
    words = ["-m", "nemo_warp.merge", "--init", str(init), "--policies", *map(str, policies)]
    words += ["--eta", *map(_word, etas)]
    # Written below building/ and renamed by the pipeline: the published name says "complete".
    words += ["--output", str(paths.building / "{eta}.nemo"), "--report", str(paths.report)]
    words += ["--liti-towards", str(towards)] if towards is not None else []
    return (*words, *map(str, arguments))


def _building(names_by_eta: dict[float | str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {f"{_word(eta)}.nemo": names for eta, names in names_by_eta.items()}


def _word(eta: float | str) -> str:
    """As the merger names its outputs."""
    return eta if isinstance(eta, str) else f"{eta:g}"


def _evaluation(recipe: Recipe, stage: Stage, contents: Contents) -> Request:
    init, init_hash = _init_of(recipe, stage.iteration, contents)
    etas = recipe.values["evaluation"]["etas"]
    return _measure(recipe, stage, contents, init, init_hash, etas)


def _front(recipe: Recipe, stage: Stage, contents: Contents) -> Request:
    sft, kappas = Path(recipe.values["sft"]), recipe.values["front"]["kappas"]
    return _measure(recipe, stage, contents, sft, contents.pinned("sft"), kappas)


def _measure(
    recipe: Recipe, stage: Stage, contents: Contents, base: Path, base_hash: str, etas: list[float]
) -> Request:
    merge = merge_name(stage.iteration)
    slerp, rewards = recipe.paths.stage(merge).slerp, recipe.rewards()
    config = recipe.evaluation_config() | {
        "directory": str(recipe.paths.stage(stage.name).directory),
        "base": str(base),
        "slerp": str(slerp),
        "sft": recipe.values["sft"],
        "etas": [float(eta) for eta in etas],
    }
    inputs = {
        "base": base_hash,
        "slerp": contents.published(merge, slerp.name),
        "sft": contents.pinned("sft"),
        "prompts.heldout": contents.pinned("prompts.heldout"),
        **_hashes(rewards, contents),
        **_hashes(recipe.judges, contents, "judge"),
    }
    reads, outputs = (base, slerp, Path(recipe.values["sft"])), ("points.jsonl",)
    return Request(
        stage.kind, config, inputs, reads, outputs, rewards=rewards, judges=recipe.judges
    )


def _pick(recipe: Recipe, stage: Stage, contents: Contents) -> Request:
    """Search the front, whose points are known, for the policy at the KL that is wanted."""
    wanted, known = recipe.values["front"], recipe.paths.stage(FRONT).points
    request = _front(recipe, stage, contents)
    pick = {"kl": wanted["final_kl"], "tolerance": wanted["kl_tolerance"], "known": str(known)}
    return replace(
        request,
        config=request.config | {"pick": pick},
        inputs=request.inputs | {"front": contents.published(FRONT, known.name)},
        reads=(*request.reads, known),
        outputs=(recipe.paths.stage(stage.name).chosen.name,),
    )


def _benchmarks(recipe: Recipe, stage: Stage, contents: Contents) -> Request:
    """lm-evaluation-harness along the front; it asks no reward."""
    wanted = dict(recipe.values["benchmarks"])
    sft, kappas = Path(recipe.values["sft"]), wanted.pop("kappas")
    measured = _measure(recipe, stage, contents, sft, contents.pinned("sft"), kappas)
    config = measured.config | {"rewards": [], "judges": [], "benchmarks": wanted}
    inputs = {name: measured.inputs[name] for name in ("base", "slerp", "sft")}
    if wanted["include"] is not None:
        inputs["tasks"] = contents.pinned("benchmarks.include")
    return replace(measured, config=config, inputs=inputs, rewards={}, judges={})


def _final(recipe: Recipe, stage: Stage, contents: Contents) -> Request:
    merge, final = merge_name(stage.iteration), recipe.paths.stage(stage.name)
    slerp, sft = recipe.paths.stage(merge).slerp, Path(recipe.values["sft"])
    kappa, details = recipe.values["front"]["final_kappa"], {}
    inputs = {"sft": contents.pinned("sft"), "slerp": contents.published(merge, slerp.name)}
    if recipe.values["front"]["final_kl"] is not None:
        chosen = contents.chosen()
        # `plan` prints the command before kappa is chosen: then it shows the word KAPPA.
        kappa, details = chosen["kappa"] if chosen else "KAPPA", {"chosen": chosen}
    names_by_eta: dict[float | str, tuple[str, ...]] = {kappa: (final.policy.name,)}
    words = _merge_words(final, sft, [slerp], names_by_eta, (), None)
    config, outputs = {"kappa": kappa}, (final.policy.name,)
    building = _building(names_by_eta)
    return Request(
        FINAL, config, inputs, (sft, slerp), outputs, (words,), building, details=details
    )


def _report(recipe: Recipe, stage: Stage, contents: Contents) -> Request:
    inputs = {name: contents.all_published(name) for name in stage.needs}
    output = str(recipe.paths.stage(stage.name).directory)
    words = ("-m", "nemo_warp.reporting.curves", str(recipe.paths.root), "--output", output)
    return Request(REPORT, {}, inputs, (), ("curves.png", "table.md"), (words,))


_BUILDERS = {
    MEMBER: _member,
    MERGE: _merge,
    EVALUATION: _evaluation,
    FRONT: _front,
    PICK: _pick,
    BENCHMARKS: _benchmarks,
    FINAL: _final,
    REPORT: _report,
}


def _hashes(
    rewards: dict[str, dict[str, Any]], contents: Contents, noun: str = "reward"
) -> dict[str, str]:
    """What decides the scores: the callable and its options, or the model's contents."""
    # Not: nodes, ranks, ports, deadlines. They decide how fast scores come, not what they are; and
    # a finished member must not be trained again because its server moved.
    deciding = ("callable", "options", "batch", "fingerprint", "arguments")
    hashes = {}
    for name, reward in rewards.items():
        # Only keys that are set, so that a key which a later version adds changes no old hash.
        known = {key: reward[key] for key in deciding if reward.get(key)}
        model = contents.pinned(f"{noun} {name}") if reward.get("model") else None
        weight = {"weight": float(reward["weight"])} if "weight" in reward else {}
        hashes[f"{noun} {name}"] = config_hash({**known, **weight, "model": model})
    return hashes
