"""The numbers behind the KL-reward picture, as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

import numpy as np

from nemo_warp.evidence.fronts import reward_at
from nemo_warp.reporting.run import Curve

COLUMNS = (
    "curve",
    "position",
    "reward",
    "reward_stderr",
    "kl_to_sft",
    "kl_to_sft_stderr",
    "length",
    "ended_share",
    "num_prompts",
)


def judge_columns(curves: Sequence[Curve]) -> list[str]:
    """Judges that some point was measured with."""
    found = (name for c in curves for point in c.points for name in point.get("judges") or {})
    return list(dict.fromkeys(found))


def shown_points(curve: Curve) -> list[dict]:
    """The points that a table for people has: the last one of a member or its anchor."""
    return curve.points[-1:] if curve.position == "step" else curve.points


def csv_table(curves: Sequence[Curve]) -> str:
    """Every measurement, one a row, in full precision; what was not measured is empty."""
    text = io.StringIO()
    # csv's default is CRLF on every system.
    writer = csv.writer(text, lineterminator="\n")
    judges = judge_columns(curves)
    writer.writerow([*COLUMNS, *(f"judge:{name}" for name in judges)])
    for curve in curves:
        for point in curve.points:
            place = f"{curve.position} {point[curve.position]:g}"
            values = [point.get(key) for key in COLUMNS[2:]]
            values += [(point.get("judges") or {}).get(name) for name in judges]
            writer.writerow([curve.name, place, *("" if v is None else v for v in values)])
    return text.getvalue()


def markdown_table(curves: Sequence[Curve]) -> str:
    """Two tables: the fronts and the last point of each trajectory; rewards at equal KL."""
    judges = judge_columns(curves)
    header = "curve | point | reward | KL to SFT (nats) | length (tokens) | ended | prompts"
    lines = ["## Measurements", "", *_header(" | ".join([header, *judges]))]
    for curve in curves:
        for point in shown_points(curve):
            judged = [_number(point.get("judges") or {}, name, ".3f") for name in judges]
            lines.append(_row([curve.name, *_cells(point, curve.position), *judged]))
    return "\n".join([*lines, "", *_equal_kl_lines(curves)]) + "\n"


def _equal_kl_lines(curves: Sequence[Curve]) -> list[str]:
    """Rewards at round KLs up to the largest measured."""
    grid = round_kls(max(max(curve.column("kl_to_sft")) for curve in curves))
    if not grid:
        return []
    titles = " | ".join(f"KL {kl:g}" for kl in grid)
    lines = ["## Reward at equal KL (linear between measured points)", ""]
    lines += _header(f"curve | {titles}")
    for curve in curves:
        # Interpolated, since no two curves are measured at the same KL.
        rewards = (reward_at(curve.column("kl_to_sft"), curve.column("reward"), kl) for kl in grid)
        lines.append(_row([curve.name, *("" if math.isnan(r) else f"{r:.3f}" for r in rewards)]))
    return lines


def round_kls(largest: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, at most ten of them, up to ``largest``."""
    if largest <= 0:
        return []
    magnitude = 10.0 ** np.floor(np.log10(largest / 10))
    # At most ten multiples: 11 steps would have to pass the largest.
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude * 11 > largest)
    return [step * number for number in range(1, int(largest / step) + 1)]


def _cells(point: dict, position: str) -> list[str]:
    return [
        f"{position} {point[position]:g}",
        _estimate(point, "reward", 3),
        _estimate(point, "kl_to_sft", 2),
        _number(point, "length", ".1f"),
        _number(point, "ended_share", ".0%"),
        _number(point, "num_prompts", "d"),
    ]


def _estimate(point: dict, key: str, digits: int) -> str:
    error = point.get(f"{key}_stderr")
    text = f"{point[key]:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def _number(point: dict, key: str, form: str) -> str:
    return "" if point.get(key) is None else format(point[key], form)


def markdown_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [*_header(" | ".join(header)), *map(_row, rows)]


def _header(titles: str) -> list[str]:
    names = titles.split(" | ")
    return [_row(names), "|---" * len(names) + "|"]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
