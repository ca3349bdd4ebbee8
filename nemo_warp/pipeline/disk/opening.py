"""Open a run directory: make it for a recipe, or make sure that it is this recipe's.

It keeps the resolved recipe (``recipe.yaml``, every key, absolute paths) and the fingerprints of
the inputs it was started with (``inputs.json``). What decides results may not change afterwards.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from nemo_warp import yaml_text
from nemo_warp.pipeline.recipe import inputs
from nemo_warp.pipeline.recipe.load import Recipe, load_recipe
from nemo_warp.records import write_json_atomically, write_text_atomically

OPERATIONAL = (
    "run_directory",
    "launcher",
    "cluster",
    "cluster_overrides",
    "resources",
    "retries",
    "estimate",
)
"""Top-level keys that may change between rounds: they decide no result."""


def open_run(recipe: Recipe) -> None:
    """Create the run directory, or make sure that it is this recipe's.

    Call it with the driver lock held.

    Raises:
        ValueError: it belongs to another recipe, or an input has changed since.
    """
    paths, stored = recipe.paths, recipe.paths.recipe
    paths.root.mkdir(parents=True, exist_ok=True)
    if stored.exists():
        _refuse_other(recipe, load_recipe(stored))
        _refuse_changed_inputs(recipe)
    else:
        pins = {name: inputs.fingerprint(path) for name, path in _inputs(recipe).items()}
        write_json_atomically(paths.inputs, pins)
    text = yaml_text.dump({**recipe.values, "run_directory": None})
    if not stored.exists() or stored.read_text() != text:
        write_text_atomically(stored, text)


def _inputs(recipe: Recipe) -> dict[str, Path]:
    values = recipe.values
    models = {f"reward {n}": r["model"] for n, r in values["rewards"].items() if r.get("model")}
    named = {"sft": values["sft"], "init": values["init"], **models}
    named |= {f"prompts.{key}": path for key, path in values["prompts"].items()}
    return {name: Path(path) for name, path in named.items()}


def _refuse_other(recipe: Recipe, stored: Recipe) -> None:
    ours, theirs = _deciding(recipe.values), _deciding(stored.values)
    changed = sorted(_differences(ours, theirs))
    if changed:
        raise ValueError(
            f"{recipe.paths.root} was started with another recipe: {', '.join(changed[:5])} differ"
            f"{' and more' if len(changed) > 5 else ''}. Give this one another run_directory, or "
            f"undo the change ({recipe.paths.recipe} has the values in use)"
        )


def _deciding(values: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in values.items() if k not in OPERATIONAL}
    member = copy.deepcopy(kept["member"])
    for key in ("time_limit", "save_margin", "keep_checkpoints", "max_skipped_updates"):
        member["run"].pop(key, None)
    member.pop("reward_client", None)
    member.pop("loggers", None)
    return {**kept, "member": member}


def _differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = sorted(set(ours) | set(theirs))
        return [
            name
            for key in keys
            for name in _differences(ours.get(key), theirs.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if ours == theirs else [f"{path} ({theirs!r} -> {ours!r})"]


def _refuse_changed_inputs(recipe: Recipe) -> None:
    pins = recipe.pinned
    for name, path in _inputs(recipe).items():
        if inputs.fingerprint(path) != pins.get(name):
            raise ValueError(
                f"{name} ({path}) has changed since the run in {recipe.paths.root} began; restore "
                "it, or start in another run_directory"
            )
