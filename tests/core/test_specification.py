"""The library's mathematics, against the paper on one page (`docs/warp.py`)."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_warp.core.merging import liti_coefficients, merge_coefficients
from nemo_warp.core.reinforce import compute_advantages, sequence_kl, token_weights

PAGE = Path(__file__).resolve().parents[2] / "docs" / "warp.py"


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("warp_page", PAGE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _weights(page, seed):
    random = torch.Generator().manual_seed(seed)
    return page.new_weights(random)


def _flat(layer):
    return torch.cat([tensor.flatten() for tensor in layer.values()]).double().numpy()


@pytest.mark.parametrize("members", [1, 2, 3, 4])
def test_merging(page, members):
    """Coefficients from the Gram matrix give what the page computes on whole vectors."""
    init = _weights(page, 0)
    policies = [_weights(page, seed) for seed in range(1, members + 1)]
    merged = page.slerpm(init, policies)
    expected = page.liti(init, merged, 0.3)
    for layer in init:
        theta = [_flat(init[layer])] + [_flat(p[layer]) for p in policies]
        vectors = np.stack([theta[0]] + [t - theta[0] for t in theta[1:]])
        slerp = merge_coefficients("slerp", vectors @ vectors.T)
        np.testing.assert_allclose(slerp @ np.stack(theta), _flat(merged[layer]), atol=2e-6)
        both = liti_coefficients(slerp, 0.3) @ np.stack(theta)
        np.testing.assert_allclose(both, _flat(expected[layer]), atol=2e-6)


def test_gradient_of_a_step(page):
    """One batch: the library's token weights give the gradient of the page's loss."""
    theta, anchor = page.trainable(_weights(page, 1)), _weights(page, 2)
    random = torch.Generator().manual_seed(3)
    prompts = torch.randint(page.VOCABULARY, (8,), generator=random)
    responses = page.sample(theta, prompts, random)
    score = torch.randn(page.VOCABULARY, page.VOCABULARY, generator=random)
    rewards = page.reward(score, prompts, responses)

    log_pi = page.log_prob(theta, prompts, responses)
    log_ratio = (log_pi - page.log_prob(anchor, prompts, responses)).detach()
    loss = -(page.advantages(rewards - page.BETA * log_ratio) * log_pi).mean()
    expected = torch.autograd.grad(loss, page.parameters(theta))

    before = torch.cat([prompts[:, None], responses[:, :-1]], 1)

    def per_token(weights):
        scores = page.logits(weights, prompts[:, None].expand_as(before), before)
        return scores.log_softmax(-1).gather(-1, responses[..., None]).squeeze(-1)

    mask = torch.ones_like(before, dtype=torch.float32)
    ours = per_token(theta)
    kl = sequence_kl(ours.detach(), per_token(anchor), mask, "log_ratio", "sum")
    torch.testing.assert_close(kl, log_ratio, atol=1e-5, rtol=1e-5)
    valid = torch.ones(8, dtype=torch.bool)
    advantages = compute_advantages(
        rewards - page.BETA * kl, torch.arange(8), valid, baseline="batch_mean"
    )
    weights = token_weights(advantages, mask, "sequence_sum")
    gradient = torch.autograd.grad(-(weights * ours).sum(), page.parameters(theta))
    for found, wanted in zip(gradient, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_the_page_runs(page):
    """What the page says of itself: SLERP above its members' mean, LITI between little and much."""
    measured = page.main()
    for iteration in (1, 2):
        members = [measured[f"iteration {iteration}, member {m}"][0] for m in (1, 2)]
        # Above the better one as well with most versions' random numbers, not with torch 2.4's.
        assert measured[f"iteration {iteration}, SLERP"][0] > sum(members) / 2
    front = [measured[f"front, kappa {kappa}"] for kappa in (0.1, 0.3, 0.5, 0.8)]
    assert front == sorted(front) and measured["SFT"][0] < front[0][0]
    assert [kl for _, kl in front] == sorted(kl for _, kl in front)
    assert measured["SFT"][1] == pytest.approx(0, abs=1e-6)
