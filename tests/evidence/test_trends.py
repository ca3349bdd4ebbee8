"""Alarms at their stated thresholds, and where a judge stops following the reward."""

import numpy as np
import pytest

from nemo_warp.evidence.trends import Thresholds, alarms, parting


def _points(**last):
    usual = {"entropy": 2.0, "length": 20.0, "kl_to_sft": 0.0, "num_prompts": 100}
    usual |= {"reward": 0.0, "reward_stderr": 0.05}  # a standard deviation of 0.5
    usual |= {"judges": {"tone": 0.0}, "judges_stderr": {"tone": 0.02}}  # one of 0.2
    middle = usual | {"step": 10, "kl_to_sft": 1.0}
    return [usual | {"step": 0}, middle, usual | {"step": 20, "kl_to_sft": 2.0} | last]


@pytest.mark.parametrize(
    ("last", "name"),
    [
        ({}, None),
        ({"entropy": 1.01}, None),
        ({"entropy": 0.99}, "entropy"),
        ({"length": 29.9}, None),
        ({"length": 30.1}, "length"),
        ({"length": 13.4}, None),
        ({"length": 13.3}, "length"),
        ({"kl_to_sft": 3.9}, None),
        ({"kl_to_sft": 4.1}, "kl"),
        ({"reward": 0.49}, None),
        ({"reward": 0.51}, "judge tone"),
        ({"reward": 0.9, "judges": {"tone": 0.17}}, None),  # 1.8 and 0.85
        ({"reward": 0.9, "judges": {"tone": 0.15}}, "judge tone"),  # 1.8 and 0.75
        ({"reward": 0.9, "judges": {"tone": None}}, None),
    ],
)
def test_alarms_at_their_thresholds(last, name):
    found = alarms(_points(**last), Thresholds())
    assert list(found) == ([name] if name else [])
    assert not alarms(_points(**last), Thresholds(None, None, None, None))
    assert not alarms(_points(**last)[-1:], Thresholds()), "one evaluation is no trend"


def test_the_point_where_a_judge_stops_following():
    """The reward rises all along; the judge rises to the third point and stays there."""
    noise = np.random.default_rng(0).normal(size=(5, 400, 2)) * 0.1
    rewards = [0.1 * i + noise[i] for i in range(5)]
    judged = [0.1 * min(i, 2) + noise[i, :, ::-1] for i in range(5)]
    kls = [0.0, 1.0, 4.0, 9.0, 16.0]
    found = parting(kls, rewards, judged)
    assert found is not None and (found.kl, found.last_kl) == (4.0, 16.0)
    assert found.reward.mean == pytest.approx(0.2, abs=0.02) and abs(found.judge.mean) < 0.02
    assert parting(kls, rewards, rewards) is None, "a judge that follows"
    assert parting(kls, judged[:1] * 5, judged) is None, "a reward that does not rise"
