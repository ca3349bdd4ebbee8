"""Intervals, preferences, best of N and fronts, against closed forms and by simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from nemo_warp.evidence.best_of import best_of, best_of_kl, pass_at
from nemo_warp.evidence.fronts import at_budget, hypervolume, reward_at
from nemo_warp.evidence.intervals import over_prompts, over_seeds, paired_difference
from nemo_warp.evidence.preference import (
    by_scores,
    by_verdicts,
    grades_of,
    length_controlled_rate,
    swap_agreement,
)


@pytest.mark.parametrize("law", ["skewed", "normal"])
def test_coverage_over_prompts(law, monkeypatch):
    """About 95 % of the intervals hold the true mean (true mean 1; 64 prompts, 300 experiments)."""
    monkeypatch.setattr("nemo_warp.evidence.intervals.RESAMPLES", 999)
    random = np.random.default_rng(0)
    draws = (
        random.exponential(size=(300, 64)) if law == "skewed" else random.normal(1, 2, (300, 64))
    )
    held = sum(i.low <= 1 <= i.high for i in map(over_prompts, draws)) / 300
    assert (
        0.90 <= held <= 0.98
    )  # 95 % less what BCa loses at 64 skewed prompts, +- 2 standard errors


def test_pairing_takes_out_what_prompts_share():
    """Two policies that differ by 0.1 on prompts that vary by 5: seen when paired, else not."""
    random = np.random.default_rng(1)
    prompt = random.normal(0, 5, 200)
    first = prompt + 0.1 + random.normal(0, 0.2, 200)
    second = prompt + random.normal(0, 0.2, 200)
    paired = paired_difference(first, second)
    assert paired.low > 0 and paired.high - paired.low < 0.1
    assert paired.mean == pytest.approx((first - second).mean(), rel=1e-12)
    apart = over_prompts(first).high - over_prompts(first).low
    assert apart > 10 * (paired.high - paired.low)


def test_generations_of_a_prompt_are_one_observation():
    """Copies of a response add nothing; a failed score leaves its prompt's others."""
    single = np.random.default_rng(2).normal(size=50)
    assert over_prompts(np.stack([single] * 4, 1)) == over_prompts(single)
    scores = np.array([[1.0, np.nan], [3.0, 5.0], [np.nan, np.nan]])
    found = over_prompts(scores)
    assert (found.mean, found.count) == (2.5, 2)
    with pytest.raises(ValueError, match="no prompt has a score"):
        over_prompts(np.array([np.nan]))
    with pytest.raises(ValueError, match="3 prompts on one side, 2"):
        paired_difference(np.ones(3), np.ones(2))


def test_over_seeds_is_students_t():
    found = over_seeds(np.array([1.0, 2.0, 3.0]))
    half = 4.302652729911275 / math.sqrt(3)  # the table's t for 2 degrees of freedom, times the sem
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), rel=1e-9)
    assert math.isnan(over_seeds(np.array([1.0])).low)


def test_preferences_by_hand():
    """Prompt 1: 2 > 1 and 2 > 0; prompt 2: a tie and a loss; prompt 3: a failed score."""
    first = np.array([[2.0], [1.0], [np.nan]])
    second = np.array([[1.0, 0.0], [1.0, 4.0], [1.0, 1.0]])
    found = by_scores(first, second)
    assert (found.wins, found.ties, found.losses, found.failed) == (2, 1, 1, 2)
    assert found.rate.mean == pytest.approx((1 + 0.25) / 2)
    assert by_scores(first, second, tie_within=3).ties == 4
    reverse = by_scores(second, first)
    assert (reverse.wins, reverse.losses) == (found.losses, found.wins)
    assert reverse.rate.mean == pytest.approx(1 - found.rate.mean)


def test_the_papers_preference_score():
    """Section 4.5: 1.5, 1, 0.5 and 0, averaged over prompts."""
    words = ["A much better", "B slightly better.", "tie", "a  Better", "nonsense", "B tie"]
    grades = grades_of(words)
    np.testing.assert_equal(grades, [1.5, -0.5, 0.0, 1.0, np.nan, np.nan])
    outcome, score = by_verdicts(grades)
    assert score.mean == pytest.approx((1.5 - 0.5 + 0 + 1) / 4)
    assert (outcome.wins, outcome.ties, outcome.losses, outcome.failed) == (2, 1, 1, 2)
    always_first = swap_agreement(np.array([1.0, 1.0]), np.array([-1.0, -1.0]))
    assert always_first == 0.0
    assert swap_agreement(np.array([1.0, -1.5, 0]), np.array([0.5, -1.0, np.nan])) == 1.0


