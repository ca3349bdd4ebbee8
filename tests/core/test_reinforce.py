"""Golden values worked out by hand, and upstream's functions failing the same checks."""

import math

import pytest
import torch

from nemo_warp.core.reinforce import (
    Advantages,
    compute_advantages,
    importance,
    response_mask,
    sequence_kl,
    token_weights,
    top_k_kl,
)

LOG_PROBS = torch.tensor([[-1.0, -2.0, -0.5, -9.0]])
ANCHOR = torch.tensor([[-1.5, -1.0, -0.75, -1.0]])
MASK = torch.tensor([[1.0, 1.0, 1.0, 0.0]])


def test_kl_is_the_signed_sum_over_the_response():
    """(-1 + 1.5) + (-2 + 1) + (-0.5 + 0.75) = -0.25; the fourth token is padding."""
    assert sequence_kl(LOG_PROBS, ANCHOR, MASK, "log_ratio", "sum").item() == -0.25


@pytest.mark.nemo
def test_kl_of_upstream_is_another_number(nemo):
    from nemo_aligner.utils.ppo_utils import calculate_kl_penalty
    from nemo_aligner.utils.utils import masked_mean

    upstream = masked_mean(calculate_kl_penalty(LOG_PROBS, ANCHOR), MASK, dim=-1)
    assert upstream.item() == pytest.approx((0.5 + 1 + 0.25) / 3)
    ours = sequence_kl(LOG_PROBS, ANCHOR, MASK, "absolute", "mean")
    assert ours.item() == pytest.approx(upstream.item())


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("absolute", 0.5 + 1 + 0.25),
        ("squared", (0.25 + 1 + 0.0625) / 2),
        ("exponential", sum(math.exp(-d) - 1 + d for d in (0.5, -1.0, 0.25))),
    ],
)
def test_other_estimators(estimator, expected):
    found = sequence_kl(LOG_PROBS, ANCHOR, MASK, estimator, "sum").item()
    assert found == pytest.approx(expected, rel=1e-6)


def test_kl_ignores_infinities_outside_the_response():
    log_probs = LOG_PROBS.clone()
    log_probs[0, 3] = -math.inf
    assert sequence_kl(log_probs, ANCHOR, MASK, "log_ratio", "sum").item() == -0.25


def test_mask_covers_the_response_and_its_end():
    """Prompt of 3, 2 response tokens: tokens 3 and 4 are predicted at positions 2 and 3."""
    mask = response_mask(torch.tensor([3]), torch.tensor([5]), 5)
    assert mask.tolist() == [[0, 0, 1, 1, 0]]


GROUPS = torch.tensor([0, 0, 0, 1, 1])
ALL = torch.ones(5, dtype=torch.bool)


def test_leave_one_out():
    rewards = torch.tensor([1.0, 2.0, 6.0, 3.0, 5.0])
    found = compute_advantages(rewards, GROUPS, ALL, "leave_one_out")
    assert found.values.tolist() == [1 - 4, 2 - 3.5, 6 - 1.5, -2, 2]
    assert found.used.all()


def test_excluded_samples_leave_baseline_and_gradient():
    """Without the third sample the first two are each other's baseline, whatever its reward."""
    rewards = torch.tensor([1.0, 2.0, math.nan, 3.0, 5.0])
    valid = torch.tensor([True, True, False, True, True])
    found = compute_advantages(rewards, GROUPS, valid, "leave_one_out")
    assert found.values.tolist() == [-1, 1, 0, -2, 2]
    assert found.used.tolist() == [True, True, False, True, True]


def test_lone_sample_has_no_baseline_and_no_gradient():
    valid = torch.tensor([True, False, False, True, True])
    found = compute_advantages(torch.ones(5), GROUPS, valid, "leave_one_out")
    assert not found.used[0]
    assert found.values[0] == 0


def test_one_sample_per_prompt_needs_the_batch_mean():
    """Traps 2 and 3: among equal prompts only, k = 1 gives a zero gradient, silently."""
    rewards, groups = torch.tensor([1.0, 2.0, 6.0]), torch.arange(3)
    valid = torch.ones(3, dtype=torch.bool)
    alone = compute_advantages(rewards, groups, valid, "leave_one_out")
    assert not alone.used.any()
    found = compute_advantages(rewards, groups, valid, "batch_mean")
    assert found.values.tolist() == [1 - 4, 2 - 3.5, 6 - 1.5]


@pytest.mark.nemo
def test_upstream_baseline_is_the_reward_itself_for_one_sample_per_prompt(nemo):
    from nemo_aligner.utils.ppo_utils import calculate_rloo_baseline

    rewards = torch.tensor([1.0, 2.0, 6.0])
    baseline = calculate_rloo_baseline(torch.arange(3)[:, None], rewards, torch.ones(3))
    assert torch.equal(baseline, rewards)


