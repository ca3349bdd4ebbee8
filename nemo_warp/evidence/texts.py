"""How much the responses of a policy differ from each other (the paper's appendix F)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words over all n-grams of all texts (Li et al. 2016); NaN without any."""
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def similarity(first: Sequence[str], second: Sequence[str]) -> np.ndarray:
    """Sentence BLEU (0 to 100) between two generations of each prompt, both ways averaged: [P].

    The paper uses BLEURT, a learned metric, for its Figure 19; BLEU needs no weights.

    Raises:
        ValueError: the numbers of texts differ.
    """
    # Here and not at the top: it costs half a second, and most comparisons need no BLEU.
    from sacrebleu.metrics import BLEU

    if len(first) != len(second):
        raise ValueError(f"{len(first)} first generations, but {len(second)} second ones")
    # Short responses have no 4-grams: without it their BLEU would be 0.
    bleu = BLEU(effective_order=True)

    def one(text: str, other: str) -> float:
        return bleu.sentence_score(text, [other]).score

    return np.array([(one(a, b) + one(b, a)) / 2 for a, b in zip(first, second, strict=True)])


def self_bleu(generations: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU (0 to 100) of each generation against the prompt's others (Zhu et al. 2018).

    Args:
        generations: G >= 2 lists of P texts; texts at one place answer the same prompt.

    Raises:
        ValueError: fewer than two generations.
    """
    from sacrebleu.metrics import BLEU

    if len(generations) < 2:
        raise ValueError("self-BLEU needs at least two generations of each prompt")
    scores = []
    for g, texts in enumerate(generations):
        others = [list(other) for h, other in enumerate(generations) if h != g]
        scores.append(BLEU().corpus_score(list(texts), others).score)
    return float(np.mean(scores))


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
