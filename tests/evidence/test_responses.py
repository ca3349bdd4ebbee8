"""Responses on disk and what is computed from their texts."""

import math

import numpy as np
import pytest

from nemo_warp.evidence.responses import common_prompts, read_responses, write_responses
from nemo_warp.evidence.texts import distinct, self_bleu, similarity
from nemo_warp.records import RecordError


def _record(index, generation, **more):
    return {
        "prompt": f"prompt {index}",
        "prompt_index": index,
        "generation": generation,
        "response": f"a\u2028text {index} {generation}",
        "reward": index + generation / 10,
        "tokens": 3,
        **more,
    }


def test_written_and_read(tmp_path):
    records = [_record(i, g, judges={"tone": 0.5}, ended=True) for i in (1, 0) for g in (1, 0)]
    records[0] |= {"reward": None, "scores": {"vader": None}}
    path = tmp_path / "r.jsonl.gz"
    write_responses(path, records)
    first = path.read_bytes()
    write_responses(path, records)
    assert path.read_bytes() == first, "the same records give the same bytes"
    found = read_responses(path)
    assert found.prompts == ["prompt 0", "prompt 1"]
    assert found.texts[1] == ["a\u2028text 1 0", "a\u2028text 1 1"]
    np.testing.assert_equal(found.number("reward"), [[0, 0.1], [1, np.nan]])
    np.testing.assert_equal(found.number("judge:tone"), 0.5 * np.ones((2, 2)))
    assert np.isnan(found.number("score:vader")).all()
    assert found.number("characters")[0, 0] == len("a\u2028text 0 0")
    with pytest.raises(ValueError, match="no 'judge:x'; it has characters, ended, judge:tone"):
        found.number("judge:x")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"prompt": "a"}\n', "line 1 has no 'prompt_index'"),
        ("[1]\n", "holds list"),
        ("{\n", "cannot read responses"),
        ("", "holds 0 responses"),
    ],
)
def test_what_is_no_file_of_responses(tmp_path, lines, message):
    path = tmp_path / "r.jsonl"
    path.write_text(lines)
    with pytest.raises(RecordError, match=message):
        read_responses(path)
    with pytest.raises(RecordError, match="evaluate with responses kept"):
        read_responses(tmp_path / "missing")


def test_missing_generation_and_cut_file(tmp_path):
    path = tmp_path / "r.jsonl.gz"
    write_responses(path, [_record(0, 0), _record(0, 1), _record(1, 0)])
    with pytest.raises(RecordError, match="3 responses, expected 2 for each of 2 prompts"):
        read_responses(path)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(RecordError, match="cannot read responses"):
        read_responses(path)


def test_prompts_are_paired_by_text(tmp_path):
    write_responses(tmp_path / "a", [_record(0, 0), _record(1, 0), _record(2, 0)])
    write_responses(tmp_path / "b", [_record(2, 0), _record(0, 0)])
    a, b = (read_responses(tmp_path / name) for name in "ab")
    ours, theirs = common_prompts(a, b)
    assert (
        [a.prompts[i] for i in ours] == [b.prompts[i] for i in theirs] == ["prompt 0", "prompt 2"]
    )
    write_responses(tmp_path / "c", [_record(7, 0)])
    with pytest.raises(ValueError, match="no prompt in common"):
        common_prompts(a, read_responses(tmp_path / "c"))
    write_responses(tmp_path / "d", [_record(0, 0), {**_record(1, 0), "prompt": "prompt 0"}])
    with pytest.raises(ValueError, match="a prompt twice"):
        common_prompts(a, read_responses(tmp_path / "d"))


def test_diversity_by_hand():
    assert distinct(["a b a", "a b"], 1) == pytest.approx(2 / 5)
    assert distinct(["a b a", "a b"], 2) == pytest.approx(2 / 3)
    assert math.isnan(distinct(["a"], 2))
    same = ["the heart of the king is glad"]
    assert similarity(same, same)[0] == pytest.approx(100)
    assert similarity(same, ["nothing whatever shared here now"])[0] < 10
    assert self_bleu([same, same]) == pytest.approx(100)
    with pytest.raises(ValueError, match="at least two"):
        self_bleu([same])
