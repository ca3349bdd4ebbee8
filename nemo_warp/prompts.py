"""Prompt files: JSON lines, checked whole before any work starts. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_prompts(path: Path, key: str) -> list[str]:
    """Texts under ``key`` of a JSON-lines file, one per line that is not empty.

    Lines end at a line feed only (a text may hold U+2028); a byte order mark at the beginning is
    left out.

    Raises:
        ValueError: the file is missing or empty, or a line is malformed (its number is named).
    """
    if not path.is_file():
        raise ValueError(f"no prompts file {path}")
    texts = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            texts.append(_text(line, key, f"{path} line {number}"))
    if not texts:
        raise ValueError(f"{path} holds no prompts; expected lines such as {{'{key}': 'text'}}")
    return texts


def _text(line: bytes, key: str, where: str) -> str:
    record = _record(line, where)
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{where} has no text under '{key}'; set prompts.key or mend the line")
    if not text.strip():
        raise ValueError(f"{where} has a blank text under '{key}'; remove the line")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds half of a surrogate pair, which is no character") from None
    return text


def _record(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError(f"{where} is not UTF-8; save the file as UTF-8") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply to be read") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
