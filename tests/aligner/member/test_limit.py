"""Responses end at their own limit, whatever their neighbours' prompts are."""

import pytest
import torch

pytestmark = pytest.mark.nemo

EOS = 2


def test_each_response_is_cut_at_its_own_limit(nemo):
    """Prompts of 2 and 5 tokens, limit 3: NeMo writes up to position 8 for both."""
    from nemo_warp.aligner.sampling.rollouts import within_limit

    tokens = torch.arange(10, 26).reshape(2, 8)
    output = {
        "response_tokens": tokens,
        "prompt_lengths": torch.tensor([2, 5]),
        "response_lengths": torch.tensor([8, 8]),
        "is_end": torch.tensor([True, True]),
    }
    found = within_limit(output, limit=3, eos_id=EOS)
    assert found["response_lengths"].tolist() == [5, 8]
    assert found["is_end"].tolist() == [False, True]
    assert found["response_tokens"].tolist() == [
        [10, 11, 12, 13, 14, EOS, EOS, EOS],
        list(range(18, 26)),
    ]
    assert output["response_tokens"] is tokens and tokens[0, 5] == 15, "not changed"
    short = {**output, "response_lengths": torch.tensor([4, 6])}
    found = within_limit(short, limit=3, eos_id=EOS)
    assert found["response_lengths"].tolist() == [4, 6] and found["is_end"].all()
