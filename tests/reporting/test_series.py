"""Reading measurements that a killed process may have left unfinished."""

import pytest

from nemo_warp.records import RecordError
from nemo_warp.reporting.series import read_metrics, read_points

EVAL = '{"kind": "eval", "step": %d, "reward": %s, "kl_to_sft": 1.5}\n'


def test_a_line_cut_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = EVAL % (0, "0.25") + EVAL % (20, "0.5")
    for cut in range(len(EVAL % (20, "0.5"))):
        path.write_text(whole[: len(whole) - cut])
        rewards = [record["reward"] for record in read_metrics(path, "eval")]
        assert rewards == ([0.25, 0.5] if cut == 0 else [0.25])


def test_a_resumed_member_repeats_steps_and_the_last_record_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(EVAL % pair for pair in ((0, 0.1), (20, 0.2), (40, 0.3), (20, 0.25))))
    rewards = [(r["step"], r["reward"]) for r in read_metrics(path, "eval")]
    assert rewards == [(0, 0.1), (20, 0.25), (40, 0.3)]


def test_kinds_are_kept_apart(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(EVAL % (0, 0.1) + '{"kind": "train", "step": 1, "reward": null}\n')
    assert [record["step"] for record in read_metrics(path, "train")] == [1]
    assert [record["step"] for record in read_metrics(path, "eval")] == [0]


def test_the_better_estimate_of_a_divergence_is_read(tmp_path):
    path = tmp_path / "points.jsonl"
    both = '"kl_to_sft": 2.5, "kl_to_sft_stderr": 0.3, "kl_to_sft_exact": 2.25, '
    line = '{"eta": 1, "reward": 0, %s "kl_to_sft_exact_stderr": 0.125, "kl_to_anchor": 1.5}\n'
    path.write_text(line % both)
    (point,) = read_points(path)
    assert (point["kl_to_sft"], point["kl_to_sft_stderr"]) == (2.25, 0.125)
    assert point["kl_to_anchor"] == 1.5


def test_points_are_ordered_and_the_last_of_a_repeated_point_counts(tmp_path):
    path = tmp_path / "points.jsonl"
    line = '{"base": "%s", "eta": %s, "reward": %s, "kl_to_sft": 2}\n'
    written = [("sft", 1, 0.9), ("init", 1, 0.8), ("init", 0.3, 0.4), ("init", 1, 0.7)]
    path.write_text("".join(line % point for point in written))
    found = [(p["base"], p["eta"], p["reward"]) for p in read_points(path)]
    assert found == [("init", 0.3, 0.4), ("init", 1, 0.7), ("sft", 1, 0.9)]


def test_what_nobody_could_measure_is_left_out(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text(EVAL % (0, 0.1) + EVAL.strip() % (10, "null") + "\n" + EVAL % (20, 0.1))
    assert [r["step"] for r in read_metrics(path, "eval")] == [0, 20]
    assert f"warning: {path}, line 2: reward is null; left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "eval", "step": 2', r"metrics.jsonl, line 2 is not JSON .*remove the line"),
        ("[1, 2]", r"line 2 holds list, expected an object"),
        (
            '{"kind": "eval", "step": 2, "kl_to_sft": 1}',
            r"line 2: 'reward' is None, expected",
        ),
        (EVAL.strip() % (2, "NaN"), r"line 2: 'reward' is nan, which no measurement gives"),
        (EVAL.strip() % (2, "true"), r"line 2: 'reward' is True, expected a number"),
        (
            '{"kind": "eval", "step": 2, "reward": 1, "kl_to_sft": 1, "reward_stderr": -1}',
            r"line 2: 'reward_stderr' is -1, which no measurement gives",
        ),
    ],
)
def test_nonsense_is_refused_with_its_line(tmp_path, line, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text(EVAL % (0, 0.1) + line + "\n" + EVAL % (20, 0.1))
    with pytest.raises(RecordError, match=message):
        read_metrics(path, "eval")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecordError, match=r"cannot read .*points.jsonl: No such file"):
        read_points(tmp_path / "points.jsonl")
