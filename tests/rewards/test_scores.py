"""Scores, mixtures of them and the failure budget: no server needed."""

from dataclasses import replace

import numpy as np
import pytest

from nemo_warp.rewards import RewardFailureRateError
from nemo_warp.rewards.callables import fingerprint, load_callable, score_together
from nemo_warp.rewards.mixture import RewardMixture
from nemo_warp.rewards.scale import Scale, optimised
from nemo_warp.rewards.scores import FailureBudget, RewardScores, weighted_sum
from nemo_warp.rewards.settings import client_settings


def test_nothing_that_is_not_finite_is_a_score():
    scores = RewardScores.of(np.array([1.5, np.nan, np.inf, 2.0]), ["", "", "", "too long"])
    assert scores.failed.tolist() == [False, True, True, True]
    assert scores.scores[0] == 1.5 and np.isnan(scores.scores[1:]).all()
    assert scores.reasons == [
        "",
        "the reward server returned nan",
        "the reward server returned inf",
        "too long",
    ]
    assert scores.failure_rate == 0.75


def test_a_mixture_fails_where_a_part_that_counts_fails():
    parts = {
        "a": RewardScores.of(np.array([1.0, 2.0, np.nan]), ["", "", "broke"]),
        "b": RewardScores.of(np.array([10.0, np.nan, np.nan]), ["", "late", "late"]),
        "gold": RewardScores.of(np.array([np.nan, 7.0, 7.0]), ["off", "", ""]),
    }
    total = weighted_sum(parts, {"a": 2.0, "b": -0.5, "gold": 0.0})
    assert total.scores[0] == 2 * 1.0 - 0.5 * 10.0
    assert total.failed.tolist() == [False, True, True]
    assert total.reasons == ["", "b: late", "a: broke; b: late"]
    np.testing.assert_array_equal(total.parts["gold"], [np.nan, 7.0, 7.0])


def test_a_scale_is_shift_factor_bounds_then_the_batch():
    scores = np.array([0.0, 1.0, 2.0, np.nan, 9.0])
    scale = Scale(shift=-1.0, scale=2.0, clip=(-1.0, 4.0))
    np.testing.assert_array_equal(scale.of_each(scores), [-1.0, 0.0, 2.0, np.nan, 4.0])
    # Mean 1.25; squares of the differences 5.0625 + 1.5625 + 0.5625 + 7.5625 = 14.75, over n - 1.
    centred = np.array([-2.25, -1.25, 0.75, np.nan, 2.75])
    np.testing.assert_allclose(
        replace(scale, standardize="mean").over_batch(scores), centred, rtol=1e-12
    )
    np.testing.assert_allclose(
        replace(scale, standardize="deviation").over_batch(scores),
        centred / (14.75 / 3) ** 0.5,
        rtol=1e-12,
    )
    divided = Scale(standardize="deviation")
    for equal in ([0.1] * 7, [5.0], [5.0, np.nan]):
        found = divided.over_batch(np.array(equal))
        np.testing.assert_array_equal(found, np.where(np.isnan(equal), np.nan, 0.0))
    assert np.isnan(divided.over_batch(np.array([np.nan] * 2))).all()


def test_a_mixture_is_of_scaled_scores_and_its_parts_are_as_given():
    parts = {
        "a": RewardScores.of(np.array([1.0, 3.0, np.nan]), ["", "", "broke"]),
        "b": RewardScores.of(np.array([10.0, 20.0, 30.0]), ["", "", ""]),
    }
    scales = {"a": Scale(shift=1.0), "b": Scale(scale=0.1, clip=(0.0, 1.5), standardize="mean")}
    total = weighted_sum(parts, {"a": 2.0, "b": 1.0}, scales)
    np.testing.assert_allclose(total.scores, [4 + 1, 8 + 1.5, np.nan])
    assert total.reasons[2] == "a: broke"
    np.testing.assert_array_equal(total.parts["b"], [10.0, 20.0, 30.0])
    columns = np.stack([parts["a"].scores, parts["b"].scores, [9.0, 9.0, 9.0]], axis=1)
    trained = optimised(columns, list(scales.values()), [2.0, 1.0])
    # b is 1, 1.5, 1.5: its mean is taken over all three, though the third sample fails.
    np.testing.assert_allclose(trained, [4 - 1 / 3, 8 + 1 / 6, np.nan])


