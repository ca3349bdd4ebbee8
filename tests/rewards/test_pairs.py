"""Pairs for reward models: how they are labelled, and what is refused before training."""

import json

import numpy as np
import pytest

from nemo_warp import exit_codes
from nemo_warp.rewards import pairs

VADER = ["--callable", "nemo_warp.rewards.library:vader_compound"]


def test_the_higher_score_is_chosen_and_close_calls_are_left_out():
    texts = [f"text {number}" for number in range(100)]
    scores = np.where(np.arange(100) % 2 == 0, 0.05, np.arange(100) / 10)
    scores[:10] = np.nan
    found = pairs.labelled_pairs(texts, scores, min_gap=0.5, seed=3)
    value = dict(zip(texts, scores, strict=True))
    assert len(found) > 20
    assert all(value[chosen] - value[rejected] >= 0.5 for chosen, rejected in found)
    used = [text for pair in found for text in pair]
    assert len(set(used)) == len(used) and not set(used) & set(texts[:10])
    assert found == pairs.labelled_pairs(texts, scores, min_gap=0.5, seed=3)
    assert found != pairs.labelled_pairs(texts, scores, min_gap=0.5, seed=4)


def test_equal_scores_make_no_pair():
    assert pairs.labelled_pairs(["a", "b"], np.array([1.0, 1.0]), min_gap=0.0, seed=0) == []


def test_the_file_is_nemo_aligners(tmp_path):
    texts, output = tmp_path / "texts.txt", tmp_path / "pairs.jsonl"
    texts.write_text("I love it, it is good\n\nI hate it, it is evil\n")
    arguments = ["--texts", str(texts), "--output", str(output), "--max-words", "3"]
    assert pairs.main([*VADER, *arguments]) == exit_codes.DONE
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines == [{"text": "I love it,"}, {"text": "I hate it,"}]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no text file"), ("the\nthe\n", "no two of the 2 texts")]
)
def test_texts_that_make_no_pair_are_refused(tmp_path, capsys, content, message):
    texts = tmp_path / "texts.txt"
    if content is not None:
        texts.write_text(content)
    arguments = ["--texts", str(texts), "--output", str(tmp_path / "pairs.jsonl")]
    assert pairs.main([*VADER, *arguments]) == exit_codes.MISCONFIGURED
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a"}', "{"], "line 2: expected"),
        (['{"text": "a"}', '{"txt": "b"}'], "line 2: expected"),
        (['{"text": ""}'], "line 1: expected"),
        (['{"text": "a"}'] * 3, "has 3 lines"),
        (None, "no pairs file"),
    ],
)
def test_malformed_pairs_are_refused_with_their_line(tmp_path, lines, message):
    from nemo_warp.aligner.train_reward_model import count_pairs

    path = tmp_path / "pairs.jsonl"
    if lines is not None:
        path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        count_pairs(path)