@pytest.mark.nemo
def test_upstream_baseline_of_an_excluded_sample_divides_by_one_less(nemo):
    """Of [1, 2 | 6 excluded] it gives the excluded one (1 + 2) / 1 = 3; the mean is 1.5."""
    from nemo_aligner.utils.ppo_utils import calculate_rloo_baseline

    rewards, mask = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 1.0, 0.0])
    baseline = calculate_rloo_baseline(torch.zeros(3, 1), rewards, mask)
    assert baseline.tolist() == [2, 1, 3]
    ours = compute_advantages(rewards, torch.zeros(3).long(), mask.bool(), "leave_one_out")
    assert (rewards - ours.values)[:2].tolist() == [2, 1]
    assert not ours.used[2]


WEIGHT_MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
ADVANTAGES = Advantages(torch.tensor([3.0, -6.0, 0.0]), torch.tensor([True, True, False]))


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("sequence_sum", [[1, 1, 1], [-2, 0, 0], [0, 0, 0]]),
        ("sequence_mean", [[1 / 3] * 3, [-2, 0, 0], [0, 0, 0]]),
        ("token_mean", [[3 / 4] * 3, [-6 / 4, 0, 0], [0, 0, 0]]),
    ],
)
def test_token_weights(reduction, expected):
    found = token_weights(ADVANTAGES, WEIGHT_MASK, reduction)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("baseline", ["leave_one_out", "batch_mean"])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_sample_that_is_not_finite_touches_no_other(baseline, bad):
    """The others' advantages are those of a batch in which it failed; its own is 0 and not used."""
    rewards = torch.tensor([bad, 1.0, 0.5, 0.25])
    groups, valid = torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.bool)
    failed = torch.tensor([False, True, True, True])
    found = compute_advantages(rewards, groups, valid, baseline)
    expected = compute_advantages(rewards, groups, failed, baseline)
    assert torch.equal(found.values, expected.values) and found.values.isfinite().all()
    assert torch.equal(found.used, expected.used) and not found.used[0]


def _laws(seed, vocabulary=4):
    """Logits of two-token sequences: a law of the first token, one of the second after each."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1 + vocabulary, vocabulary, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("k", [0, 1, 3, 4])
def test_top_k_kl_has_the_gradient_of_the_kl_for_any_k(k):
    """All 16 sequences, each with its probability: reward, penalty and the loss of its own."""
    logits, anchor = _laws(0).requires_grad_(), _laws(1).log_softmax(-1)
    tokens = torch.cartesian_prod(torch.arange(4), torch.arange(4))  # [16, 2]
    contexts = torch.stack([torch.zeros(16, dtype=torch.int64), 1 + tokens[:, 0]], 1)
    reward, beta = torch.randn(16, generator=torch.Generator().manual_seed(2)).double(), 0.7

    law = logits.log_softmax(-1)
    chosen = law[contexts, tokens]
    probability = chosen.sum(1).exp()
    ratio = (chosen - anchor[contexts, tokens]).sum(1)
    expected = torch.autograd.grad((probability * (reward - beta * ratio)).sum(), logits)[0]

    law = logits.log_softmax(-1)
    chosen, top_tokens = law[contexts, tokens], law[contexts].topk(k).indices
    top, top_anchor = (p[contexts].gather(-1, top_tokens) for p in (law, anchor))
    with torch.no_grad():
        kl = top_k_kl(chosen, anchor[contexts, tokens], tokens, top_tokens, top, top_anchor).sum(1)
    direct = (top.exp() * (top - top_anchor).detach()).sum((1, 2))
    surrogate = chosen.sum(1) * (reward - beta * kl) - beta * direct
    found = torch.autograd.grad((probability.detach() * surrogate).sum(), logits)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    mean = (probability * kl).sum()
    torch.testing.assert_close(mean, (probability * ratio).sum(), rtol=1e-5, atol=1e-6)
    spread = (probability * (kl - mean) ** 2).sum()
    sampled = (probability * (ratio - mean) ** 2).sum()
    assert spread < 0.5 * sampled if k >= 3 else spread <= sampled * 1.01


def test_importance_of_a_response_is_its_ratio_cut_at_the_limit() -> None:
    """By hand: tokens of ratio 2 and 3/4, 1/2 and 1, 2 and 4; untrained positions do not count."""
    sampled = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    ratios = torch.tensor([[2.0, 0.75, 9.0], [0.5, 1.0, 9.0], [2.0, 4.0, 9.0]])
    trained = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    log_probs = sampled + ratios.log()
    log_probs[0, 2] = -torch.inf
    weights, sums = importance(log_probs, sampled, trained, 2.0)
    torch.testing.assert_close(weights, torch.tensor([1.5, 0.5, 2.0]))
    assert {name: round(value.item(), 5) for name, value in sums.items()} == {
        "importance_mean": 10.0, "importance_cut": 1.0, "responses": 3.0,
    }  # fmt: skip
    none, sums = importance(log_probs, sampled, torch.zeros(3, 3), 2.0)
    assert none.tolist() == [1.0, 1.0, 1.0] and sums["responses"] == 0
