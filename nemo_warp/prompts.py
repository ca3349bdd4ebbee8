"""Prompt files: JSON lines, checked whole before any work starts. Standard library only."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PromptLine:
    """A line of a prompts file.

    Attributes:
        text: the prompt.
        fields: what else the line says of it (``answer``, ``tests``, ``language``, ...), as JSON
            values; rewards take them by name.
    """

    text: str
    fields: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: Path, key: str) -> list[PromptLine]:
    """Prompts of a JSON-lines file, their texts under ``key``; one per line that is not empty.

    Lines end at a line feed only (a text may hold U+2028); a byte order mark at the beginning is
    left out.

    Raises:
        ValueError: the file is missing or empty, or a line is malformed (its number is named).
    """
    if not path.is_file():
        raise ValueError(f"no prompts file {path}")
    prompts = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            prompts.append(_prompt(line, key, f"{path} line {number}"))
    if not prompts:
        raise ValueError(f"{path} holds no prompts; expected lines such as {{'{key}': 'text'}}")
    return prompts


def _prompt(line: bytes, key: str, where: str) -> PromptLine:
    record = _record(line, where)
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{where} has no text under '{key}'; set prompts.key or mend the line")
    if not text.strip():
        raise ValueError(f"{where} has a blank text under '{key}'; remove the line")
    fields = {name: value for name, value in record.items() if name != key}
    try:
        text.encode()
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds half of a surrogate pair, which is no character") from None
    return PromptLine(text, fields)


def _record(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError(f"{where} is not UTF-8; save the file as UTF-8") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply to be read") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