def test_joined_batches_keep_their_order():
    first, second = RewardScores.of(np.array([1.0]), [""]), RewardScores.all_failed(1, "gone")
    joined = RewardScores.joined([first, second])
    assert joined.failed.tolist() == [False, True] and joined.reasons == ["", "gone"]
    assert len(RewardScores.joined([]).scores) == 0


def test_the_budget_forgives_a_few_and_forgets_old_ones():
    budget = FailureBudget(max_failure_rate=0.25, window=8)
    for _ in range(5):  # 2 failures in any 8 samples: exactly the limit
        budget.record(np.array([True, False, False, False]), ["down", "", "", ""])
    with pytest.raises(RewardFailureRateError, match=r"3 of the last 8 .* 25% of 8 .*: down\)"):
        budget.record([True, True], ["down", "down"])


def test_a_dead_server_exceeds_the_budget_in_its_first_batch():
    with pytest.raises(RewardFailureRateError):
        FailureBudget(0.1, 512).record([True] * 52, ["dead"] * 52)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"name": "a"}, "'rewards.0' .* lacks 'endpoint'"),
        ({"name": "a b", "endpoint": "e"}, "of letters, digits"),
        ({"name": "a", "endpoint": "e", "weight": float("nan")}, "rewards.0.weight"),
        ({"name": "a", "endpoint": "e", "weight": "heavy"}, "rewards.0.weight"),
        ({"name": "a", "endpoint": "e", "wieght": 1}, "unknown key 'rewards.0.wieght'"),
        ({"name": "a", "endpoint": "e", "clip": [2, 1]}, r"rewards.0.clip is \[2, 1\]"),
    ],
)
def test_malformed_rewards_are_refused(reward, message):
    with pytest.raises(ValueError, match=message):
        RewardMixture.from_config([reward], {})


def test_rewards_need_distinct_names_and_at_least_one():
    same = [{"name": "a", "endpoint": "e"}] * 2
    with pytest.raises(ValueError, match="used twice"):
        RewardMixture.from_config(same, {})
    with pytest.raises(ValueError, match="empty"):
        RewardMixture.from_config([], {})


@pytest.mark.parametrize(
    "section",
    [
        {"retries": -1},
        {"retries": "many"},
        {"batch_size": 0},
        {"max_failure_rate": 1.5},
        {"retry": 3},
    ],
)
def test_malformed_client_settings_are_refused(section):
    with pytest.raises(ValueError, match=next(iter(section))):
        client_settings(section)


def test_a_batch_that_raises_is_scored_one_by_one():
    score = load_callable("strange_rewards:strange_batch", {})
    scores, reasons = score_together(score, ["p"] * 3, ["abc", "raise", "nan"])
    assert scores[0] == 31 and np.isnan(scores[1:]).all()
    assert reasons == ["", "RuntimeError: asked to raise", "the reward returned nan"]


def test_a_batch_with_the_wrong_number_of_scores_is_no_score():
    score = load_callable("strange_rewards:wrong_count", {})
    scores, reasons = score_together(score, ["p", "p"], ["a", "b"])
    assert scores.tolist() == [1.0, 1.0] and reasons == ["", ""]  # right one by one


def test_the_fingerprint_follows_source_options_and_versions(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "my_reward.py"
    module.write_text("def f(prompt, response, scale=1.0):\n    return scale\n")
    first = fingerprint("my_reward:f", {})
    assert fingerprint("my_reward:f", {}) == first
    assert fingerprint("my_reward:f", {"scale": 2.0}) != first
    module.write_text("def f(prompt, response, scale=2.0):\n    return scale\n")
    assert fingerprint("my_reward:f", {}) != first
    vader = fingerprint("nemo_warp.rewards.library:vader_compound", {})
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9.9")
    assert fingerprint("nemo_warp.rewards.library:vader_compound", {}) != vader


@pytest.mark.parametrize(
    ("callable_", "options", "message"),
    [
        ("strange_rewards", {}, "module:function"),
        ("no_such_module_here:f", {}, "cannot import"),
        ("strange_rewards:no_such", {}, "has no 'no_such'"),
        ("strange_rewards:strange", {"color": "red"}, "color"),
    ],
)
def test_a_callable_that_cannot_be_called_is_refused(callable_, options, message):
    with pytest.raises(ValueError, match=message):
        load_callable(callable_, options)
