"""report.json, a readable table, and pictures of a merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_warp.merge.publish.provenance import provenance
from nemo_warp.merge.report.statistics import merge_statistics
from nemo_warp.merge.results import MergeResult
from nemo_warp.records import write_json_atomically, write_text_atomically

REPORT, TABLE = "report.json", "report.md"


def write_report(result: MergeResult, folder: Path, timing: dict[str, Any]) -> dict[str, Any]:
    """Write the report's files into ``folder``; returns the contents of report.json.

    Args:
        result: of a merge.
        folder: made if missing; files of an earlier report are replaced.
        timing: seconds, bytes and memory, see `nemo_warp.merge.report.meter.Meter`.
    """
    from nemo_warp.merge.report.figures import (
        draw_figures,  # matplotlib: only when a report is wanted
    )

    folder.mkdir(parents=True, exist_ok=True)
    statistics = merge_statistics(result)
    report = {**provenance(result.plan, result.groups), **statistics, "timing": timing}
    write_text_atomically(folder / TABLE, table(report))
    draw_figures(statistics, folder)
    write_json_atomically(folder / REPORT, report)
    return report


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: one line per unit, the first pair's angle and ratio, all etas."""
    lines = ["# Merge report", "", *describe_merge(report), "", *unit_table(report)]
    if report["warnings"]:
        lines += ["", "## Warnings", "", *(f"- {warning}" for warning in report["warnings"])]
    return "\n".join(lines) + "\n"


def unit_table(report: dict[str, Any]) -> list[str]:
    """Lines of a Markdown table with a row per unit and one for the whole model."""
    rows = {**report["units"], "whole model": report["model"]}
    etas = [output["eta"] for output in report["model"]["outputs"]]
    head = ["unit", "angle", "norm ratio", "norm init"]
    head += [f"norm delta {i}" for i in _policies(report)]
    if _has_spread(report):
        head.append("spread over orders (%)")
    head += [f"realised {eta:g} (changed)" for eta in etas]
    lines = [_row(head), _row(["---"] * len(head))]
    return lines + [_row([name, *_cells(row, _has_spread(report))]) for name, row in rows.items()]


def _has_spread(report: dict[str, Any]) -> bool:
    return report["model"]["order_spread"] is not None


def _policies(report: dict[str, Any]) -> range:
    return range(1, 1 + len(report["model"]["norms"]["task_vectors"]))


def describe_merge(report: dict[str, Any]) -> list[str]:
    """Lines that say what was merged and how."""
    options = report["options"]
    settings = ", ".join(f"{key} {options[key]}" for key in ("method", "granularity", "dtype"))
    inputs = [
        f"- {i['role']}: {i['name']} (weights {i['weights_digest'][:12]})" for i in report["inputs"]
    ]
    return [
        f"{settings}. Angles in degrees between the task vectors of policies 1 and 2.",
        "",
        *inputs,
    ]


def _cells(row: dict[str, Any], with_spread: bool) -> list[str]:
    pair = row["pairs"][0]["task_vectors"] if row["pairs"] else {}
    numbers = [pair.get("angle"), pair.get("norm_ratio"), row["norms"]["init"]]
    numbers += row["norms"]["task_vectors"]
    if with_spread:
        numbers.append(None if row["order_spread"] is None else 100 * row["order_spread"])
    outputs = [
        f"{_number(output['realised_eta'])} ({100 * output['changed_share']:.1f} %)"
        for output in row["outputs"]
    ]
    return [_number(number) for number in numbers] + outputs


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
