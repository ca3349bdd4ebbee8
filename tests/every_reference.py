"""Replacing a function of `os` also where pathlib has a reference of its own."""

import pathlib
from typing import Any

_PATHLIB = getattr(pathlib, "_normal_accessor", None)  # Python 3.10's


def replace_function(module: Any, name: str, function: Any) -> None:
    """For the rest of the process."""
    real = getattr(module, name)
    if getattr(_PATHLIB, name, None) is real:
        setattr(_PATHLIB, name, function)
    setattr(module, name, function)
