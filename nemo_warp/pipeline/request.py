"""What a stage is asked to do: its configuration, the contents it reads, its command.

A request follows from the recipe and from the completion records of the stages before it. Its
copy on disk (``stage.json``) tells later whether a finished stage is still the one wanted: when an
input was made again and came out different, it is not.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_warp.config import identity_hash
from nemo_warp.pipeline.paths import StagePaths
from nemo_warp.pipeline.plan import (
    EVALUATION,
    FINAL,
    FRONT,
    MEMBER,
    MERGE,
    REPORT,
    Stage,
    member_name,
    merge_name,
)
from nemo_warp.pipeline.recipe import Recipe
from nemo_warp.records import Completion, RecordError, config_hash, read_completion


@dataclass(frozen=True)
class Request:
    """What one stage is asked to do.

    Attributes:
        config: its whole configuration, plain; written to ``config.yaml``.
        inputs: name -> hash of the contents of everything it reads.
        outputs: files it has to leave behind.
        commands: words after the interpreter, of programs to run one after the other (none for
            members and evaluations, which are parallel jobs).
        building: file -> its name once published, of programs that write elsewhere first.
        rewards: rewards the stage needs, by name, in the order of its configuration.
    """

    kind: str
    config: dict[str, Any]
    inputs: dict[str, str]
    outputs: tuple[str, ...] = ()
    commands: tuple[tuple[str, ...], ...] = ()
    building: dict[str, str] = field(default_factory=dict)
    rewards: dict[str, dict[str, Any]] = field(default_factory=dict)

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
    return _BUILDERS[stage.kind](recipe, stage)


def read_request(paths: StagePaths) -> dict[str, Any] | None:
    """The record of the request a stage directory was made for, or None."""
    try:
        return json.loads(paths.request.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RecordError(f"{paths.request} cannot be read ({error}); remove the stage") from error


def init_of(recipe: Recipe, iteration: int) -> tuple[Path, str]:
    """theta_init of ``iteration`` and the hash of its contents."""
    if iteration == 1:
        return Path(recipe.values["init"]), recipe.pinned()["init"]
    merge = recipe.paths.stage(merge_name(iteration - 1))
    return merge.next_init, _published(merge, merge.next_init.name)


def _member(recipe: Recipe, stage: Stage) -> Request:
    paths, pins = recipe.paths.stage(stage.name), recipe.pinned()
    init, init_hash = init_of(recipe, stage.iteration)
    config = recipe.member_config(stage.iteration, stage.member)
    config["run"]["directory"] = str(paths.directory)
    config["init"] = str(init)
    rewards = recipe.rewards(stage.member)
    inputs = {"init": init_hash, "sft": pins["sft"], **_reward_inputs(rewards, pins)}
    inputs |= {key: pins[key] for key in ("prompts.train", "prompts.heldout")}
    return Request(MEMBER, config, inputs, outputs=("policy.nemo",), rewards=rewards)


def _merge(recipe: Recipe, stage: Stage) -> Request:
    values, merge = recipe.values, recipe.paths.stage(stage.name)
    names = [member_name(stage.iteration, m) for m in range(1, values["members"] + 1)]
    members = [recipe.paths.stage(name) for name in names]
    _refuse_twins({name: _completion(m) for name, m in zip(names, members, strict=True)})
    init, init_hash = init_of(recipe, stage.iteration)
    inputs = {n: _published(m, m.policy.name) for n, m in zip(names, members, strict=True)}
    config = {**values["merge"], "eta": recipe.eta(stage.iteration)}
    towards = Path(values["sft"]) if config["towards"] == "sft" else None
    etas = {1.0: merge.slerp.name, config["eta"]: merge.next_init.name}
    return Request(
        MERGE,
        config,
        {"init": init_hash, "sft": recipe.pinned()["sft"], **inputs},
        outputs=(merge.slerp.name, merge.next_init.name),
        commands=(_merge_words(merge, init, [m.policy for m in members], etas, config, towards),),
        building=_building(etas),
    )


def _merge_words(
    paths: StagePaths,
    init: Path,
    policies: list[Path],
    etas: Iterable[float],
    config: dict[str, Any],
    towards: Path | None,
) -> tuple[str, ...]:
    """tools/merge_nemo.py: every eta in one pass over the data."""
    words = ["tools/merge_nemo.py", "--init", str(init), "--policies", *map(str, policies)]
    words += ["--eta", *(f"{eta:g}" for eta in etas)]
    words += ["--output", str(paths.building / "{eta}.nemo"), "--report", str(paths.report)]
    words += ["--liti-towards", str(towards)] if towards is not None else []
    return (*words, *map(str, config.get("arguments", [])))


def _building(etas: dict[float, str]) -> dict[str, str]:
    return {f"{eta:g}.nemo": name for eta, name in etas.items()}


def _evaluation(recipe: Recipe, stage: Stage) -> Request:
    init, init_hash = init_of(recipe, stage.iteration)
    etas = recipe.values["evaluation"]["etas"]
    return _measure(recipe, stage, init, init_hash, etas)


def _front(recipe: Recipe, stage: Stage) -> Request:
    sft, pin = Path(recipe.values["sft"]), recipe.pinned()["sft"]
    return _measure(recipe, stage, sft, pin, recipe.values["front"]["kappas"])


def _measure(
    recipe: Recipe, stage: Stage, base: Path, base_hash: str, etas: list[float]
) -> Request:
    pins, merge = recipe.pinned(), recipe.paths.stage(merge_name(stage.iteration))
    rewards = recipe.rewards()
    config = recipe.evaluation_config()
    config |= {
        "directory": str(recipe.paths.stage(stage.name).directory),
        "base": str(base),
        "slerp": str(merge.slerp),
        "sft": recipe.values["sft"],
        "etas": [float(eta) for eta in etas],
    }
    inputs = {
        "base": base_hash,
        "slerp": _published(merge, merge.slerp.name),
        "sft": pins["sft"],
        "prompts.heldout": pins["prompts.heldout"],
        **_reward_inputs(rewards, pins),
    }
    return Request(stage.kind, config, inputs, outputs=("points.jsonl",), rewards=rewards)


def _final(recipe: Recipe, stage: Stage) -> Request:
    merge, final = recipe.paths.stage(merge_name(stage.iteration)), recipe.paths.stage(stage.name)
    sft, kappa = Path(recipe.values["sft"]), recipe.values["front"]["final_kappa"]
    inputs = {"sft": recipe.pinned()["sft"], "slerp": _published(merge, merge.slerp.name)}
    etas, config = {kappa: final.policy.name}, {"kappa": kappa}
    words = _merge_words(final, sft, [merge.slerp], etas, config, None)
    return Request(FINAL, config, inputs, (final.policy.name,), (words,), building=_building(etas))


def _report(recipe: Recipe, stage: Stage) -> Request:
    inputs = {}
    for name in stage.needs:
        files = _completion(recipe.paths.stage(name)).files
        inputs[name] = config_hash({key: entry.sha256 for key, entry in files.items()})
    words = ("-m", "nemo_warp.reporting.curves", str(recipe.paths.root))
    words += ("--output", str(recipe.paths.stage(stage.name).directory))
    return Request(REPORT, {}, inputs, ("curves.png", "table.md"), (words,))


_BUILDERS = {
    MEMBER: _member,
    MERGE: _merge,
    EVALUATION: _evaluation,
    FRONT: _front,
    FINAL: _final,
    REPORT: _report,
}


def _completion(paths: StagePaths) -> Completion:
    completion = read_completion(paths.directory)
    if completion is None:
        raise RecordError(f"{paths.directory} is not finished: it has no completion record")
    return completion


def _published(paths: StagePaths, name: str) -> str:
    """Hash of an artifact, from its stage's record; the artifact must still be there."""
    entry = _completion(paths).files.get(name)
    if entry is None:
        raise RecordError(
            f"{paths.completion} does not mention {name}; remove the stage to redo it"
        )
    if not (paths.directory / name).exists():
        raise RecordError(
            f"{paths.directory / name} is gone, but is needed again; remove {paths.directory} to "
            "make it anew"
        )
    return entry.sha256


def _refuse_twins(members: dict[str, Completion]) -> None:
    """Members that read the same prompts in the same order are copies, not policies to merge."""
    for key in ("seed", "prompt_order_hash"):
        seen: dict[Any, str] = {}
        for name, completion in members.items():
            value = completion.details.get(key)
            if value is not None and value in seen:
                raise RecordError(
                    f"{name} and {seen[value]} have the same {key} ({value}): merging copies of "
                    "one run is no merge; give the members different seeds and remove one of them"
                )
            seen[value] = name


def _reward_inputs(rewards: dict[str, dict[str, Any]], pins: dict[str, str]) -> dict[str, str]:
    """What decides the scores: the callable and its options, or the model's contents."""
    deciding = ("callable", "options", "batch", "fingerprint", "arguments")
    return {
        f"reward {name}": config_hash(
            {k: reward[k] for k in deciding if reward.get(k)}
            | {"weight": float(reward["weight"]), "model": pins.get(f"reward {name}")}
        )
        for name, reward in rewards.items()
    }
