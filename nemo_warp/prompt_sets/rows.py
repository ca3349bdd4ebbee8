"""Rows of data sets: JSON lines and Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Message = dict[str, str]

COLUMNS = ("messages", "conversations", "prompt", "question", "instruction", "problem")
"""Where prompts are looked for, the first that a data set has."""

_ROLES = {"human": "user", "gpt": "assistant"}
"""What ShareGPT's ``conversations`` call them."""


def read_rows(path: Path) -> list[Row]:
    """All rows of a ``.parquet`` or JSON-lines file, or of all such files of a folder.

    Raises:
        ValueError: the file is missing, empty or damaged; the line is named.
    """
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in (".jsonl", ".json", ".parquet"))
        if not files:
            raise ValueError(f"{path} holds no .jsonl and no .parquet file")
        return [row for file in files for row in read_rows(file)]
    if not path.is_file():
        raise ValueError(f"no data set {path}")
    rows = list(_parquet(path) if path.suffix == ".parquet" else _json_lines(path))
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def messages_of(row: Row, column: str, where: str) -> list[Message]:
    """The conversation that a row's prompt is, up to its last user's turn.

    Args:
        row: of `read_rows`.
        column: that holds a text, or a list of messages (``role`` and ``content``, or ShareGPT's
            ``from`` and ``value``).
        where: the row's name, for messages.

    Raises:
        ValueError: the column is missing or holds something else.
    """
    value = row.get(column)
    if isinstance(value, str):
        return [{"role": "user", "content": value}] if value.strip() else []
    if not isinstance(value, list):
        raise ValueError(f"{where}: {column} is {str(value)[:60]!r}, expected a text or messages")
    messages = [_message(one, column, where) for one in value]
    while messages and messages[-1]["role"] != "user":  # the reply, which the policy shall write
        messages.pop()
    return messages


def find_column(row: Row, wanted: str | None, where: str) -> str:
    """The column with the prompt.

    Raises:
        ValueError: there is none.
    """
    for name in (wanted,) if wanted else COLUMNS:
        if name in row:
            return name
    tried = wanted or ", ".join(COLUMNS)
    raise ValueError(f"{where} has no column {tried}; it has {', '.join(row)} (--column)")


def _message(value: Any, column: str, where: str) -> Message:
    if isinstance(value, dict):
        role = value.get("role", value.get("from"))
        content = value.get("content", value.get("value"))
        if isinstance(role, str) and isinstance(content, str):
            return {"role": _ROLES.get(role, role), "content": content}
    raise ValueError(f"{where}: {column} holds {str(value)[:60]!r}, expected role and content")


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {number} is not JSON in UTF-8: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} is no object")
        yield row


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path} needs pyarrow: pip install 'nemo-warp[data]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            # In batches: a Parquet file unpacks to several times its size.
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"{path} is no Parquet file, or a damaged one: {said}") from None
