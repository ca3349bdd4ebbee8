"""Where configurations, recipes and scripts are: a checkout's top, or what a wheel carries."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent

SHIPPED = PACKAGE / "shipped"
"""A wheel's copy of ``conf/``, ``recipes/``, ``slurm/`` and ``tools/`` (setup.py makes it)."""


def shared(name: str) -> Path:
    """The folder ``name`` of the repository (``conf``, ``recipes``, ``slurm``, ``tools``)."""
    carried = SHIPPED / name
    return carried if carried.is_dir() else PACKAGE.parent / name


def named(path: Path, folder: str) -> Path:
    """``path`` if it exists; else what is shipped under that name in ``folder``, if anything is.

    One word names something shipped (``length_penalty``), and so does the path that a checkout
    has (``recipes/length_penalty``). The user's own file of that name comes first.
    """
    if path.exists() or path.is_absolute():
        return path
    parts = path.parts[1:] if path.parts[:1] == (folder,) else path.parts
    carried = shared(folder).joinpath(*parts)
    return carried if parts and ".." not in parts and carried.exists() else path
