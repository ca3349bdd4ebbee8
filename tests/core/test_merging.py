"""Coefficients from Gram matrices, against vectors and hand-computed values."""

import math

import numpy as np
import pytest

from nemo_warp.core.merging import (
    OppositeTaskVectorsError,
    karcher_coefficients,
    lerp_coefficients,
    liti_coefficients,
    merge_coefficients,
    slerp_coefficients,
    slerpm_coefficients,
)


def gram_of(*vectors):
    stacked = np.array(vectors, dtype=float)
    return stacked @ stacked.T


def test_orthogonal_vectors_by_hand():
    """At 90 degrees and lambda = 1/2, both weights are sin(45) / sin(90)."""
    weights = slerp_coefficients(gram_of([2, 0], [0, 3]), 0.5)
    assert weights == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)), rel=1e-15)


def test_sixty_degrees_by_hand():
    """At 60 degrees and lambda = 1/3: sin(40) / sin(60) and sin(20) / sin(60)."""
    gram = gram_of([1, 0], [math.cos(math.pi / 3), math.sin(math.pi / 3)])
    sines = [math.sin(math.radians(degrees)) for degrees in (40, 20, 60)]
    expected = (sines[0] / sines[2], sines[1] / sines[2])
    assert slerp_coefficients(gram, 1 / 3) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("weight", [0.0, 0.2, 0.5, 1.0])
def test_norm_is_preserved_between_equal_norms(weight):
    """Lemma 1: SLERP of task vectors of equal norm has that norm."""
    a, b = np.array([3.0, 4.0, 0.0]), np.array([0.0, 3.0, 4.0])
    w_a, w_b = slerp_coefficients(gram_of(a, b), weight)
    assert np.linalg.norm(w_a * a + w_b * b) == pytest.approx(5.0, rel=1e-14)


@pytest.mark.parametrize(
    ("a", "b"),
    [([0, 0], [1, 2]), ([1, 2], [0, 0]), ([0, 0], [0, 0]), ([1, 2], [2, 4]), ([1, 0], [1, 1e-8])],
)
def test_zero_and_parallel_vectors_fall_back_to_lerp(a, b):
    assert slerp_coefficients(gram_of(a, b), 0.3) == (0.7, 0.3)


def test_slerp_tends_to_lerp_without_a_jump():
    for exponent in range(2, 8):
        angle = 10.0**-exponent
        gram = gram_of([1, 0], [math.cos(angle), math.sin(angle)])
        assert slerp_coefficients(gram, 0.3) == pytest.approx((0.7, 0.3), rel=angle**2 + 1e-15)


@pytest.mark.parametrize("degrees", [175.1, 179, 180])
def test_opposite_vectors_are_refused(degrees):
    radians = math.radians(degrees)
    with pytest.raises(OppositeTaskVectorsError, match="degrees"):
        slerp_coefficients(gram_of([1, 0], [math.cos(radians), math.sin(radians)]), 0.5)


def test_wide_angles_below_the_limit_pass():
    radians = math.radians(174)
    gram = gram_of([1, 0], [math.cos(radians), math.sin(radians)])
    assert slerp_coefficients(gram, 0.5)[0] == pytest.approx(
        math.sin(radians / 2) / math.sin(radians)
    )


def test_slerpm_is_the_recursion_on_vectors():
    """Equation 26 carried out on the vectors themselves."""
    vectors = np.random.default_rng(0).normal(size=(5, 40))
    merged = vectors[0]
    for m in range(2, 6):
        other = vectors[m - 1]
        cosine = merged @ other / np.linalg.norm(merged) / np.linalg.norm(other)
        omega = np.arccos(cosine)
        keep, add = np.sin((1 - 1 / m) * omega), np.sin(omega / m)
        merged = (keep * merged + add * other) / np.sin(omega)
    found = slerpm_coefficients(vectors @ vectors.T) @ vectors
    np.testing.assert_allclose(found, merged, rtol=1e-13)


def test_one_policy_is_itself():
    assert slerpm_coefficients(np.array([[2.0]])).tolist() == [1.0]


def test_order_matters_and_is_kept():
    vectors = np.random.default_rng(1).normal(size=(3, 20)) + 0.5
    forward = slerpm_coefficients(vectors @ vectors.T)
    backward = slerpm_coefficients(vectors[::-1] @ vectors[::-1].T)[::-1]
    assert not np.allclose(forward, backward, rtol=1e-6)


