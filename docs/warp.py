"""WARP on one page: the whole method in plain torch, on a toy policy. `python docs/warp.py`, 10 s.

Weight Averaged Rewarded Policies (arXiv 2406.16768), Algorithm 1. Read from top to bottom; nothing
is imported from the library, and `tests/core/test_specification.py` holds the library's mathematics
against the functions below. The paper's symbols: theta (weights), delta (task vector), mu, lambda,
eta, kappa, beta, M, T, I.

The toy: a "text" is 12 tokens out of 24. The policy sees the token before and the prompt, which is
one token. The SFT policy has learnt a random Markov chain; the reward is a fixed random score of
each pair of neighbouring tokens, averaged over the response. It is enough to see every step of the
method at work: the SLERP of two members scores higher than either, and LITI slides between little
reward at little KL and much at much. That this front lies above the members' own trajectories needs
a harder task: see `recipes/tiny`.
"""

import math

import torch
from torch import Tensor

VOCABULARY, LENGTH, WIDTH = 24, 12, 32
BETA, MU, ETA = 0.05, 0.02, 0.3  # paper: 0.1, 0.01, 0.3, with 90 times the steps
MEMBERS, STEPS, ITERATIONS, BATCH = 2, 100, 2, 32  # M, T, I

Weights = dict[str, dict[str, Tensor]]
"""Layer -> name -> tensor. A layer's tensors share one angle in SLERP (section 3.2)."""


def new_weights(random: torch.Generator) -> Weights:
    """Two embeddings, one hidden layer, one output layer."""

    def normal(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=random)

    return {
        "embedding": {"token": normal(VOCABULARY, WIDTH), "prompt": normal(VOCABULARY, WIDTH)},
        "hidden": {"weight": normal(WIDTH, WIDTH), "bias": torch.zeros(WIDTH)},
        "output": {"weight": normal(WIDTH, VOCABULARY)},
    }


def logits(theta: Weights, prompts: Tensor, before: Tensor) -> Tensor:
    """Scores of the next token [..., V] after the token ``before``, for each prompt."""
    x = theta["embedding"]["token"][before] + theta["embedding"]["prompt"][prompts]
    x = x + torch.tanh(x @ theta["hidden"]["weight"] + theta["hidden"]["bias"])
    return x @ theta["output"]["weight"]


def log_prob(theta: Weights, prompts: Tensor, responses: Tensor) -> Tensor:
    """Sum of log pi(y_t | x, y_<t) over the response: [B]."""
    before = torch.cat([prompts[:, None], responses[:, :-1]], 1)
    scores = logits(theta, prompts[:, None].expand_as(before), before)
    return scores.log_softmax(-1).gather(-1, responses[..., None]).squeeze(-1).sum(-1)


@torch.no_grad()
def sample(theta: Weights, prompts: Tensor, random: torch.Generator) -> Tensor:
    """Responses from pi(.|x): [B, LENGTH]."""
    tokens, before = [], prompts
    for _ in range(LENGTH):
        before = logits(theta, prompts, before).softmax(-1).multinomial(1, generator=random)[:, 0]
        tokens.append(before)
    return torch.stack(tokens, 1)


def advantages(rewards: Tensor) -> Tensor:
    """Reward minus the mean of the OTHER samples: a baseline that leaves REINFORCE unbiased."""
    return rewards - (rewards.sum() - rewards) / (len(rewards) - 1)


def parameters(theta: Weights) -> list[Tensor]:
    """All tensors, in a fixed order."""
    return [tensor for layer in theta.values() for tensor in layer.values()]


def combine(*terms: tuple[float, Weights]) -> Weights:
    """sum_k a_k * theta_k, tensor by tensor: every merge below is one of these."""
    first = terms[0][1]
    return {
        layer: {name: sum(a * theta[layer][name] for a, theta in terms) for name in tensors}
        for layer, tensors in first.items()
    }


def as_weights(like: Weights, flat: list[Tensor]) -> Weights:
    """The tensors of ``flat`` in the places of ``like``."""
    rest = iter(flat)
    return {layer: {name: next(rest) for name in tensors} for layer, tensors in like.items()}


def trainable(theta: Weights) -> Weights:
    """A copy to train."""
    return as_weights(theta, [t.detach().clone().requires_grad_() for t in parameters(theta)])


