"""Pairs of texts labelled by a reward, to train a reward model on.

``python -m nemo_warp.rewards.pairs --help``
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nemo_warp.records import write_text_atomically
from nemo_warp.rewards.callables import load_callable, score_samples
from nemo_warp.rewards.serve import exit_code_of

EPILOG = """
Writes NeMo-Aligner's format: JSON lines {"text": ...}; of each two lines, the first is the text
with the higher score. Each text is used at most once.

example:
  python -m nemo_warp.rewards.pairs --callable nemo_warp.rewards.library:vader_compound \\
      --texts verses.txt --output pairs.jsonl --min-gap 0.2
"""


def labelled_pairs(
    texts: Sequence[str], scores: np.ndarray, min_gap: float, seed: int
) -> list[tuple[str, str]]:
    """(chosen, rejected) texts whose scores differ by at least ``min_gap``, in a random order.

    Args:
        texts: N texts.
        scores: float [N]; a text of score NaN is left out.
        min_gap: smallest difference that counts; smaller ones are mostly noise.
        seed: decides who meets whom.
    """
    order = [place for place in range(len(texts)) if np.isfinite(scores[place])]
    random.Random(seed).shuffle(order)
    pairs = []
    # Neighbours of a shuffled list: disjoint pairs in one pass.
    for first, second in zip(order[::2], order[1::2], strict=False):
        # The least float32 above 0: equal scores are no pair, also with a gap of 0.
        if abs(scores[first] - scores[second]) >= max(min_gap, np.finfo(np.float32).tiny):
            better, worse = sorted((first, second), key=lambda place: -scores[place])
            pairs.append((texts[better], texts[worse]))
    return pairs


def run(arguments: argparse.Namespace) -> None:
    """Score the texts, pair them and write the pairs."""
    if not arguments.texts.is_file():
        raise ValueError(f"no text file {arguments.texts}; give one text a line")
    lines = arguments.texts.read_text(encoding="utf-8").splitlines()
    texts = [" ".join(line.split()[: arguments.max_words]) for line in lines if line.strip()]
    score = load_callable(arguments.callable, {})
    scores, _ = score_samples(score, [""] * len(texts), tqdm(texts, "scoring", disable=None))
    pairs = labelled_pairs(texts, scores, arguments.min_gap, arguments.seed)
    if not pairs:
        raise ValueError(
            f"no two of the {len(texts)} texts in {arguments.texts} differ by {arguments.min_gap}"
        )
    written = (json.dumps({"text": text}, ensure_ascii=False) for pair in pairs for text in pair)
    write_text_atomically(arguments.output, "".join(f"{line}\n" for line in written))
    print(f"{arguments.output}: {len(pairs)} pairs of {len(texts)} texts")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns an exit code of `nemo_warp.exit_codes`."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_warp.rewards.pairs",
        description="Label pairs of texts with a reward, to train a reward model on.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--callable", required=True, metavar="MODULE:FUNCTION")
    parser.add_argument("--texts", required=True, type=Path, help="one text a line")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--max-words", type=int, help="score and keep only the first words")
    parser.add_argument("--min-gap", type=float, default=0.2, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    return exit_code_of(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
