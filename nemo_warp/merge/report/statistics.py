"""The report's numbers, from Gram matrices: angles, norms, ratios, realised eta, changed share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from nemo_warp.checkpoints.names import depth_of
from nemo_warp.core.merging import angle, full_weight_gram, order_spread
from nemo_warp.merge.decisions import unit_etas
from nemo_warp.merge.options import MergeOptions
from nemo_warp.merge.results import MergeResult, UnitResult, exact_sum

REALISED_TOLERANCE = 0.05
WIDE_DEGREES = 120.0


def unit_statistics(
    unit: UnitResult, etas: Sequence[float], options: MergeOptions
) -> dict[str, Any]:
    """What the report says about one unit.

    Args:
        unit: what was measured.
        etas: of the unit, one per output.
        options: of the merge.

    Returns:
        ``pairs``: per pair of policies, angle (degrees), cosine and norm ratio of task vectors
        and of full weights; ``norms``: of theta_init and of each task vector; ``outputs``: per
        eta, realised eta and the share of weights that differ from theta_init; ``order_spread``:
        see `nemo_warp.core.merging.order_spread`, None for methods without an order.
    """
    num_policies = len(options.policies)
    size = 1 + num_policies
    gram = unit.gram[:size, :size]
    full, deltas = full_weight_gram(gram), gram[1:, 1:]
    realised = unit.realised_etas(_towards(options))
    ordered = {"slerp": deltas, "slerp-full": full}.get(options.method)
    return {
        "order_spread": None if ordered is None else order_spread(ordered, options.weight),
        "num_elements": unit.num_elements,
        "norms": {
            "init": math.sqrt(gram[0, 0]),
            "task_vectors": [math.sqrt(value) for value in deltas.diagonal()],
        },
        "coefficients": unit.coefficients[-1][1:size].tolist(),
        "pairs": [
            {
                "policies": [i + 1, j + 1],
                "task_vectors": pair_statistics(deltas[np.ix_([i, j], [i, j])]),
                "weights": pair_statistics(full[np.ix_([i, j], [i, j])]),
            }
            for i, j in combinations(range(num_policies), 2)
        ],
        "outputs": [
            {"eta": eta, "realised_eta": real, "changed_share": int(changed) / unit.num_elements}
            for eta, real, changed in zip(etas, realised, unit.changed, strict=True)
        ],
    }


def pair_statistics(gram: np.ndarray) -> dict[str, float | None]:
    """Angle in degrees, cosine and norm ratio |b| / |a|; None where a vector is zero."""
    omega = angle(gram)
    if omega is None:
        return {"angle": None, "cosine": None, "norm_ratio": None}
    ratio = math.sqrt(gram[1, 1] / gram[0, 0])
    return {"angle": math.degrees(omega), "cosine": math.cos(omega), "norm_ratio": ratio}


def merge_statistics(result: MergeResult) -> dict[str, Any]:
    """The whole report as plain values: per unit, over the whole model, and warnings."""
    options, units = result.plan.options, result.units
    etas = {name: unit_etas(result.plan, name) for name in units}
    rows = {name: unit_statistics(unit, etas[name], options) for name, unit in units.items()}
    for name, row in rows.items():
        row["depth"] = depth_of(name)
    whole = _whole_model(list(units.values()))
    model = unit_statistics(whole, options.etas, options)
    realised = {name: unit.realised_etas(_towards(options)) for name, unit in units.items()}
    for k, output in enumerate(model["outputs"]):
        output["mean_eta"] = _mean(units, {name: found[k] for name, found in etas.items()})
        output["realised_eta"] = _mean(units, {name: found[k] for name, found in realised.items()})
    model["order_spread"] = _spread_of_model(rows, units)
    model.pop("coefficients")  # each unit has its own
    return {"units": rows, "model": model, "warnings": _warnings(rows, model, result)}


def _whole_model(units: list[UnitResult]) -> UnitResult:
    return UnitResult(
        exact_sum([unit.gram for unit in units]),
        units[0].coefficients,
        np.sum([unit.projections for unit in units], axis=0),
        np.sum([unit.changed for unit in units], axis=0),
        sum(unit.num_elements for unit in units),
    )


def _mean(units: dict[str, UnitResult], values: Mapping[str, float | None]) -> float | None:
    """The units' mean, weighted by their task vectors' squares; None where these are all zero."""
    terms, total = [], 0.0
    for name, unit in units.items():
        square, value = unit.task_vector_square(), values[name]
        if square > 0.0 and value is not None:  # without a task vector there is no realised eta
            terms.append(value * square)
            total += square
    return math.fsum(terms) / total if total > 0.0 else None


def _spread_of_model(rows: dict[str, dict], units: dict[str, UnitResult]) -> float | None:
    """Root of the mean square over units, weighted like `_mean`."""
    spreads = {name: row["order_spread"] for name, row in rows.items()}
    known = {name: spread for name, spread in spreads.items() if spread is not None}
    if not known:
        return None
    squares = {name: spread**2 for name, spread in known.items()}
    mean = _mean({name: units[name] for name in known}, squares)
    return None if mean is None else math.sqrt(mean)


def _towards(options: MergeOptions) -> int:
    """Index of the LITI anchor among the inputs."""
    return 0 if options.liti_towards is None else 1 + len(options.policies)


def _warnings(rows: dict[str, dict], model: dict, result: MergeResult) -> list[str]:
    options, warnings = result.plan.options, list(result.plan.notes)
    for output in model["outputs"]:
        eta, realised = output["mean_eta"], output["realised_eta"]
        if eta and realised is not None and abs(realised / eta - 1.0) > REALISED_TOLERANCE:
            remedy = "--dtype float32"
            if options.rounding == "nearest":
                remedy += " or --rounding stochastic"
            warnings.append(
                f"eta {eta:g} is realised as {realised:.3g}: rounding to the output dtype swallows "
                f"or inflates small updates; use {remedy}"
            )
    for name, row in rows.items():
        for pair in row["pairs"]:
            degrees = pair["task_vectors"]["angle"]
            if degrees is not None and degrees > WIDE_DEGREES:
                warnings.append(
                    f"{name}: policies {pair['policies'][0]} and {pair['policies'][1]} are "
                    f"{degrees:.0f} degrees apart; SLERP's coefficients exceed 1"
                )
    zero = [name for name, row in rows.items() if 0.0 in row["norms"]["task_vectors"]]
    if zero and options.method != "lerp":  # an average minds no direction
        warnings.append(f"no change in some policy, merged with LERP: {', '.join(zero)}")
    return warnings
