"""Progress of long work: a bar on a terminal, a plain line now and then anywhere else.

Batch systems keep what a job prints. A bar that is redrawn with carriage returns would
be a single line of megabytes there.
"""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm

LINE_INTERVAL_S = 30.0


def progress(*iterable: Any, stream: TextIO | None = None, **options: Any) -> Any:
    """tqdm, with its arguments; off a terminal a line at most every `LINE_INTERVAL_S` seconds."""
    stream = stream or sys.stderr
    if stream.isatty():
        return tqdm(*iterable, file=stream, **options)
    lines = {"file": _Lines(stream), "mininterval": LINE_INTERVAL_S, "miniters": 1, "ncols": 0}
    return _Plain(*iterable, **{**lines, **options})


class _Plain(tqdm):
    monitor_interval = 0  # its thread would print when nothing has happened

    def set_postfix(self, ordered_dict: Any = None, refresh: bool = True, **values: Any) -> None:
        """Told with the next line, and not by one of its own."""
        super().set_postfix(ordered_dict, refresh=False, **values)


class _Lines:
    """What tqdm draws with carriage returns and paddings, as lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()
