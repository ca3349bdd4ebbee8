"""What `plan` shows and `run` refuses before it starts or submits anything."""

from __future__ import annotations

import ast
import importlib.machinery
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from nemo_warp.pipeline.commands.estimate import disk_bytes, size
from nemo_warp.pipeline.commands.needed_fields import check_fields, needed_by
from nemo_warp.pipeline.launch.steps import checkout
from nemo_warp.pipeline.recipe.load import Recipe
from nemo_warp.pipeline.recipe.validate import check_counts, check_files, check_prompts

_IMPORTED_STAR = "*"


def check_before_start(recipe: Recipe) -> None:
    """Raise ValueError for the first thing that stages would fail of, hours later."""
    # Cheapest first: whether files are there, then their contents, then what needs a look around.
    check_files(recipe.values)
    members = [recipe.member_config(*one) for one in recipe.different_members()]
    check_prompts(recipe.values, members)
    check_counts(recipe.values, members)
    for name, reward in recipe.values["rewards"].items():
        if reward["weight"] != 0:
            _check_reward(recipe, f"rewards.{name}", reward)
    for name, judge in recipe.judges.items():
        _check_reward(recipe, f"judges.{name}", judge)
    _check_benchmarks(recipe)
    _check_space(recipe)


def _check_reward(recipe: Recipe, key: str, reward: dict[str, Any]) -> None:
    if reward.get("endpoint") and not recipe.values["commands"]["member"]:
        check_endpoint(Path(reward["endpoint"]), f"{key}.endpoint")
    source = None
    if reward.get("callable"):
        source = check_callable(reward["callable"], f"{key}.callable", _in_container(recipe))
    prompts = recipe.values["prompts"]
    if key.startswith("judges."):  # which are asked by evaluations only
        prompts = {"heldout": prompts["heldout"]}
    if not recipe.values["commands"]["member"]:
        text = recipe.member_config(1, 1)["prompts"]["key"]
        check_fields(prompts, text, needed_by(reward, source), key)


def _check_benchmarks(recipe: Recipe) -> None:
    values = recipe.values
    if not values["benchmarks"]["tasks"] or values["commands"]["benchmarks"]:
        return
    if not _in_container(recipe) and _find("lm_eval") is None:
        raise ValueError(
            "benchmarks.tasks needs lm-evaluation-harness: pip install 'lm-eval>=0.4.9', or leave "
            "the benchmarks out: benchmarks.tasks=[]"
        )


def _in_container(recipe: Recipe) -> bool:
    """Whether steps run where modules may be that this machine has not."""
    if recipe.values["launcher"]["kind"] != "slurm":
        return False
    return recipe.cluster["container"]["image"] is not None


def check_endpoint(file: Path, key: str) -> None:
    """Raise ValueError unless ``file`` says where a reward server is (nobody is called)."""
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"{key}: no such file: {file}; start the server that writes it") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: {file} is not an endpoint file ({error})") from None
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{key}: {file} is not an endpoint file: it holds no JSON object")


def check_callable(name: str, key: str, elsewhere: bool = False) -> Path | None:
    """Raise ValueError if ``module:function`` is not there; nothing of the module is run.

    Args:
        name: ``package.module:function``.
        key: names it in the message.
        elsewhere: rewards run in a container, which may have modules that this machine has not.

    Returns:
        The module's source; None where it has none that could be read here.
    """
    module, _, function = name.partition(":")
    spec = _find(module)
    if spec is None and not elsewhere:
        raise ValueError(
            f"{key}: no module {module!r} can be found; put its directory into PYTHONPATH"
        )
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    names = _names(Path(spec.origin))
    if function.partition(".")[0] not in names and _IMPORTED_STAR not in names:
        raise ValueError(f"{key}: {spec.origin} has no {function!r}")
    return Path(spec.origin)


def _find(module: str) -> importlib.machinery.ModuleSpec | None:
    """Like `importlib.util.find_spec`, which would run the packages around the module."""
    spec, path = None, [str(checkout() or ""), *sys.path[1:]]
    parts = module.split(".")
    for number in range(1, len(parts) + 1):
        # Its own loop: find_spec of "a.b" imports a, which may import torch, or start something.
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[:number]), path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or [])
    return spec


def _names(file: Path) -> set[str]:
    """Names a module's source binds anywhere outside of functions and classes."""
    try:
        # Read and not run: a reward's module may load a model when it is imported.
        tree = ast.parse(file.read_bytes())
    except SyntaxError as error:
        raise ValueError(f"{file}, line {error.lineno}: {error.msg}") from None
    found: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                # A module with __getattr__ (PEP 562) may have any name; so may one with an import
                # of *.
                found.add(_IMPORTED_STAR if node.name == "__getattr__" else node.name)
                continue
            if isinstance(node, ast.alias):
                found.add((node.asname or node.name).partition(".")[0])
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            waiting.append(node)
    return found


def _check_space(recipe: Recipe) -> None:
    """At the start only: later the run itself has used what it was given."""
    lacking = None if recipe.paths.recipe.exists() else lacking_space(recipe)
    if lacking is not None:
        raise ValueError(lacking)


def lacking_space(recipe: Recipe, used: int = 0) -> str | None:
    """What to say when the file system has no room for the run, None if it has or nobody knows.

    Args:
        recipe: with or without ``estimate.parameters``.
        used: bytes that the run holds already.
    """
    parts = disk_bytes(recipe)
    if parts is None:
        return None
    # The run directory need not exist yet: the file system that it will be on is asked.
    there = next(p for p in (recipe.paths.root, *recipe.paths.root.parents) if p.exists())
    needed, free = sum(parts.values()) - used, shutil.disk_usage(there).free
    if needed <= free:
        return None
    return (
        f"run_directory: about {size(needed)} are needed below {recipe.paths.root} "
        f"({', '.join(f'{n} {size(b)}' for n, b in parts.items())}), {size(free)} are free; "
        "choose another file system, or lower keep_checkpoints"
    )
