"""Another eta for every layer: the outputs' eta times a factor of the layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml

from nemo_warp.checkpoints.names import depth_of, group_order

DEFAULT = "default"
EtaScale = tuple[float, float] | dict[str, float]
"""Factors of the first and the last layer, or of some layers by number or name."""


def parse_eta_scale(value: object) -> EtaScale | None:
    """The option as Python or the command line gives it.

    Args:
        value: None, two numbers, a table, or the path of a YAML file that holds one.

    Raises:
        ValueError: it is nothing of that.
    """
    if value is None:
        return None
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1:
        value = value[0]
    if isinstance(value, str | Path):
        value = _read(Path(value))
    if isinstance(value, Mapping):
        return {str(name): _factor(factor) for name, factor in value.items()}
    if isinstance(value, Sequence) and len(value) == 2:
        return _factor(value[0]), _factor(value[1])
    raise ValueError(f"--eta-scale needs two factors, or a YAML file of layer: factor; got {value}")


def largest_factor(scale: EtaScale | None) -> float:
    """The factor that is furthest from zero."""
    if not scale:
        return 1.0
    return max(map(abs, scale.values() if isinstance(scale, dict) else scale))


def eta_factors(scale: EtaScale | None, groups: Iterable[str]) -> dict[str, float]:
    """Group -> factor of its eta; {} without a scale.

    Two ends are joined by a line over the depth; what comes before the layers takes the first end,
    what comes after them the last.

    Raises:
        ValueError: the table names a layer that is not there.
    """
    names = list(groups)
    if scale is None:
        return {}
    if isinstance(scale, dict):
        return _from_table(scale, names)
    first, last = scale
    steps = max(1, max((depth_of(name) or 0 for name in names), default=0))

    def factor(name: str) -> float:
        depth = depth_of(name)
        if depth is None:
            return first if group_order(name)[0] == 0 else last
        return first + (last - first) * depth / steps

    return {name: factor(name) for name in names}


def _from_table(table: dict[str, float], names: list[str]) -> dict[str, float]:
    by_key = {str(depth_of(name)): name for name in names if depth_of(name) is not None}
    by_key |= {name: name for name in names}
    for key in table:
        if key not in by_key and key != DEFAULT:
            raise ValueError(
                f"--eta-scale names {key!r}, which is no layer of the model; "
                f"use numbers, {DEFAULT!r}, or one of {', '.join(names[:3])} ..."
            )
    found = {by_key[key]: factor for key, factor in table.items() if key != DEFAULT}
    return {name: found.get(name, table.get(DEFAULT, 1.0)) for name in names}


def _read(path: Path) -> object:
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--eta-scale: {path} cannot be read as YAML ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"--eta-scale: {path} holds no table of layer: factor")
    return found


def _factor(value: object) -> float:
    try:
        factor = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        factor = math.nan
    if not math.isfinite(factor):
        raise ValueError(f"--eta-scale needs numbers, found {value!r}")
    return factor
