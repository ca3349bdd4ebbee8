"""Open a run directory: make it for a recipe, or make sure that a change to it is wanted.

It keeps the resolved recipe (``recipe.yaml``, every key, absolute paths) and the fingerprints of
the inputs (``inputs.json``). What a change would redo is asked of the stages themselves: their
requests (`disk.request`) hold what decides their results, and there is no second list of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_warp import yaml_text
from nemo_warp.pipeline.disk import attempts, locks
from nemo_warp.pipeline.disk.contents import Expected
from nemo_warp.pipeline.disk.request import read_request, request_of
from nemo_warp.pipeline.recipe import inputs
from nemo_warp.pipeline.recipe.load import Recipe, load_recipe
from nemo_warp.pipeline.recipe.plan import Stage
from nemo_warp.records import write_json_atomically, write_text_atomically

_VALUE_LENGTH = 60
"""Of a changed value in a message: enough to know it again."""


@dataclass(frozen=True)
class Change:
    """What a changed recipe or input does to the stages on disk, by name with the reason.

    Attributes:
        keys: what differs, e.g. ``merge.eta (0.3 -> 0.5)``.
        redone: finished stages that would be made again.
        restarted: unfinished ones that would begin again; their steps so far are lost.
        at_work: stages that run right now for the recipe as it was.
    """

    keys: tuple[str, ...]
    redone: dict[str, str]
    restarted: dict[str, str]
    at_work: tuple[str, ...]


def open_run(recipe: Recipe, redo: bool = False) -> Change:
    """Create the run directory, or continue it with this recipe.

    Call it with the driver lock held. Stages that are no longer what is wanted are moved aside
    when they are made again, never before.

    Args:
        recipe: as it is wanted now.
        redo: whether finished stages may be made again.

    Raises:
        ValueError: it belongs to another recipe; finished stages would be redone and ``redo`` was
            not given; or stages are at work on what would change.
    """
    paths = recipe.paths
    paths.root.mkdir(parents=True, exist_ok=True)
    pins = present_pins(recipe)
    # Without its own path: a run directory may be moved.
    text = yaml_text.dump({**recipe.values, "run_directory": None})
    change = Change((), {}, {}, ())
    if paths.recipe.exists():
        change = what_changes(recipe, pins)
        # What was agreed to with --redo is agreed to for this very recipe and these inputs only.
        same = paths.recipe.read_text() == text and recipe.pinned == pins
        before = _agreed(paths.redo) if same else []
        agreed = {*before, *(change.redone if redo else ())} & set(change.redone)
        _refuse(recipe, change, agreed)
        # Before recipe.yaml: a driver that is killed in between finds the old recipe and asks
        # again.
        write_json_atomically(paths.redo, sorted(agreed))
    if not paths.inputs.exists() or recipe.pinned != pins:
        write_json_atomically(paths.inputs, pins)
        vars(recipe).pop("pinned", None)  # cached
    if not paths.recipe.exists() or paths.recipe.read_text() != text:
        write_text_atomically(paths.recipe, text)
    return change


def present_pins(recipe: Recipe) -> dict[str, str]:
    """Fingerprints of the recipe's inputs as they are now."""
    return {name: inputs.fingerprint(path) for name, path in _inputs(recipe).items()}


def what_changes(recipe: Recipe, pins: dict[str, str]) -> Change:
    """What going on with ``recipe`` and inputs of these fingerprints does to what is on disk.

    Raises:
        ValueError: the run directory belongs to a recipe of another name.
    """
    stored = load_recipe(recipe.paths.root, files_here=False)
    if stored.name != recipe.name:
        raise ValueError(
            f"{recipe.paths.root} was started with another recipe: name differs "
            f"({stored.name!r} -> {recipe.name!r}). Give this one another run_directory"
        )
    _ = recipe.pinned  # without its pins nobody knows what the stages were made from
    before = {stage.name: stage for stage in stored.stages}
    contents = Expected(recipe, pins)
    reasons: dict[str, str] = {}
    for stage in recipe.stages:
        reason = _reason(recipe, stage, before.get(stage.name), reasons, contents)
        if reason is not None:
            reasons[stage.name] = reason
    done = {n: r for n, r in reasons.items() if recipe.paths.stage(n).completion.exists()}
    begun = {
        name: reason
        for name, reason in reasons.items()
        if name not in done and attempts.progress(recipe.paths.stage(name)) > 0
    }
    busy = tuple(name for name in reasons if locks.is_held(recipe.paths.stage(name).lock))
    return Change(tuple(_differences(stored, recipe, pins)), done, begun, busy)


