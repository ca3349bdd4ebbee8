"""Fields of prompts that rewards cannot do without, found without running anything of them."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_warp.prompts import read_prompts

_TEXTS = 2  # prompt and response


def needed_by(reward: Mapping[str, Any], source: Path | None) -> list[str]:
    """Fields that a reward takes by name and has no default for.

    Args:
        reward: an entry of a recipe's ``rewards`` or ``judges``.
        source: of the module that its callable is of, if that is known; what the module imports
            from elsewhere is not followed.
    """
    if reward.get("endpoint"):
        return list(json.loads(Path(reward["endpoint"]).read_text()).get("needs", []))
    if reward.get("model"):
        return ["messages"] if "--chat-template" in reward.get("arguments", []) else []
    call = _call(source, reward["callable"].partition(":")[2]) if source else None
    if call is None:
        return []
    named = [*call.posonlyargs, *call.args]
    with_default = {a.arg for a in named[len(named) - len(call.defaults) :]}
    keywords = zip(call.kwonlyargs, call.kw_defaults, strict=True)
    needed = [a.arg for a in named[_TEXTS:] if a.arg not in with_default]
    needed += [a.arg for a, default in keywords if default is None]
    return [name for name in needed if name not in reward.get("options", {})]


def check_fields(prompts: Mapping[str, str], key: str, needed: Iterable[str], where: str) -> None:
    """Refuse files of prompts that lack a field.

    Args:
        prompts: the files, by their key in the recipe.
        key: the field that holds the text.
        needed: fields that every line must have.
        where: names the reward.

    Raises:
        ValueError: names the reward, the field, the file and the prompt.
    """
    needed = list(needed)
    for name, file in prompts.items():
        if not needed or not os.path.exists(file):
            continue
        for number, line in enumerate(read_prompts(Path(file), key), 1):
            lacking = [field for field in needed if field not in line.fields]
            if lacking:
                raise ValueError(
                    f"{where} takes the field '{lacking[0]}' of every prompt, but prompt {number} "
                    f"of prompts.{name} ({file}) has none; add it to the lines, or give it in "
                    f"{where}.options"
                )


def _call(source: Path, name: str) -> ast.arguments | None:
    """What a function of a module, or an object of one of its classes, is called with."""
    for node in ast.parse(source.read_bytes()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            # A decorator may give it another signature.
            return None if node.decorator_list else node.args
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _method(node)
    return None


def _method(kind: ast.ClassDef) -> ast.arguments | None:
    for node in kind.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == "__call__":
            arguments = node.args
            arguments.args = arguments.args[1:]  # self
            return arguments
    return None
