"""From rows to prompts: templated, without duplicates, not too long, split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nemo_warp.prompt_sets.rows import Row, find_column, messages_of
from nemo_warp.prompt_sets.templates import Template


@dataclass(frozen=True)
class Wishes:
    """What prompts shall be like.

    Attributes:
        column: that holds the prompt; None finds it.
        system: a first message of the role ``system``, or a text put before the first user's.
        max_tokens: longer prompts are left out.
        heldout: number of held-out prompts.
        seed: which ones they are.
        rename: column -> the field it becomes.
        answer_after: an answer is what follows the last of these marks.
        messages: keep the conversation as the field ``messages``, for rewards that make their own
            text of it.
    """

    column: str | None = None
    system: str | None = None
    max_tokens: int | None = None
    heldout: int = 512
    seed: int = 0
    rename: dict[str, str] = field(default_factory=dict)
    answer_after: str | None = None
    messages: bool = False


@dataclass
class Prompts:
    """Lines of the two files, and what was left out."""

    train: list[Row] = field(default_factory=list)
    heldout: list[Row] = field(default_factory=list)
    rows: int = 0
    empty: int = 0
    duplicates: int = 0
    too_long: int = 0
    longest: int = 0
    dropped_columns: set[str] = field(default_factory=set)


def make_prompts(
    sources: Iterable[tuple[str, list[Row]]], template: Template, wishes: Wishes
) -> Prompts:
    """Prompts from rows, in their order; held out are those with the smallest hashes.

    The split depends on seed and texts only: more rows, or the same in another order, move few
    prompts or none. A prompt is in one of the files only.

    Args:
        sources: name of a file and its rows.
        template: of the model that will be trained.
        wishes: see `Wishes`.

    Returns:
        `Prompts`.

    Raises:
        ValueError: a row has no prompt, an answer has no mark, or too few prompts are left.
    """
    found, lines = Prompts(), {}
    for name, rows in sources:
        for number, row in enumerate(rows, 1):
            found.rows += 1
            line = _line(row, f"{name} row {number}", template, wishes, found)
            if line is None:
                continue
            if line["prompt"] in lines:
                found.duplicates += 1
            else:
                lines[line["prompt"]] = line
    if len(lines) <= wishes.heldout:
        raise ValueError(
            f"{len(lines)} prompts are left of {found.rows} rows ({found.duplicates} twice, "
            f"{found.too_long} too long, {found.empty} empty), too few to hold out "
            f"{wishes.heldout} of them (--heldout)"
        )
    # By hash and not by a shuffled index: a row that is added later does not move the others.
    held = set(sorted(lines, key=lambda text: _digest(wishes.seed, text))[: wishes.heldout])
    for text, line in lines.items():
        (found.heldout if text in held else found.train).append(line)
    return found


def _line(
    row: Row, where: str, template: Template, wishes: Wishes, found: Prompts
) -> dict[str, Any] | None:
    """What a row becomes; None if it is left out, which ``found`` counts."""
    column = find_column(row, wishes.column, where)
    messages = messages_of(row, column, where)
    if not messages:
        found.empty += 1
        return None
    messages = _with_system(messages, wishes.system)
    text = template.text(messages, where)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{where}: {column} holds half of a surrogate pair, which is no character"
        ) from None
    length = len(template.tokens(text))
    if wishes.max_tokens is not None and length > wishes.max_tokens:
        found.too_long += 1
        return None
    found.longest = max(found.longest, length)
    fields = {wishes.rename.get(name, name): value for name, value in row.items() if name != column}
    # A column of that name that was not the prompt would replace it below.
    fields.pop("prompt", None)
    if wishes.answer_after is not None:
        fields["answer"] = _after_mark(fields.get("answer"), wishes.answer_after, where)
    if wishes.messages:
        fields["messages"] = messages
    return {"prompt": text, **_json_only(fields, found.dropped_columns)}


def _with_system(messages: list[dict[str, str]], system: str | None) -> list[dict[str, str]]:
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _after_mark(answer: Any, mark: str, where: str) -> str:
    if not isinstance(answer, str) or mark not in answer:
        raise ValueError(f"{where}: answer is {str(answer)[-60:]!r}, which holds no {mark!r}")
    return answer.rpartition(mark)[2].strip()


def _json_only(fields: dict[str, Any], dropped: set[str]) -> dict[str, Any]:
    """Fields that JSON can hold; columns of dates or pictures are left out."""
    kept = {}
    for name, value in fields.items():
        try:
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError):
            dropped.add(name)
        else:
            kept[name] = value
    return kept


def _digest(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{text}".encode()).digest()
