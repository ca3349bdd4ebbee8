"""Further fields of a prompt (its answer, its tests, ...), which callables take by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nemo_warp.rewards.errors import RewardError

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class MissingFieldError(RewardError):
    """A prompt lacks a field that the reward cannot do without."""


@dataclass(frozen=True)
class FieldsTaken:
    """What a callable takes beside the prompt and the response.

    Attributes:
        needed: without these it cannot be called.
        defaults: what it takes where the prompt has it, and else goes by its own default.
        reserved: its other names: those of its two texts, and of its options.
        every: it takes any other field, too (``**fields``).
    """

    needed: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    reserved: tuple[str, ...] = ()
    every: bool = False

    @classmethod
    def by(cls, score: Any) -> FieldsTaken:
        """Of a callable; options that a `partial` binds are no fields."""
        options = tuple(score.keywords) if isinstance(score, partial) else ()
        try:
            parameters = list(inspect.signature(score).parameters.values())
        except ValueError:  # built-in functions have none
            return cls()
        # The first two by position, whatever they are called.
        texts = [p.name for p in parameters if p.kind in _POSITIONAL][:2]
        named = [p for p in parameters if p.kind in _BY_NAME and p.name not in (*texts, *options)]
        return cls(
            needed=tuple(p.name for p in named if p.default is p.empty),
            defaults={p.name: p.default for p in named if p.default is not p.empty},
            reserved=(*texts, *options),
            every=any(p.kind is p.VAR_KEYWORD for p in parameters),
        )

    @property
    def names(self) -> tuple[str, ...] | None:
        """Fields worth sending; None is all of them."""
        return None if self.every else (*self.needed, *self.defaults)

    def check(self, fields: Mapping[str, Any]) -> None:
        """Raise `MissingFieldError` if a needed field is not there."""
        for name in self.needed:
            if name not in fields:
                raise MissingFieldError(f"the prompt has no field '{name}', which the reward takes")

    def of_one(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments for one sample.

        Raises:
            MissingFieldError: a needed field is not there.
        """
        self.check(fields)
        names = self._wanted(fields)
        return {name: fields[name] for name in names if name in fields}

    def of_many(self, fields: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        """Keyword arguments for samples together: a list a field, its default where one lacks it.

        Fields that only some of them have are None for the others, if the callable has no default.
        """
        there = dict.fromkeys(name for one in fields for name in self._wanted(one))
        present = [name for name in there if any(name in one for one in fields)]
        return {
            name: [one.get(name, self.defaults.get(name)) for one in fields] for name in present
        }

    def _wanted(self, fields: Mapping[str, Any]) -> tuple[str, ...]:
        if not self.every:
            return self.names or ()
        return tuple(name for name in fields if name not in self.reserved)