def train_member(init: Weights, score: Tensor, seed: int) -> Weights:
    """Lines 4 to 10: T steps of REINFORCE, held by the KL to the member's own moving average."""
    random = torch.Generator().manual_seed(seed)
    theta = trainable(init)
    ema = [tensor.detach().clone() for tensor in parameters(theta)]
    optimizer = torch.optim.Adam(parameters(theta), lr=1e-3)
    for _ in range(STEPS):
        prompts = torch.randint(VOCABULARY, (BATCH,), generator=random)
        responses = sample(theta, prompts, random)
        log_pi = log_prob(theta, prompts, responses)
        with torch.no_grad():
            anchor = as_weights(theta, ema)
            log_ratio = log_pi - log_prob(anchor, prompts, responses)  # signed, summed: line 7
            regularised = reward(score, prompts, responses) - BETA * log_ratio
        loss = -(advantages(regularised) * log_pi).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():  # (EMA): once per optimizer step
            ema = [(1 - MU) * a + MU * p for a, p in zip(ema, parameters(theta), strict=True)]
    return as_weights(theta, [tensor.detach() for tensor in parameters(theta)])


def slerp(init: Weights, one: Weights, two: Weights, weight: float) -> Weights:
    """(SLERP), layer by layer, on task vectors delta = theta - init; ``weight`` is lambda."""
    merged = {}
    for layer in init:
        d1, d2 = (
            torch.cat([(t[layer][n] - init[layer][n]).flatten().double() for n in init[layer]])
            for t in (one, two)
        )
        cosine = (d1 @ d2 / (d1.norm() * d2.norm())).clamp(-1, 1)
        omega = math.acos(cosine)
        a, b = (math.sin(x * omega) / math.sin(omega) for x in (1 - weight, weight))
        parts = [({layer: t[layer]}) for t in (init, one, two)]
        merged |= combine((1 - a - b, parts[0]), (a, parts[1]), (b, parts[2]))
    return merged


def slerpm(init: Weights, policies: list[Weights]) -> Weights:
    """M policies, one after the other: the m-th enters with lambda = 1/m (appendix B.3)."""
    merged = policies[0]
    for m, policy in enumerate(policies[1:], start=2):
        merged = slerp(init, merged, policy, 1 / m)
    return merged


def liti(towards: Weights, theta: Weights, eta: float) -> Weights:
    """(LITI): (1 - eta) * towards + eta * theta."""
    return combine((1 - eta, towards), (eta, theta))


def reward(score: Tensor, prompts: Tensor, responses: Tensor) -> Tensor:
    """Mean score of neighbouring tokens: [B]."""
    before = torch.cat([prompts[:, None], responses[:, :-1]], 1)
    return score[before, responses].mean(-1)


def measure(theta: Weights, sft: Weights, score: Tensor) -> tuple[float, float]:
    """(reward, KL to SFT in nats per response), on the same random numbers for every policy."""
    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(VOCABULARY, (4096,), generator=random)
    responses = sample(theta, prompts, random)
    log_ratio = log_prob(theta, prompts, responses) - log_prob(sft, prompts, responses)
    return reward(score, prompts, responses).mean().item(), log_ratio.mean().item()


def train_sft(random: torch.Generator) -> Weights:
    """Next-token prediction on a random Markov chain: what the SFT model is to WARP."""
    chain = (2.0 * torch.randn(VOCABULARY, VOCABULARY, generator=random)).softmax(-1)
    theta = trainable(new_weights(random))
    optimizer = torch.optim.Adam(parameters(theta), lr=1e-2)
    for _ in range(300):
        prompts = torch.randint(VOCABULARY, (BATCH,), generator=random)
        tokens = [prompts]
        for _ in range(LENGTH):
            tokens.append(chain[tokens[-1]].multinomial(1, generator=random)[:, 0])
        loss = -log_prob(theta, prompts, torch.stack(tokens[1:], 1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return as_weights(theta, [tensor.detach() for tensor in parameters(theta)])


def main() -> dict[str, tuple[float, float]]:
    """Algorithm 1 and its front; prints and returns name -> (reward, KL)."""
    random = torch.Generator().manual_seed(1)
    sft = train_sft(random)
    score = torch.randn(VOCABULARY, VOCABULARY, generator=random)
    policies = {"SFT": sft}
    init = sft
    for i in range(1, ITERATIONS + 1):
        members = [train_member(init, score, seed=10 * i + m) for m in range(MEMBERS)]
        merged = slerpm(init, members)
        policies |= {f"iteration {i}, member {m + 1}": p for m, p in enumerate(members)}
        policies[f"iteration {i}, SLERP"] = merged
        init = liti(init, merged, ETA)
        policies[f"iteration {i}, LITI (the next init)"] = init
    for kappa in (0.1, 0.3, 0.5, 0.8):
        policies[f"front, kappa {kappa}"] = liti(sft, merged, kappa)
    measured = {name: measure(theta, sft, score) for name, theta in policies.items()}
    for name, (mean, kl) in measured.items():
        print(f"{name:36} reward {mean:6.3f}   KL to SFT {kl:6.2f} nats")
    return measured


if __name__ == "__main__":
    main()
