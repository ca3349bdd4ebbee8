"""One configuration key: a dataclass field with what people and checks need to know about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

REQUIRED = "???"
"""Default of a key that must be given (OmegaConf's MISSING)."""


@dataclass(frozen=True)
class Key:
    """What is known of a key beside its type.

    Attributes:
        help: one line: what it is.
        unit: e.g. ``s``, ``nats``, ``tokens``.
        low, high: closed range of a number, or of each number of a list.
        above: open lower end.
        choices: the values it may have.
        pattern: regular expression that a text must match whole, and its words in ``pattern_help``.
        nonempty: a text, list or table must not be empty.
        of: a table that holds only what differs from this class's defaults.
        paper: where the paper (arXiv 2406.16768) gives the value.
        restart: what a restart with another value does, where that is not obvious.
    """

    help: str = ""
    unit: str = ""
    low: float | None = None
    high: float | None = None
    above: float | None = None
    choices: tuple[Any, ...] = ()
    pattern: str = ""
    pattern_help: str = ""
    nonempty: bool = False
    of: type | None = None
    paper: str = ""
    restart: str = ""


def key(default: Any, text: str, **known: Any) -> Any:
    """A dataclass field with a `Key`; mutable defaults are copied for each instance."""
    about = Key(help=text, **known)
    metadata = {"key": about}
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(of: type, text: str = "") -> Any:
    """A field that holds another of the schema's classes."""
    return dataclasses.field(default_factory=of, metadata={"key": Key(help=text)})


def about(field: dataclasses.Field) -> Key:
    """What is known of a field."""
    return field.metadata.get("key", Key())


def between(about: Key) -> str:
    """A range in words: ``above 0``, ``0 to 1``, ``1 or more``; empty if there is none."""
    if about.above is not None:
        end = "" if about.high is None else f" and at most {about.high:g}"
        return f"above {about.above:g}{end}"
    if about.low is not None and about.high is not None:
        return f"{about.low:g} to {about.high:g}"
    if about.low is not None:
        return f"{about.low:g} or more"
    return "" if about.high is None else f"at most {about.high:g}"


def listed(choices: Sequence[Any]) -> str:
    """``a, b or c``."""
    words = [str(choice) for choice in choices]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
