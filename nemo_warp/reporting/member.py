"""Draw what one member measured: ``python -m nemo_warp.reporting.member MEMBER_DIR``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nemo_warp import exit_codes
from nemo_warp.records import RecordError
from nemo_warp.reporting.run import column
from nemo_warp.reporting.series import read_metrics
from nemo_warp.reporting.style import MUTED, SETTINGS, label_axes, save, series_colour

METRICS_FILE = "metrics.jsonl"

# Title and unit of a panel -> the metrics it shows against the step, each with its label.
PANELS: dict[tuple[str, str], dict[str, str]] = {
    ("reward", "reward"): {"reward": "held-out"},
    ("KL", "KL (nats per response)"): {"kl_to_sft": "to SFT", "kl_to_anchor": "to the anchor"},
    ("length", "tokens per response"): {"length": "held-out"},
    ("entropy", "entropy (nats per token)"): {"entropy": "held-out"},
    ("ended responses", "share"): {"ended_share": "held-out"},
}


def draw_member(member: Path, output: Path) -> None:
    """Draw the held-out measurements of the member in directory ``member`` into PNG ``output``.

    Raises:
        ValueError: nothing has been measured yet.
        RecordError: the metrics cannot be read.
    """
    evals = read_metrics(member / METRICS_FILE, "eval")
    train = read_metrics(member / METRICS_FILE, "train")
    if not evals:
        raise ValueError(f"{member / METRICS_FILE} has no evaluation yet; wait for the first one")
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(9.6, 5.6), layout="constrained")
        axes = list(figure.subplots(2, 3).flat)
        # Six panels for five metrics: the last one is the trajectory.
        for panel, ((title, unit), metrics) in zip(axes, PANELS.items(), strict=False):
            _draw_against_steps(panel, evals, train, metrics)
            label_axes(panel, "step", unit, title)
        _draw_trajectory(axes[len(PANELS)], evals)
        save(figure, output)


def _draw_against_steps(
    axes: Axes, evals: list[dict[str, Any]], train: list[dict[str, Any]], metrics: dict[str, str]
) -> None:
    for index, (key, label) in enumerate(metrics.items()):
        # Behind a single held-out line the training batch shows how noisy it is; behind two it
        # would be taken for a third.
        if len(metrics) == 1 and any(record.get(key) is not None for record in train):
            steps = column(train, "step")
            axes.plot(steps, column(train, key), color=MUTED, linewidth=0.7, label="training batch")
        # At most two metrics share a panel: two markers, told apart without colour as well.
        axes.errorbar(
            column(evals, "step"),
            column(evals, key),
            yerr=column(evals, f"{key}_stderr"),
            color=series_colour(index),
            marker="os"[index],
            markersize=3,
            label=label,
        )
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend()


def _draw_trajectory(axes: Axes, evals: list[dict[str, Any]]) -> None:
    kl, reward = column(evals, "kl_to_sft"), column(evals, "reward")
    axes.plot(kl, reward, color=series_colour(0), marker="o", markersize=3)
    for index, offset, side in ((0, (6, -10), "left"), (-1, (-6, 4), "right")):
        axes.annotate(
            f"step {evals[index]['step']}",
            (kl[index], reward[index]),
            xytext=offset,
            textcoords="offset points",
            horizontalalignment=side,
            fontsize=8,
        )
    axes.margins(x=0.08, y=0.12)
    label_axes(axes, "KL to SFT (nats per response)", "reward", "trajectory")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns an exit code of `nemo_warp.exit_codes`."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_warp.reporting.member",
        description="Draw a member's reward, KL, length, entropy and trajectory from its "
        "metrics.jsonl. Works while the member is still training.",
        epilog="example: python -m nemo_warp.reporting.member runs/tiny/iteration_01/member_01",
    )
    parser.add_argument("member", type=Path, help="the member's directory")
    parser.add_argument("--output", type=Path, help="PNG to write [MEMBER/curves.png]")
    parsed = parser.parse_args(arguments)
    output = parsed.output or parsed.member / "curves.png"
    try:
        draw_member(parsed.member, output)
    except (ValueError, RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.MISCONFIGURED
    print(output)
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())
