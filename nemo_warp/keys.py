"""Every configuration key with its type, default, range and meaning.

nemo-warp keys                     all of them
nemo-warp keys member rollout      those of one file, or of one section of it
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

from nemo_warp import exit_codes
from nemo_warp.config import SCHEMAS
from nemo_warp.schema.check import expected, keys_of, unknown_key
from nemo_warp.schema.key import REQUIRED, Key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``nemo-warp keys``."""
    parser.add_argument("file", nargs="?", choices=sorted(SCHEMAS), help="which configuration")
    parser.add_argument("section", nargs="?", help="a section of it, e.g. rollout")


def main(args: argparse.Namespace) -> int:
    """Print the keys; an exit code of `nemo_warp.exit_codes`."""
    for name in [args.file] if args.file else sorted(SCHEMAS):
        print(f"# {name}: {(SCHEMAS[name].__doc__ or '').strip()}")
        rows = list(rows_of(SCHEMAS[name]))
        if args.section:
            sections = {path.partition(".")[0] for path, *_ in rows}
            if args.section not in sections:
                raise unknown_key(args.section, name, sections)
            rows = [row for row in rows if row[0].partition(".")[0] == args.section]
        for path, kind, default, meaning in rows:
            print(f"{path} = {default}\n    {meaning}\n    {kind}")
        print()
    return exit_codes.DONE


def rows_of(schema: type, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(dotted key, what it takes, default, meaning) of every key of a schema class."""
    for field in dataclasses.fields(schema):
        kind, key = keys_of(schema)[field.name]
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from rows_of(kind, f"{path}.")
            continue
        nullable = type(None) in getattr(kind, "__args__", ())
        takes = expected(kind, key) + (" or null" if nullable else "")
        yield path, takes, _shown(field), _meaning(key)


def _meaning(key: Key) -> str:
    more = [f"paper: {key.paper}"] if key.paper else []
    more += [f"on restart: {key.restart}"] if key.restart else []
    return f"{key.help} ({'; '.join(more)})" if more else key.help


def _shown(field: dataclasses.Field) -> str:
    value: Any = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value == REQUIRED:
        return "(must be given)"
    return "null" if value is None else str(value)