def test_length_control_takes_out_a_judge_that_likes_length():
    """Wins that only follow from length: 70 % raw, 50 % at equal length. Else: what was put in."""
    random = np.random.default_rng(3)
    gaps = random.normal(20, 30, 8000)
    feature = np.tanh(gaps / gaps.std())
    for quality, expected in ((0.0, 0.5), (0.8, 1 / (1 + math.exp(-0.8)))):
        chance = 1 / (1 + np.exp(-(quality + 2.0 * feature)))
        outcomes = (random.random(8000) < chance).astype(float)
        assert length_controlled_rate(outcomes, gaps) == pytest.approx(expected, abs=0.03)
    assert outcomes.mean() > 0.75
    assert length_controlled_rate(np.ones(10), np.zeros(10)) > 0.9  # one side wins always: finite


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_subsets(n):
    scores = np.random.default_rng(4).normal(size=(3, 5))
    expected = [np.mean([max(s) for s in itertools.combinations(row, n)]) for row in scores]
    np.testing.assert_allclose(best_of(scores, n), expected, rtol=1e-12)


def test_pass_at_k_is_the_share_of_subsets():
    correct = np.array([[1, 0, 0, 0, 1, 0], [0] * 6, [1] * 6])
    for k in (1, 2, 5, 6):
        subsets = [list(itertools.combinations(row, k)) for row in correct]
        expected = [np.mean([any(s) for s in row]) for row in subsets]
        np.testing.assert_allclose(pass_at(correct, k), expected, atol=1e-12)
    with pytest.raises(ValueError, match="0 and 1 only"):
        pass_at(np.array([[0.5, 1.0]]), 1)
    with pytest.raises(ValueError, match="6 responses a prompt, but 7"):
        pass_at(correct, 7)
    with pytest.raises(ValueError, match="missing"):
        best_of(np.array([[1.0, np.nan]]), 1)


def test_best_of_kl_of_a_uniform_law():
    """Best of n of a continuous law has density n F^(n-1): its KL is log n - (n-1)/n."""
    for n in (1, 2, 8):
        x = (np.arange(200_000) + 0.5) / 200_000
        density = n * x ** (n - 1)
        assert best_of_kl(n) == pytest.approx(np.mean(density * np.log(density)), abs=1e-4)


def test_hypervolume_by_hand():
    """Steps at KL 2 (reward 1) and 5 (reward 3) up to 10, floor 0: 1 * 3 + 3 * 5."""
    assert hypervolume([5, 2], [3, 1], 10, 0) == pytest.approx(18)
    assert hypervolume([5, 2, 6], [3, 1, 2], 10, 0) == pytest.approx(18)  # a dominated point
    assert hypervolume([5, 2, 20], [3, 1, 9], 10, 0) == pytest.approx(18)  # beyond the limit
    assert hypervolume([5, 2], [3, 1], 10, 1) == pytest.approx(10)
    assert hypervolume([-0.1], [2], 10, 0) == pytest.approx(20)


def test_reward_between_points_is_linear_and_unknown_outside():
    assert reward_at([3, 1], [1, 0], 1.5) == pytest.approx(0.25)
    assert math.isnan(reward_at([3, 1], [1, 0], 0.99))
    assert math.isnan(reward_at([3, 1], [1, 0], 3.01))


def test_budget_is_met_from_below():
    """KL = 20 kappa^2: a budget of 10 nats is at kappa = 0.7071."""
    asked = []

    def measure(kappa):
        asked.append(kappa)
        return 20 * kappa**2

    found = at_budget(measure, [(0, 0), (0.5, 5), (1, 20)], 10, tolerance=0.05)
    assert 9.95 <= found.kl <= 10 and found.kappa == pytest.approx(math.sqrt(0.5), abs=0.003)
    assert len(asked) <= 8
    with pytest.raises(ValueError, match="KL goes from 0 to 20"):
        at_budget(measure, [(0, 0), (1, 20)], 30, 0.05)
    with pytest.raises(ValueError, match="larger tolerance"):
        at_budget(measure, [(0, 0), (1, 20)], 10, 1e-9, max_measurements=3)
    exact = at_budget(measure, [(0, 0), (0.5, 5), (1, 20)], 5, 0.01)
    assert (exact.kappa, len(asked)) == (0.5, len(asked))


def test_bootstrap_agrees_with_the_t_interval_on_normal_prompts():
    values = np.random.default_rng(5).normal(3, 1, 400)
    found = over_prompts(values)
    low, high = stats.t.interval(0.95, 399, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)
