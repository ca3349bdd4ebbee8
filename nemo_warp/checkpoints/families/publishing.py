"""Outputs that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when everything is written and on the disk.

    Raises:
        ValueError: there is one of that name.
    """
    _refuse_existing(path)
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(path)
    finally:
        # After a success there is nothing of this name.
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder of the same kind; yields where its files are written meanwhile.

    Raises:
        ValueError: there is one of that name.
    """
    _refuse_existing(path)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise ValueError(f"{path} exists; name another output or remove it")
