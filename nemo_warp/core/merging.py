"""SLERP, LERP and LITI as linear coefficients of a layer's Gram matrix (WARP, sections 3.2-3.3).

Every merge in the paper is a linear combination of the layer's weights,

    theta_merged = a_0 * theta_init + sum_m a_m * theta_m  (+ a_anchor * theta_anchor),

whose coefficients depend on the weights only through inner products of task vectors
delta_m = theta_m - theta_init. So a merger needs one pass: accumulate the Gram matrix
G_ij = <delta_i, delta_j> over the WHOLE layer (all tensors, all shards), derive the coefficients
here, apply them element by element. Everything is float64 and numpy; nothing is in place.
"""

from __future__ import annotations

import math

import numpy as np

PARALLEL_RADIANS = 1e-6
"""Below this angle SLERP equals LERP to better than float64 resolves the angle itself."""

OPPOSITE_DEGREES = 175.0
"""Above this angle the great circle is ill defined and coefficients exceed 11."""


class OppositeTaskVectorsError(ValueError):
    """Two task vectors point in (nearly) opposite directions: SLERP has no preferred direction."""


def angle(gram: np.ndarray) -> float | None:
    """Angle in radians between two vectors from their [2, 2] Gram matrix; None if one is zero."""
    norm_product = math.sqrt(gram[0, 0]) * math.sqrt(gram[1, 1])
    if norm_product == 0.0:
        return None
    return math.acos(max(-1.0, min(1.0, gram[0, 1] / norm_product)))


def slerp_coefficients(gram: np.ndarray, weight: float) -> tuple[float, float]:
    """(w_a, w_b) with slerp(a, b; weight) = w_a * a + w_b * b  (eq. SLERP, B.1 eq. 5).

    w_a = sin((1 - weight) * Omega) / sin(Omega), w_b = sin(weight * Omega) / sin(Omega).
    A zero vector has no direction and nearly parallel vectors have no angle worth using: both
    give LERP's (1 - weight, weight), the latter being the limit.

    Args:
        gram: [2, 2] float64, [[<a,a>, <a,b>], [<a,b>, <b,b>]] over the whole layer.
        weight: lambda, the weight of b; 0 returns a.

    Raises:
        OppositeTaskVectorsError: the angle is above 175 degrees.
    """
    omega = angle(gram)
    if omega is None or omega < PARALLEL_RADIANS:
        return 1.0 - weight, weight
    if math.degrees(omega) > OPPOSITE_DEGREES:
        raise OppositeTaskVectorsError(
            f"the angle is {math.degrees(omega):.1f} degrees, above {OPPOSITE_DEGREES:g}: "
            "SLERP of opposite task vectors is undefined; leave one policy out or use lerp"
        )
    return math.sin((1.0 - weight) * omega) / math.sin(omega), math.sin(weight * omega) / math.sin(
        omega
    )


def slerpm_coefficients(gram: np.ndarray, weight: float | None = None) -> np.ndarray:
    """Coefficients c [M] with slerpm({delta_m}) = sum_m c_m * delta_m  (B.3, eq. 26).

    slerpm of the first m vectors is slerp(slerpm of the first m - 1, delta_m, lambda = 1/m), in
    the order given: the recursion is not associative. Each step needs only inner products of
    combinations of the delta_m, so the Gram matrix is enough for any M.

    Args:
        gram: [M, M] float64 Gram matrix of the task vectors.
        weight: lambda for M = 2; None means uniform (1/m at step m).

    Raises:
        ValueError: ``weight`` is given for M other than 2.
        OppositeTaskVectorsError: see `slerp_coefficients`.
    """
    _check_weight(len(gram), weight)
    merged = np.zeros(len(gram))
    merged[0] = 1.0
    for m in range(1, len(gram)):
        pair = np.stack([merged, np.eye(len(gram))[m]])
        step = 1.0 / (m + 1) if weight is None else weight
        keep, add = slerp_coefficients(pair @ gram @ pair.T, step)
        merged = keep * pair[0] + add * pair[1]
    return merged


def lerp_coefficients(num_policies: int, weight: float | None = None) -> np.ndarray:
    """Coefficients [M] of the average, or (1 - weight, weight) for two policies (eq. LERP)."""
    _check_weight(num_policies, weight)
    if weight is None:
        return np.full(num_policies, 1.0 / num_policies)
    return np.array([1.0 - weight, weight])


def full_weight_gram(gram: np.ndarray) -> np.ndarray:
    """[M, M] inner products <theta_i, theta_j> from the [1 + M, 1 + M] Gram of (init, deltas)."""
    to_init = gram[0, 1:]
    return gram[1:, 1:] + gram[0, 0] + to_init[:, None] + to_init[None, :]


def merge_coefficients(method: str, gram: np.ndarray, weight: float | None = None) -> np.ndarray:
    """Coefficients [1 + M] over (theta_init, theta_1 .. theta_M) of the merged weights, eta = 1.

    Args:
        method: ``slerp`` (of task vectors), ``lerp``, or ``slerp-full`` (of full weights).
        gram: [1 + M, 1 + M] float64 Gram matrix of (theta_init, delta_1 .. delta_M).
        weight: see `slerpm_coefficients`.

    Raises:
        ValueError: unknown method or a weight that does not apply.
        OppositeTaskVectorsError: see `slerp_coefficients`.
    """
    if method == "slerp":
        policies = slerpm_coefficients(gram[1:, 1:], weight)
    elif method == "lerp":
        policies = lerp_coefficients(len(gram) - 1, weight)
    elif method == "slerp-full":
        policies = slerpm_coefficients(full_weight_gram(gram), weight)
        return np.concatenate([[0.0], policies])
    else:
        raise ValueError(f"unknown merge method {method!r}; choose slerp, lerp or slerp-full")
    return np.concatenate([[1.0 - policies.sum()], policies])


def liti_coefficients(merged: np.ndarray, eta: float, towards: int = 0) -> np.ndarray:
    """Coefficients of (1 - eta) * theta_towards + eta * theta_merged  (eq. LITI).

    Args:
        merged: [N] coefficients of theta_merged over the N inputs.
        eta: 1 returns ``merged``, 0 the anchor; values above 1 extrapolate.
        towards: index of the input to interpolate towards; 0 is theta_init.
    """
    result = eta * merged
    result[towards] += 1.0 - eta
    return result


def _check_weight(num_policies: int, weight: float | None) -> None:
    if weight is not None and num_policies != 2:
        raise ValueError(f"a weight needs exactly two policies, found {num_policies}")
