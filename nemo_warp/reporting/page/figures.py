"""The page's pictures: plotly figures of what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nemo_warp.reporting.page.benchmarks import Benchmark
from nemo_warp.reporting.page.measures import Measures
from nemo_warp.reporting.run import Curve
from nemo_warp.reporting.style import FINAL_COLOUR, iteration_colour

KL = "KL to SFT (nats per response)"
TRAINING = {
    "reward": "reward",
    "kl_to_sft": KL,
    "length": "length (tokens)",
    "entropy": "entropy (nats per token)",
    "ended_share": "share that ended",
}
ALONG = {
    "length": "length (tokens)",
    "entropy": "entropy (nats per token)",
    "ended_share": "share that ended",
}


def fronts(curves: Sequence[Curve]) -> go.Figure:
    """Reward against KL, hover for a point.

    Trajectories are dashed, their anchors dotted, fronts solid, the result black.
    """
    figure = _figure(520)
    for curve in curves:
        if _is_shown(curve):
            figure.add_trace(_against_kl(curve, "reward", errors=True))
    figure.update_xaxes(title=KL)
    figure.update_yaxes(title="reward")
    return figure


def trajectories(curves: Sequence[Curve]) -> go.Figure:
    """Each member's held-out measurements against the step."""
    members = [curve for curve in curves if curve.kind == "trajectory"]
    names = [name for name in TRAINING if any(_measured(c, name) for c in members)]
    figure = _panels([TRAINING[name] for name in names])
    for curve in members:
        for panel, name in enumerate(names):
            figure.add_trace(
                _trace(curve, curve.column("step"), curve.column(name), panel == 0),
                row=panel // 2 + 1,
                col=panel % 2 + 1,
            )
    figure.update_xaxes(title="step")
    return figure


def along(curves: Sequence[Curve], diversity: Mapping[str, Mapping[str, list[float]]]) -> go.Figure:
    """Length, entropy and diversity of the responses against KL.

    Args:
        diversity: measure -> curve's name -> one number per point, NaN where unknown.
    """
    measures = {title: {c.name: c.column(name) for c in curves} for name, title in ALONG.items()}
    return against_kl(curves, {**measures, **diversity})


