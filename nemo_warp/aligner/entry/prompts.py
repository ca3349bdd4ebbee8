"""Prompt files: JSON lines, checked whole before any work starts. No NeMo."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A prompt's text, and its tokens once a tokenizer has seen it."""

    text: str
    tokens: list[int]


def read_prompts(path: Path, key: str) -> list[str]:
    """Texts under ``key`` of a JSON-lines file.

    Raises:
        ValueError: the file is missing or empty, or a line is malformed (its number is named).
    """
    if not path.is_file():
        raise ValueError(f"no prompts file {path}")
    texts = []
    with path.open(encoding="utf-8", errors="surrogateescape") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                texts.append(_parse_line(line, key, f"{path} line {number}"))
    if not texts:
        raise ValueError(f"{path} holds no prompts; expected lines such as {{'{key}': 'text'}}")
    return texts


def _parse_line(line: str, key: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str) or not text:
        raise ValueError(f"{where} has no text under '{key}'; set prompts.key or mend the line")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} is not valid UTF-8") from None
    return text


def tokenize(texts: list[str], tokenizer: Any, max_tokens: int, path: Path) -> list[Prompt]:
    """Tokenize prompts, refusing any that is empty or longer than ``max_tokens``.

    Raises:
        ValueError: names the prompt's number and its length.
    """
    prompts = []
    for number, text in enumerate(texts, 1):
        tokens = tokenizer.text_to_ids(text)
        if not 0 < len(tokens) <= max_tokens:
            raise ValueError(
                f"{path}: prompt {number} has {len(tokens)} tokens, expected 1 to {max_tokens}; "
                "shorten it, or change prompts.max_tokens, rollout.max_response_tokens or the "
                "model's context length"
            )
        prompts.append(Prompt(text, tokens))
    return prompts
