"""Prompts as tokens. No NeMo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A prompt's text, and its tokens once a tokenizer has seen it."""

    text: str
    tokens: list[int]


def tokenize(texts: list[str], tokenizer: Any, max_tokens: int, path: Path) -> list[Prompt]:
    """Tokenize prompts, refusing one that is empty or longer than ``max_tokens``.

    Raises:
        ValueError: names the prompt's number and its length.
    """
    prompts = []
    for number, text in enumerate(texts, 1):
        tokens = tokenizer.text_to_ids(text)
        if not tokens:
            raise ValueError(f"{path}: prompt {number} ({text!r}) has no tokens; remove it")
        if len(tokens) > max_tokens:
            raise ValueError(
                f"{path}: prompt {number} has {len(tokens)} tokens, expected at most {max_tokens}; "
                "shorten it, or change prompts.max_tokens, rollout.max_response_tokens or the "
                "model's context length"
            )
        prompts.append(Prompt(text, tokens))
    return prompts