def against_kl(
    curves: Sequence[Curve], measures: Mapping[str, Mapping[str, list[float]]]
) -> go.Figure:
    """A panel for each measure that is known anywhere.

    Args:
        measures: title -> curve's name -> one number per point, NaN where unknown.
    """
    shown = [curve for curve in curves if _is_shown(curve)]
    measures = {
        title: values
        for title, values in measures.items()
        if any(not math.isnan(v) for column in values.values() for v in column)
    }
    figure = _panels(list(measures))
    for panel, values in enumerate(measures.values()):
        for curve in shown:
            if curve.name in values:
                trace = _trace(curve, curve.column("kl_to_sft"), values[curve.name], panel == 0)
                figure.add_trace(trace, row=panel // 2 + 1, col=panel % 2 + 1)
    figure.update_xaxes(title=KL)
    return figure


def angles(by_iteration: Mapping[int, Mapping[str, Mapping[str, float]]]) -> go.Figure:
    """Angle in degrees between the members' task vectors, per layer; 90 degrees is marked."""
    figure = _figure(380)
    for iteration, values in by_iteration.items():
        figure.add_trace(
            go.Scatter(
                x=list(values),
                y=[of_layer["angle"] for of_layer in values.values()],
                mode="lines+markers",
                name=f"iteration {iteration}",
                line={"color": iteration_colour(iteration)},
            )
        )
    figure.add_hline(y=90, line={"dash": "dot", "color": "#999"})
    figure.update_yaxes(title="angle (degrees)", range=[0, 100])
    return figure


def judges(curves: Sequence[Curve], names: Sequence[str]) -> go.Figure:
    """Each judge against KL: where it stops rising, the reward is being hacked."""
    figure = _panels(list(names))
    for panel, name in enumerate(names):
        for curve in curves:
            values = [(point.get("judges") or {}).get(name) for point in curve.points]
            if _is_shown(curve) and any(v is not None for v in values):
                numbers = [math.nan if v is None else v for v in values]
                trace = _trace(curve, curve.column("kl_to_sft"), numbers, panel == 0)
                if curve.position == "eta":
                    errors = [(p.get("judges_stderr") or {}).get(name) for p in curve.points]
                    trace.error_y = {"array": errors, "thickness": 1, "width": 2}
                figure.add_trace(trace, row=panel // 2 + 1, col=panel % 2 + 1)
    figure.update_xaxes(title=KL)
    return figure


def best_of(
    curves: Sequence[Curve], measured: Mapping[str, Sequence[Measures | None]]
) -> go.Figure:
    """Best of N of every point of the last front: what sampling more gives without training.

    Each line begins at a point's own reward and KL (N = 1); SFT's is best-of-N itself.
    """
    figure = _figure(460)
    front = [c for c in curves if c.kind in ("front", "final")][-1:]
    for curve in front:
        figure.add_trace(_against_kl(curve, "reward"))
        for point, found in zip(curve.points, measured[curve.name], strict=True):
            if found is None or len(found.best_of) < 2:
                continue
            name = f"best of N at {point[curve.position]:g}"
            figure.add_trace(
                go.Scatter(
                    x=[best.kl for best in found.best_of],
                    y=[best.reward for best in found.best_of],
                    mode="lines+markers",
                    name=name,
                    hovertext=[
                        f"{name}<br>N {b.n}<br>reward {b.reward:.3f}<br>KL at most {b.kl:.2f}"
                        for b in found.best_of
                    ],
                    hoverinfo="text",
                    line={"width": 1, "dash": "dot"},
                )
            )
    figure.update_xaxes(title="KL to SFT, at most (nats per response)")
    figure.update_yaxes(title="reward of the best")
    return figure


def benchmarks(found: Sequence[Benchmark], most: int = 12) -> go.Figure:
    """Each metric against KL (against kappa, where no KL is known), with its standard error."""
    figure = _panels([b.name for b in found[:most]])
    for panel, one in enumerate(found[:most]):
        known = not any(math.isnan(kl) for kl in one.kls)
        trace = go.Scatter(
            x=one.kls if known else one.kappas,
            y=one.values,
            error_y={"array": one.errors, "thickness": 1, "width": 2},
            mode="lines+markers",
            showlegend=False,
            hovertext=[
                f"kappa {kappa:g}<br>{value:.4g}"
                for kappa, value in zip(one.kappas, one.values, strict=True)
            ],
            hoverinfo="text",
            line={"color": FINAL_COLOUR},
        )
        row, column = panel // 2 + 1, panel % 2 + 1
        figure.add_trace(trace, row=row, col=column)
        figure.update_xaxes(title=KL if known else "kappa", row=row, col=column)
    return figure


def _is_shown(curve: Curve) -> bool:
    """Fronts of single iterations towards SFT are in the table only."""
    return curve.kind in ("trajectory", "anchor", "final") or curve.name.endswith("from init")


def _measured(curve: Curve, name: str) -> bool:
    return any(not math.isnan(value) for value in curve.column(name))


def _against_kl(curve: Curve, name: str, errors: bool = False) -> go.Scatter:
    trace = _trace(curve, curve.column("kl_to_sft"), curve.column(name), True)
    if errors and curve.position == "eta":
        trace.error_y = {"array": curve.column(f"{name}_stderr"), "thickness": 1, "width": 2}
    return trace


def _trace(curve: Curve, x: list[float], y: list[float], legend: bool) -> go.Scatter:
    colour = FINAL_COLOUR if curve.kind == "final" else iteration_colour(curve.iteration)
    thin = curve.position == "step"
    dash = {"trajectory": "dash", "anchor": "dot"}.get(curve.kind, "solid")
    hover = [
        f"{curve.name}<br>{curve.position} {point[curve.position]:g}"
        f"<br>reward {point['reward']:.3f}<br>KL {point['kl_to_sft']:.2f}<br>here {value:.4g}"
        for point, value in zip(curve.points, y, strict=True)
    ]
    return go.Scatter(
        x=x,
        y=y,
        mode="lines+markers",
        name=curve.name,
        legendgroup=curve.name,
        showlegend=legend,
        hovertext=hover,
        hoverinfo="text",
        marker={"size": 4 if thin else 7},
        line={"color": colour, "dash": dash, "width": 1 if thin else 2},
    )


def _panels(titles: Sequence[str]) -> go.Figure:
    rows = max(1, math.ceil(len(titles) / 2))
    # Spacing in shares of the figure's height, which grows with the rows.
    figure = make_subplots(rows=rows, cols=2, subplot_titles=titles, vertical_spacing=0.34 / rows)
    figure.update_layout(**_layout(340 * rows + 80))
    return figure


def _figure(height: int) -> go.Figure:
    return go.Figure(layout=_layout(height))


def _layout(height: int) -> dict:
    return {
        "height": height,
        "template": "plotly_white",
        "margin": {"t": 40, "r": 20, "l": 60},
        "legend": {"orientation": "h", "y": -80 / height},  # of the figure's height
    }
