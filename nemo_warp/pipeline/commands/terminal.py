"""What a terminal can show: its size, lines that fit it, and colour where there is one.

Standard library only: login nodes watch runs without the packages that draw screens.
"""

from __future__ import annotations

import os
import unicodedata
from typing import TextIO

_FALLBACK = (80, 24)


def is_terminal(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal that understands cursor movements."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def size_of(stream: TextIO) -> tuple[int, int]:
    """Columns and rows, asked anew each time: a window may be resized."""
    try:
        columns, rows = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        return _FALLBACK
    return columns or _FALLBACK[0], rows or _FALLBACK[1]


def clip(text: str, columns: int) -> str:
    """``text`` as one line of at most ``columns`` columns; control characters become spaces.

    An ellipsis would need a locale; what is cut off is in `nemo-warp status` off a terminal.
    """
    kept, used = [], 0
    for character in text:
        shown = character if character.isprintable() else " "
        width = _width(shown)
        if used + width > columns:
            break
        kept.append(shown)
        used += width
    return "".join(kept).rstrip()


def _width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def in_red(text: str) -> str:
    """Failures look like failures; https://no-color.org is respected."""
    return text if os.environ.get("NO_COLOR") else f"\x1b[31m{text}\x1b[0m"
