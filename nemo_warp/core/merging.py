"""SLERP, LERP and LITI as linear coefficients of a layer's Gram matrix (WARP, sections 3.2-3.3).

Every merge in the paper is a linear combination of the layer's weights,

    theta_merged = a_0 * theta_init + sum_m a_m * theta_m  (+ a_anchor * theta_anchor),

whose coefficients depend on the weights only through inner products of task vectors
delta_m = theta_m - theta_init. So a merger needs one pass: accumulate the Gram matrix
G_ij = <delta_i, delta_j> over the WHOLE layer (all tensors, all shards), derive the coefficients
here, apply them element by element. Everything is float64 and numpy; nothing is in place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

PARALLEL_RADIANS = 1e-6
"""Below this angle SLERP equals LERP to better than float64 resolves the angle itself."""

OPPOSITE_DEGREES = 175.0
"""Above this angle the great circle is ill defined and coefficients exceed 11."""


KARCHER_RADIANS = 1e-14
"""The iteration for a mean direction ends when its step is smaller."""

MAX_KARCHER_STEPS = 1000

MAX_PERMUTED = 5
"""Up to so many vectors all orders are tried (120); beyond, 2 M of them."""


class OppositeTaskVectorsError(ValueError):
    """Two task vectors point in (nearly) opposite directions: SLERP has no preferred direction."""


def angle(gram: np.ndarray) -> float | None:
    """Angle in radians between two vectors from their [2, 2] Gram matrix; None if one is zero."""
    # Roots first: the product of two squared norms would underflow for task vectors that are tiny
    # but not zero, and such a pair would be taken for one without directions.
    norm_product = math.sqrt(gram[0, 0]) * math.sqrt(gram[1, 1])
    if norm_product == 0.0:
        return None
    # Rounding can put the cosine of parallel vectors at 1 + 2e-16, of which acos makes a
    # ValueError. float64 matters here: near 1 an error e in the cosine is one of sqrt(2e) in the
    # angle, 3e-4 rad for float32 and 1e-8 rad for float64.
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


Weight = float | Sequence[float] | np.ndarray | None
"""Lambda of the second of two policies, or a share per policy (ratios count), or uniform."""


def slerpm_coefficients(gram: np.ndarray, weight: Weight = None) -> np.ndarray:
    """Coefficients c [M] with slerpm({delta_m}) = sum_m c_m * delta_m  (B.3, eq. 26).

    slerpm of the first m vectors is slerp(slerpm of the first m - 1, delta_m, lambda = 1/m), in
    the order given: the recursion is not associative. Each step needs only inner products of
    combinations of the delta_m, so the Gram matrix is enough for any M.

    Args:
        gram: [M, M] float64 Gram matrix of the task vectors.
        weight: see `Weight`; uniform is lambda = 1/m at step m, shares w_m / (w_1 + ... + w_m).

    Raises:
        ValueError: ``weight`` does not fit M.
        OppositeTaskVectorsError: see `slerp_coefficients`.
    """
    shares = None if weight is None else policy_shares(len(gram), weight)
    # The order matters: on synthetic task vectors with correlation 0.36 results of two orders
    # differ by up to 4 % for M = 3 and 7 % for M = 5. So it is the caller's, and is recorded by the
    # merger.
    merged = np.zeros(len(gram))
    merged[0] = 1.0
    for m in range(1, len(gram)):
        pair = np.stack([merged, np.eye(len(gram))[m]])
        step = 1.0 / (m + 1)
        # All shares so far may be 0, which would be 0/0; any step will do then, since the first
        # policy with a share comes in with lambda = 1 and removes what was merged before it.
        if shares is not None and shares[: m + 1].sum() > 0.0:
            step = shares[m] / shares[: m + 1].sum()
        # Rows of `pair` are coefficient vectors, so this is the Gram matrix of (merged so far,
        # next).
        keep, add = slerp_coefficients(pair @ gram @ pair.T, step)
        merged = keep * pair[0] + add * pair[1]
    return merged


def order_spread(gram: np.ndarray, weight: Weight = None) -> float | None:
    """How much slerpm depends on the order of more than two vectors.

    All orders are tried for up to `MAX_PERMUTED` vectors, else the rotations of the given order and
    of its reverse.

    Args:
        gram: [M, M] float64 Gram matrix of the task vectors.
        weight: see `Weight`; a share stays with its vector.

    Returns:
        The largest distance of a result from the mean of all results, as a share of the mean's
        norm. None for two vectors, and where an order has no result or the mean is zero.
    """
    count = len(gram)
    if count < 3:
        return None
    shares = policy_shares(count, weight)
    found = []
    try:
        for order in _orders(count):
            coefficients = np.empty(count)
            coefficients[order] = slerpm_coefficients(gram[np.ix_(order, order)], shares[order])
            found.append(coefficients)
    except OppositeTaskVectorsError:
        return None
    mean = np.mean(found, axis=0)
    apart = np.array(found) - mean
    squares = np.einsum("ki,ij,kj->k", apart, gram, apart)
    norm = mean @ gram @ mean
    return math.sqrt(max(0.0, squares.max()) / norm) if norm > 0.0 else None


def _orders(count: int) -> list[list[int]]:
    if count <= MAX_PERMUTED:
        return [list(order) for order in itertools.permutations(range(count))]
    forward = [[(first + i) % count for i in range(count)] for first in range(count)]
    return forward + [order[::-1] for order in forward]


def karcher_coefficients(gram: np.ndarray, weight: Weight = None) -> np.ndarray:
    """Coefficients c [M] of the Karcher mean of the task vectors' directions: no order matters.

    The mean m on the unit sphere has sum_i w_i log_m(u_i) = 0; m = sum_i c_i u_i is found by
    following that sum (Karcher, 1977), all within the span, so that the Gram matrix is enough. The
    c_i are applied to the task vectors themselves, as SLERP's are: for M = 2 the two are equal. A
    zero vector keeps its share and has no direction, as there.

    Args:
        gram: [M, M] float64 Gram matrix of the task vectors.
        weight: see `Weight`.

    Raises:
        ValueError: ``weight`` does not fit M, or the directions have no mean (they surround it).
        OppositeTaskVectorsError: two are more than 175 degrees apart.
    """
    shares = policy_shares(len(gram), weight)
    norms = np.sqrt(np.diag(gram))
    # Policies without a direction or without a share pull nowhere; they must not be divided by 0.
    (found,) = np.nonzero(norms * shares)
    if len(found) < 2:
        return shares
    # Cosines: the Gram matrix of the unit vectors.
    unit = gram[np.ix_(found, found)] / np.outer(norms[found], norms[found])
    if math.degrees(math.acos(max(-1.0, unit.min()))) > OPPOSITE_DEGREES:
        raise OppositeTaskVectorsError(
            f"two task vectors are more than {OPPOSITE_DEGREES:g} degrees apart: their mean "
            "direction is undefined; leave one policy out or use lerp"
        )
    total = shares[found].sum()
    result = shares.copy()
    result[found] = total * _mean_direction(unit, shares[found] / total)
    return result


def _mean_direction(unit: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """[M] coefficients of the unit vector whose logarithms add up to nothing."""
    mean = shares / math.sqrt(shares @ unit @ shares)
    for _ in range(MAX_KARCHER_STEPS):
        cosines = np.clip(unit @ mean, -1.0, 1.0)
        angles = np.arccos(cosines)
        # angle/sin(angle) tends to 1; at 0 it would be 0/0.
        far = angles > PARALLEL_RADIANS
        pull = shares * np.divide(angles, np.sin(angles), out=np.ones_like(angles), where=far)
        step = pull - (pull @ cosines) * mean
        # At the solution the squared length is a rounding error, which may be negative.
        length = math.sqrt(max(0.0, step @ unit @ step))
        if length < KARCHER_RADIANS:
            return mean
        mean = math.cos(length) * mean + math.sin(length) / length * step
        # Keep it on the sphere: the errors of up to a thousand steps would add up.
        mean /= math.sqrt(mean @ unit @ mean)
    raise ValueError("the task vectors' directions surround their mean; use slerp or lerp")


def policy_shares(num_policies: int, weight: Weight = None) -> np.ndarray:
    """[M] shares of the policies, which add up to 1.

    Raises:
        ValueError: a number for other than two policies, another count, or a negative share.
    """
    if weight is None:
        return np.full(num_policies, 1.0 / num_policies)
    if isinstance(weight, int | float):
        if num_policies != 2:
            raise ValueError(f"a weight needs exactly two policies, found {num_policies}")
        return np.array([1.0 - weight, weight])
    shares = np.array(weight, dtype=np.float64)
    if len(shares) != num_policies or (shares < 0.0).any() or not 0.0 < shares.sum() < math.inf:
        raise ValueError(f"{num_policies} policies need as many weights >= 0, found {list(weight)}")
    return shares / shares.sum()


def lerp_coefficients(num_policies: int, weight: Weight = None) -> np.ndarray:
    """Coefficients [M] of the average, weighted or not (eq. LERP)."""
    return policy_shares(num_policies, weight)


def full_weight_gram(gram: np.ndarray) -> np.ndarray:
    """[M, M] inner products <theta_i, theta_j> from the [1 + M, 1 + M] Gram of (init, deltas)."""
    to_init = gram[0, 1:]
    return gram[1:, 1:] + gram[0, 0] + to_init[:, None] + to_init[None, :]


def merge_coefficients(method: str, gram: np.ndarray, weight: Weight = None) -> np.ndarray:
    """Coefficients [1 + M] over (theta_init, theta_1 .. theta_M) of the merged weights, eta = 1.

    Args:
        method: ``slerp`` or ``karcher`` (of task vectors), ``lerp``, or ``slerp-full`` (of full
            weights).
        gram: [1 + M, 1 + M] float64 Gram matrix of (theta_init, delta_1 .. delta_M).
        weight: see `slerpm_coefficients`.

    Raises:
        ValueError: unknown method or a weight that does not apply.
        OppositeTaskVectorsError: see `slerp_coefficients`.
    """
    if method == "slerp":
        policies = slerpm_coefficients(gram[1:, 1:], weight)
    elif method == "karcher":
        policies = karcher_coefficients(gram[1:, 1:], weight)
    elif method == "lerp":
        policies = lerp_coefficients(len(gram) - 1, weight)
    elif method == "slerp-full":
        policies = slerpm_coefficients(full_weight_gram(gram), weight)
        # Full weights are combined, not task vectors: theta_init enters only through the policies,
        # and the coefficients need not add up to 1.
        return np.concatenate([[0.0], policies])
    else:
        raise ValueError(
            f"unknown merge method {method!r}; choose slerp, karcher, lerp or slerp-full"
        )
    return np.concatenate([[1.0 - policies.sum()], policies])


def liti_coefficients(merged: np.ndarray, eta: float, towards: int = 0) -> np.ndarray:
    """Coefficients of (1 - eta) * theta_towards + eta * theta_merged  (eq. LITI).

    Args:
        merged: [N] coefficients of theta_merged over the N inputs.
        eta: 1 returns ``merged``, 0 the anchor; values above 1 extrapolate.
        towards: index of the input to interpolate towards; 0 is theta_init.
    """
    # Makes a new array: the caller uses `merged` again for the next eta.
    result = eta * merged
    result[towards] += 1.0 - eta
    return result
