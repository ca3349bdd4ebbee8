"""Prompts as tokens. No NeMo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_warp.prompts import PromptLine


@dataclass(frozen=True)
class Prompt:
    """A prompt's text, its tokens, and what else its line says, for the rewards."""

    text: str
    tokens: list[int]
    fields: dict[str, Any] = field(default_factory=dict)


def tokenize(
    lines: list[PromptLine], encode: Callable[[str], list[int]], max_tokens: int, path: Path
) -> list[Prompt]:
    """Tokenize prompts, refusing one that is empty or longer than ``max_tokens``.

    Raises:
        ValueError: names the prompt's number and its length.
    """
    prompts = []
    for number, line in enumerate(lines, 1):
        tokens = encode(line.text)
        if not tokens:
            raise ValueError(f"{path}: prompt {number} ({line.text!r}) has no tokens; remove it")
        if len(tokens) > max_tokens:
            raise ValueError(
                f"{path}: prompt {number} has {len(tokens)} tokens, expected at most {max_tokens}; "
                "shorten it, or change prompts.max_tokens, rollout.max_response_tokens or the "
                "model's context length"
            )
        prompts.append(Prompt(line.text, tokens, line.fields))
    return prompts
