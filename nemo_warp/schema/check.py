"""Compare values with the schema: one rule, one form of message for every key of every file.

'optim.lr' in recipe.yaml is 'fast', expected a number above 0
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from nemo_warp.schema.key import REQUIRED, Key, about, between, listed
from nemo_warp.yaml_text import Ambiguous

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_YES, _NO = ("yes", "on"), ("no", "off")


def check(values: Any, schema: type, source: str, path: str = "", complete: bool = False) -> Any:
    """Refuse what the schema does not allow.

    Only keys that are given are looked at; interpolations (``${a.b}``) and ``???`` pass.

    Args:
        values: plain values as they were read (`nemo_warp.yaml_text.load`).
        schema: a dataclass of `nemo_warp.schema`.
        source: where the values come from, for messages.
        path: the key under which they stand.
        complete: also refuse tables that lack a key they must have.

    Returns:
        The values, as the plain types that YAML and JSON know: YAML 1.1's ``yes`` and ``off`` are
        true and false where the schema wants one of these, and texts elsewhere.

    Raises:
        ValueError: names the key, the source, what was found and what was expected.
    """
    return _Checker(source, complete).section(values, schema, path)


def unknown_key(name: str, source: str, known: Iterable[str]) -> ValueError:
    """The error for a key that nothing knows, with the closest one that is known."""
    known = sorted(known)
    # difflib's cutoff of 0.6: a typo finds its key, an unrelated word finds none.
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
    return ValueError(f"unknown key '{name}' in {source}; {hint}")


@functools.cache
def keys_of(schema: type) -> dict[str, tuple[Any, Key]]:
    """Name -> (type, what is known) of a schema class, in order."""
    # Annotations are texts (from __future__ import annotations): this resolves them once per class.
    hints = typing.get_type_hints(schema)
    return {f.name: (hints[f.name], about(f)) for f in dataclasses.fields(schema)}


def type_at(schema: type, path: list[str]) -> Any:
    """The type at a dotted path; `Any` in an open section, None where the schema has no such key.

    A number in the path stands for an entry of a list.
    """
    kind: Any = schema
    for part in path:
        kind, _ = _without_none(kind)
        if kind is Any:
            return Any
        if dataclasses.is_dataclass(kind):
            if part not in keys_of(typing.cast(type, kind)):
                return None
            kind, known = keys_of(typing.cast(type, kind))[part]
            # A table whose type is open but whose entries are those of another class.
            kind = known.of or kind
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        elif typing.get_origin(kind) is list:
            kind = typing.get_args(kind)[0] if part.isdigit() else None
        else:
            return None
    return kind


def check_at(value: Any, schema: type, path: list[str], source: str) -> Any:
    """`check` of one value at a dotted path that the schema knows (see `type_at`)."""
    known = Key()
    kind: Any = schema
    for part in path:
        kind, _ = _without_none(kind)
        if dataclasses.is_dataclass(kind):
            kind, known = keys_of(typing.cast(type, kind))[part]
            kind = known.of or kind
        elif typing.get_origin(kind) in (dict, list):
            kind = typing.get_args(kind)[-1]
            known = dataclasses.replace(known, nonempty=False, of=None)
        else:
            kind = Any
    return _Checker(source).value(value, kind, dataclasses.replace(known, of=None), ".".join(path))


def takes_text(kind: Any) -> bool:
    """Whether a value of this type may be a text and nothing but a text (or null)."""
    kind, _ = _without_none(kind)
    return kind is str


def required_keys(schema: type) -> list[str]:
    """Keys of a schema class that have no default."""
    return [f.name for f in dataclasses.fields(schema) if f.default == REQUIRED]


class _Checker:
    def __init__(self, source: str, complete: bool = False) -> None:
        self.source = source
        self.complete = complete

    def section(self, values: Any, schema: type, path: str) -> dict[str, Any]:
        if not isinstance(values, Mapping):
            raise ValueError(
                f"'{path}' in {self.source} is {_shown(values)}, but it is a section with the keys "
                f"{', '.join(keys_of(schema))}"
            )
        known = keys_of(schema)
        checked = {}
        for name, value in values.items():
            place = _join(path, name)
            if name not in known:
                raise unknown_key(place, self.source, (_join(path, k) for k in known))
            checked[name] = self.value(value, *known[name], place)
        lacking = [name for name in required_keys(schema) if values.get(name, REQUIRED) == REQUIRED]
        if self.complete and lacking:
            where = f"'{path}' in {self.source}" if path else self.source
            raise ValueError(f"{where} lacks '{lacking[0]}'")
        return checked

    def value(self, value: Any, kind: Any, key: Key, path: str) -> Any:
        if isinstance(value, str) and ("${" in value or value == REQUIRED):
            return str(value)  # known only once resolved, or refused as missing
        kind, nullable = _without_none(kind)
        if value is None:
            if nullable or kind is Any:
                return None
            raise self._wrong(value, kind, key, path, nullable)
        if key.of:  # it holds only what differs, so nothing of it is missing
            return _Checker(self.source).section(value, key.of, path)
        if dataclasses.is_dataclass(kind):
            return self.section(value, typing.cast(type, kind), path)
        origin = typing.get_origin(kind)
        if origin is dict:
            return self._table(value, typing.get_args(kind)[1], key, path)
        if origin is list:
            return self._list(value, kind, key, path, nullable)
        if kind is Any:
            return self._open(value, path)
        return self._scalar(value, kind, key, path, nullable)

    def _table(self, value: Any, kind: Any, key: Key, path: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise ValueError(
                f"'{path}' in {self.source} is {_shown(value)}, expected a table of keys"
            )
        # YAML makes numbers and booleans of bare keys (a reward called 1, or no): text is meant.
        for name in value:
            if not isinstance(name, str):
                raise ValueError(
                    f"'{path}' in {self.source} has the key {name!r}, expected text; put it in "
                    "quotes"
                )
        if key.nonempty and not value:
            raise ValueError(f"'{path}' in {self.source} is empty, expected at least one entry")
        return {str(n): self.value(v, kind, Key(), _join(path, n)) for n, v in value.items()}

    def _list(self, value: Any, kind: Any, key: Key, path: str, nullable: bool) -> list[Any]:
        if not isinstance(value, (list, tuple)):
            raise self._wrong(value, kind, key, path, nullable)
        if key.nonempty and not value:
            raise ValueError(f"'{path}' in {self.source} is empty, expected at least one entry")
        item = typing.get_args(kind)[0]
        one = dataclasses.replace(key, nonempty=False)
        return [self.value(v, item, one, f"{path}.{i}") for i, v in enumerate(value)]

    def _open(self, value: Any, path: str) -> Any:
        """Any value, but none that YAML 1.1 and 1.2 read differently."""
        if isinstance(value, Mapping):
            return {n: self._open(v, _join(path, n)) for n, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._open(v, f"{path}.{i}") for i, v in enumerate(value)]
        if isinstance(value, Ambiguous):
            raise ValueError(
                f"'{path}' in {self.source} is {value!s}, which YAML parsers read differently; "
                f"put it in quotes{' or write true or false' if value.is_bool else ''}"
            )
        return value

    def _scalar(self, value: Any, kind: Any, key: Key, path: str, nullable: bool) -> Any:
        # bool first and apart, since Python's bool is an int: true must not pass for 1.
        accepted = typing.get_args(kind) if _is_union(kind) else (kind,)
        # Ambiguous is a text: YAML 1.1 reads yes, no, on, off as booleans, YAML 1.2 as words.
        if bool in accepted and isinstance(value, Ambiguous) and value.is_bool:
            return value.lower() in _YES
        good = (
            isinstance(value, bool) if bool in accepted and isinstance(value, bool) else
            not isinstance(value, bool) and (
                (int in accepted and isinstance(value, int))
                or (float in accepted and isinstance(value, (int, float)) and math.isfinite(value))
                or (str in accepted and isinstance(value, str))
            )
        )  # fmt: skip
        if not good or not _fits(value, key):
            raise self._wrong(value, kind, key, path, nullable)
        # A plain str again: the mark of an ambiguous word ends here.
        return str(value) if isinstance(value, str) else value

    def _wrong(self, value: Any, kind: Any, key: Key, path: str, nullable: bool) -> ValueError:
        quotes = takes_text(kind) and isinstance(value, (bool, int, float))
        hint = "; put it in quotes" if quotes else ""
        if isinstance(value, str) and takes_text(kind) and re.search(r"[\x00\n\r]", value):
            hint = ", without line breaks and NUL"
        return ValueError(
            f"'{path}' in {self.source} is {_shown(value)}, expected {expected(kind, key)}"
            f"{' or null' if nullable else ''}{hint}"
        )


def _shown(value: Any) -> str:
    """A value as people write it."""
    if value is None:
        return "null"
    return str(value) if isinstance(value, Ambiguous) else repr(value)


def expected(kind: Any, key: Key) -> str:
    """What a key takes, in words."""
    if key.choices:
        return listed(key.choices)
    kind, _ = _without_none(kind)
    if typing.get_origin(kind) is list:
        item, _ = _without_none(typing.get_args(kind)[0])
        inside = between(key)
        return f"a list of {_plural(item)}{f' ({inside})' if inside else ''}"
    if typing.get_origin(kind) is dict or dataclasses.is_dataclass(kind):
        return "a table of keys"
    if kind is Any:
        return "anything"
    parts = typing.get_args(kind) if _is_union(kind) else (kind,)
    words = listed([_NAMES[part] for part in parts])
    words += f" {key.pattern_help}" if key.pattern_help else ""
    words += " that is not empty" if key.nonempty and takes_text(kind) else ""
    details = ", ".join(detail for detail in (between(key), key.unit) if detail)
    return f"{words} ({details})" if details else words


def _plural(kind: Any) -> str:
    if _is_union(kind):
        return "words"
    plain = {str: "texts", int: "whole numbers", float: "numbers"}
    return plain.get(kind, "tables")


def _fits(value: Any, key: Key) -> bool:
    if key.choices:
        return value in key.choices
    if isinstance(value, str):
        if key.nonempty and not value.strip():
            return False
        if not key.pattern:  # paths, names and words fit on a line
            return not re.search(r"[\x00\n\r]", value)
        return re.fullmatch(key.pattern, value) is not None
    if isinstance(value, bool):
        return True
    # Bounds compare numbers only; texts and booleans were dealt with above.
    return not (
        (key.low is not None and value < key.low)
        or (key.high is not None and value > key.high)
        or (key.above is not None and value <= key.above)
    )


def _without_none(kind: Any) -> tuple[Any, bool]:
    """The type without ``| None``, and whether it had it."""
    if not _is_union(kind):
        return kind, False
    # Python 3.10 has no typing.Union[*rest], and `X | Y` needs the parts one by one.
    rest = tuple(part for part in typing.get_args(kind) if part is not type(None))
    nullable = len(rest) < len(typing.get_args(kind))
    return (rest[0] if len(rest) == 1 else typing.Union[rest]), nullable  # noqa: UP007


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)
