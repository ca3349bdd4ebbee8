"""The one way in which `nemo_warp` changes another package: in the open, and on record."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class Replacements:
    """Sets attributes of foreign modules and classes, remembering each with its reason."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def set(self, owner: Any, name: str, value: Any, note: str) -> None:
        """``owner.name = value``, recorded as ``owner.name: note``."""
        setattr(owner, name, value)
        self.record(f"{_qualified_name(owner)}.{name}", note)

    def add_module(self, name: str, note: str, **attributes: Any) -> None:
        """Make ``import name`` find a module that holds ``attributes``."""
        module = ModuleType(name, f"Stand-in of nemo_warp: {note}.")
        vars(module).update(attributes)
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        # "from parent import leaf" looks for an attribute first, "import parent.leaf" in
        # sys.modules.
        if parent in sys.modules:
            setattr(sys.modules[parent], leaf, module)
        self.record(name, note)

    def record(self, what: str, note: str) -> None:
        """Remember a replacement made by other means (an environment variable, an option)."""
        self.made.append(f"{what}: {note}")


def _qualified_name(owner: Any) -> str:
    if isinstance(owner, type):
        return f"{owner.__module__}.{owner.__qualname__}"
    return owner.__name__
