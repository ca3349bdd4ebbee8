"""The machinery of the other tests: forked ranks, gloo, NeMo models and their checkpoints."""

import os
import time

import pytest
import tiny_models
import torch
from ranks import RankError, run_ranks

pytestmark = pytest.mark.nemo


def _sum_of_ranks():
    torch.distributed.init_process_group("gloo")
    total = torch.tensor(float(os.environ["RANK"]) + 1)
    torch.distributed.all_reduce(total)
    return total.item(), torch.distributed.get_rank()


def test_ranks_communicate_and_return_in_order(nemo):
    assert run_ranks(_sum_of_ranks, 3) == [(6.0, 0), (6.0, 1), (6.0, 2)]


def _gradient():
    weight = torch.full((64, 64), 2.0, requires_grad=True)
    (weight @ weight).sum().backward()
    return weight.grad.unique().tolist()


def test_ranks_differentiate_after_the_parent_did(nemo):
    """The forks of a process that has used autograd and matrix products must not hang in them."""
    assert _gradient() == [256.0]
    assert run_ranks(_gradient, 2, timeout=60) == [[256.0], [256.0]]


def _fail_on_rank_one():
    if os.environ["RANK"] == "1":
        raise ValueError("only rank one")
    time.sleep(60)


def test_failing_rank_ends_the_others_with_its_traceback(nemo):
    begin = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1 failed.*ValueError: only rank one"):
        run_ranks(_fail_on_rank_one, 2)
    assert time.monotonic() - begin < 20


def test_timeout_ends_all(nemo):
    with pytest.raises(RankError, match=r"ranks \[0, 1\] not done after 1 s"):
        run_ranks(time.sleep, 2, 60, timeout=1)


def _save(path, tokenizer, tensor, pipeline):
    tiny_models.save_tiny_nemo(path, tokenizer, tensor=tensor, pipeline=pipeline)


def _loss_and_gradient(path, tensor, pipeline):
    """Loss and gradient norm of a fixed batch, from a model restored at the given layout."""
    model = tiny_models.load_tiny_nemo(path, tensor, pipeline)
    from megatron.core import parallel_state
    from nemo.collections.nlp.modules.common.megatron.clip_grads import clip_grad_norm_fp32

    tokens = torch.randint(0, 100, (4, 65), generator=torch.Generator().manual_seed(0))
    micro_batches = [
        {
            "tokens": part[:, :-1].clone(),
            "labels": part[:, 1:].clone(),
            "loss_mask": torch.ones(2, 64),
            "attention_mask": None,
            "position_ids": torch.arange(64).expand(2, -1),
        }
        for part in tokens.split(2)
    ]
    loss = model.fwd_bwd_step(iter(micro_batches), forward_only=False)
    norm = clip_grad_norm_fp32(list(model.parameters()), 1e9)
    return parallel_state.is_pipeline_last_stage(), float(loss), float(norm)


def test_nemo_model_at_tp2_pp2_equals_tp1(nemo, tmp_path):
    tokenizer = tiny_models.write_tokenizer(tmp_path)
    path = tmp_path / "tiny.nemo"
    run_ranks(_save, 4, path, tokenizer, 2, 2)
    [(_, loss, norm)] = run_ranks(_loss_and_gradient, 1, path, 1, 1)
    for last, loss_there, norm_there in run_ranks(_loss_and_gradient, 4, path, 2, 2):
        assert norm_there == pytest.approx(norm, rel=1e-5)
        if last:
            assert loss_there == pytest.approx(loss, rel=1e-6)
    assert loss == pytest.approx(4.85, abs=0.2)  # about log(128): nothing has been learned
