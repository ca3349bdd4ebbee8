"""Groups of runs that differ in their seed: fronts with bands, hypervolume, reward at equal KL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from nemo_warp.evidence.fronts import hypervolume, reward_at
from nemo_warp.evidence.intervals import Interval, over_seeds
from nemo_warp.reporting.bands import draw_band
from nemo_warp.reporting.run import Curve, read_run
from nemo_warp.reporting.style import SETTINGS, label_axes, save, series_colour
from nemo_warp.reporting.table import markdown_rows, round_kls


@dataclass(frozen=True)
class Group:
    """Runs of one recipe under several seeds.

    Attributes:
        name: for people.
        fronts: each run's best curve over KL: its final front, or its last iteration's LITI front,
            or, before there is one, its members' trajectories.
    """

    name: str
    fronts: list[Curve]


def read_group(word: str) -> Group:
    """``name=run,run,run``, ``run,run`` or ``run``.

    Raises:
        ValueError: not a run, or nothing measured in it yet.
        RecordError: a measurement on disk is malformed.
    """
    name, equals, runs = word.rpartition("=")
    paths = [Path(path) for path in (runs if equals else word).split(",") if path]
    if not paths:
        raise ValueError(f"'{word}' names no run; write NAME=RUN,RUN or RUN")
    return Group(name if equals else paths[0].name, [front_of(path) for path in paths])


def front_of(run: Path) -> Curve:
    """The last front of a run; of a run without one, its last trajectory."""
    curves = read_run(run)
    for kind in ("final", "front", "trajectory"):
        found = [curve for curve in curves if curve.kind == kind and len(curve.points) > 1]
        if found:
            return found[-1]
    raise ValueError(f"{run} has no curve of two points yet")


def compare(groups: Sequence[Group]) -> tuple[str, dict[str, Any]]:
    """A table for people, and the same numbers; differences are to the first group.

    The range of KL is the one that all of the first group's fronts cover. Where another front ends
    before, its reward is left out, and its hypervolume goes on with its best reward.
    """
    # A policy of little KL would hide what the others do beyond it: the first group sets the range.
    limit = min(max(f.column("kl_to_sft")) for f in groups[0].fronts)
    # One reference point for all groups, or their areas could not be compared.
    floor = max(min(f.column("reward")) for group in groups for f in group.fronts)
    kls = round_kls(limit)
    measured = {group.name: _measures(group, limit, floor, kls) for group in groups}
    values: dict[str, Any] = {"kl_limit": limit, "reward_floor": floor, "groups": {}}
    rows = []
    for group in groups:
        per_seed = measured[group.name]
        found = {name: over_seeds(np.array(seeds)) for name, seeds in per_seed.items()}
        base = measured[groups[0].name]
        apart = {name: _difference(seeds, base[name]) for name, seeds in per_seed.items()}
        values["groups"][group.name] = {
            name: {
                "seeds": [None if np.isnan(v) else float(v) for v in per_seed[name]],
                **found[name].to_json(),
                "to_first": apart[name].to_json(),
            }
            for name in found
        }
        rows.append([f"{group.name} ({len(group.fronts)})", *map(cell, found.values())])
        if group is not groups[0]:
            rows.append([f"- {groups[0].name}", *(cell(i, mark=True) for i in apart.values())])
    header = ["group (seeds)", "hypervolume", *(f"KL {kl:g}" for kl in kls)]
    text = "\n".join(
        [
            f"Hypervolume up to {limit:.3g} nats above a reward of {floor:.3g}; reward at equal KL",
            "",
            *markdown_rows(header, rows),
            "",
            "[95 % intervals], Student's t over seeds (Welch's for differences); * excludes 0.",
        ]
    )
    return text, values


def draw(groups: Sequence[Group], path: Path) -> None:
    """Every seed's front thin, each group's mean thick, its 95 % interval over seeds as a band."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(7.2, 5.0), layout="constrained")
        axes = figure.subplots()
        for index, group in enumerate(groups):
            colour = series_colour(index)
            for front in group.fronts:
                # Thin lines for single seeds, since a band over three of them hides one that
                # differs.
                axes.plot(
                    front.column("kl_to_sft"),
                    front.column("reward"),
                    color=colour,
                    linewidth=0.8,
                    alpha=0.5,
                    marker=".",
                    markersize=3,
                )
            seeds, metrics = [[front] for front in group.fronts], ("kl_to_sft", "reward")
            label = f"{group.name} ({len(group.fronts)} seeds)"
            draw_band(axes, seeds, metrics, label, colour, linewidth=1.5)
        label_axes(axes, "KL to SFT (nats per response)", "reward")
        axes.legend(loc="lower right")
        save(figure, path)


def _at(front: Curve, kl: float) -> float:
    return reward_at(front.column("kl_to_sft"), front.column("reward"), kl)


def _measures(
    group: Group, limit: float, floor: float, kls: Sequence[float]
) -> dict[str, list[float]]:
    values = {
        "hypervolume": [
            hypervolume(f.column("kl_to_sft"), f.column("reward"), limit, floor)
            for f in group.fronts
        ]
    }
    return values | {f"kl {kl:g}": [_at(front, kl) for front in group.fronts] for kl in kls}


def _difference(seeds: Sequence[float], base: Sequence[float]) -> Interval:
    """Welch's interval of the difference of two means over seeds (unequal variances)."""
    from scipy import stats

    mean = float(np.mean(seeds) - np.mean(base))
    # One seed has no variance, so no interval either.
    if min(len(seeds), len(base)) < 2:
        return Interval(mean, np.nan, np.nan, min(len(seeds), len(base)))
    found = stats.ttest_ind(seeds, base, equal_var=False).confidence_interval(0.95)
    return Interval(mean, float(found.low), float(found.high), min(len(seeds), len(base)))


def cell(interval: Interval, mark: bool = False) -> str:
    """As tables show it: nothing where nothing was measured, a star where 0 is excluded."""
    if np.isnan(interval.mean):
        return ""
    if np.isnan(interval.low):
        return f"{interval.mean:.3f}"
    return f"{interval}{' *' if mark and interval.excludes_zero else ''}"