def _differences(stored: Recipe, recipe: Recipe, pins: dict[str, str]) -> Iterator[str]:
    """Keys whose values differ, and inputs whose contents do."""
    before, now = (dict(_flat({**r.values, "run_directory": None})) for r in (stored, recipe))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            yield f"{key} ({_value(before, key)} -> {_value(now, key)})"
    for name in sorted(recipe.pinned.keys() & pins.keys()):
        if recipe.pinned[name] != pins[name]:
            yield f"the contents of {name}"


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _value(values: Mapping[str, Any], key: str) -> str:
    text = json.dumps(values[key], ensure_ascii=False) if key in values else "absent"
    return text if len(text) <= _VALUE_LENGTH else f"{text[:_VALUE_LENGTH]}..."


def _reason(
    recipe: Recipe, stage: Stage, before: Stage | None, reasons: dict[str, str], contents: Expected
) -> str | None:
    """Why the stage on disk is not the one wanted now; None if it is, or if there is none."""
    recorded = read_request(recipe.paths.stage(stage.name))
    if recorded is None:
        return None
    if before is not None and before.needs != stage.needs:
        new = sorted(set(stage.needs) - set(before.needs))
        return f"it reads {new[0]}" if new else f"it no longer reads {before.needs[-1]}"
    # Stages are in the plan's order, so reasons of what a stage reads are known by now.
    above = [name for name in stage.needs if name in reasons]
    if above:
        return f"it reads {above[0]}"
    request = request_of(recipe, stage, contents)
    # An empty hash is not known yet: it is of what an unfinished stage will publish.
    old, known = recorded.get("inputs", {}), {n: h for n, h in request.inputs.items() if h}
    changed = sorted(name for name, hash_ in known.items() if old.get(name) != hash_)
    changed += sorted(set(old) - set(request.inputs))
    if changed:
        return f"{', '.join(changed)} changed"
    same = recorded.get("config_hash") == request.config_hash
    return None if same else "its configuration changed"


def _agreed(file: Path) -> list[str]:
    """Finished stages whose redoing was agreed to and is not over: the next driver goes on."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return []


def _refuse(recipe: Recipe, change: Change, agreed: set[str]) -> None:
    changed = f"changed: {_some(change.keys)}; " if change.keys else ""
    if change.at_work:
        raise ValueError(
            f"{changed}{_some(change.at_work)} at work on what this change would make again; "
            f"first: nemo-warp stop {recipe.paths.root} --wait 600"
        )
    reasons = [f"{name} ({why})" for name, why in change.redone.items() if name not in agreed]
    if reasons:
        lost = f"; {_some(change.restarted)} would begin again" if change.restarted else ""
        raise ValueError(
            f"{changed}this change would redo {len(reasons)} finished stages: "
            f"{_some(reasons)}{lost}. Nothing was changed. To do it: the same command with --redo; "
            f"to keep them: undo the change ({recipe.paths.recipe} has the values in use) "
            "or give another run_directory"
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _inputs(recipe: Recipe) -> dict[str, Path]:
    values = recipe.values
    models = {f"reward {n}": r["model"] for n, r in values["rewards"].items() if r.get("model")}
    models |= {f"judge {n}": j["model"] for n, j in values["judges"].items() if j.get("model")}
    named = {"sft": values["sft"], "init": values["init"], **models}
    named |= {f"prompts.{key}": path for key, path in values["prompts"].items()}
    benchmarks = values["benchmarks"]
    if benchmarks["tasks"] and benchmarks["include"] is not None:
        named["benchmarks.include"] = benchmarks["include"]
    return {name: Path(path) for name, path in named.items()}