@pytest.mark.parametrize("method", ["slerp", "lerp", "slerp-full"])
def test_methods_on_vectors(method):
    """Coefficients over (init, policies) against the definition on full vectors."""
    generator = np.random.default_rng(2)
    init = generator.normal(size=30)
    policies = init + 0.1 * generator.normal(size=(2, 30))
    deltas = policies - init
    basis = np.stack([init, *deltas])
    found = merge_coefficients(method, basis @ basis.T) @ np.stack([init, *policies])
    pair = deltas if method == "slerp" else policies
    cosine = pair[0] @ pair[1] / np.linalg.norm(pair[0]) / np.linalg.norm(pair[1])
    half = 0.5 / math.cos(math.acos(cosine) / 2)  # sin(x/2) / sin(x)
    expected = {
        "slerp": init + half * deltas.sum(0),
        "lerp": policies.mean(0),
        "slerp-full": half * policies.sum(0),
    }[method]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_liti():
    merged = np.array([-0.4, 0.7, 0.7])
    assert liti_coefficients(merged, 0.0).tolist() == [1.0, 0.0, 0.0]
    assert liti_coefficients(merged, 1.0).tolist() == merged.tolist()
    np.testing.assert_allclose(liti_coefficients(merged, 2.0), [-1.8, 1.4, 1.4])
    np.testing.assert_allclose(liti_coefficients(merged, 0.5, towards=2), [-0.2, 0.35, 0.85])
    assert merged.tolist() == [-0.4, 0.7, 0.7]


def test_weights_need_two_policies():
    for function in (
        lambda: lerp_coefficients(3, 0.5),
        lambda: slerpm_coefficients(np.eye(3), 0.5),
    ):
        with pytest.raises(ValueError, match="two policies"):
            function()
    with pytest.raises(ValueError, match="unknown merge method"):
        merge_coefficients("ties", np.eye(3))


def test_karcher_of_two_is_slerp_also_with_weights_and_a_zero_vector():
    for a, b in (([2, 0, 1], [0, 3, 1]), ([1, 0, 0], [0.9, 0.1, 0]), ([0, 0, 0], [1, 2, 3])):
        for weight in (None, 0.2, (3, 1)):
            gram = gram_of(a, b)
            assert karcher_coefficients(gram, weight) == pytest.approx(
                slerpm_coefficients(gram, weight), rel=1e-12
            )


def test_karcher_needs_no_order_and_solves_its_equation():
    """At the mean, the weighted logarithms of the directions add up to zero (vectors, no Gram)."""
    vectors = np.random.default_rng(0).normal(size=(4, 50)) + 0.3
    shares = np.array([0.1, 0.2, 0.3, 0.4])
    found = karcher_coefficients(gram_of(*vectors), shares)
    order = [2, 0, 3, 1]
    shuffled = karcher_coefficients(gram_of(*vectors[order]), shares[order])
    assert shuffled == pytest.approx(found[order], rel=1e-12)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    mean = found @ units
    assert np.linalg.norm(mean) == pytest.approx(1.0, rel=1e-12)
    angles = np.arccos(units @ mean)
    logarithms = (angles / np.sin(angles))[:, None] * (units - np.outer(units @ mean, mean))
    assert np.linalg.norm(shares @ logarithms) < 1e-12


def test_karcher_refuses_opposite_directions():
    with pytest.raises(OppositeTaskVectorsError):
        karcher_coefficients(gram_of([1, 0], [-1, 1e-3]))


def test_shares_of_three_policies_are_the_recursion_with_their_ratios():
    gram = gram_of([1, 0, 0], [0, 2, 0], [0, 1, 3])
    even = slerpm_coefficients(gram, (2, 2, 2))
    assert even == pytest.approx(slerpm_coefficients(gram), rel=1e-14)
    assert slerpm_coefficients(gram, (1, 1, 0)) == pytest.approx(
        [*slerpm_coefficients(gram[:2, :2]), 0.0], rel=1e-14
    )
    assert lerp_coefficients(3, (2, 1, 1)) == pytest.approx([0.5, 0.25, 0.25])
    for wrong in ((1, 1), (1, -1, 1), (0, 0, 0)):
        with pytest.raises(ValueError, match="weights"):
            lerp_coefficients(3, wrong)
