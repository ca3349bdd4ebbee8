"""Same rollouts, any layout: same advantages, gradients, weights and anchor."""

import member_lab as lab
import numpy as np
import pytest
import torch
from member_lab import LAYOUTS, Layout
from ranks import run_ranks

pytestmark = pytest.mark.nemo

STEPS = 3
RATE = 0.3


def train_on_given_rollouts(materials, directory, layout, rate=RATE, anchor="ema", steps=STEPS):
    """Weights before and after each step, the anchor, and the batches, of one rank."""
    config = lab.member_config(
        materials,
        directory,
        layout,
        algorithm={"anchor": anchor, "ema_update_rate": rate, "kl_coefficient": 0.1},
    )
    trainer = lab.build_trainer(config)
    history = [lab.local_tensors(trainer.model)]
    batches, kls, losses = [], [], []
    for step in range(steps):
        batch = trainer.objective.batch(lab.given_rollouts(step))
        loss, _ = trainer.run_training(trainer.optimizer_batches(batch.data))
        history.append(lab.local_tensors(trainer.model))
        batches.append(batch.data["weights"])
        kls.append(batch.metrics["kl_to_anchor"])
        losses.append(loss)
    with trainer.objective.reference.in_place():
        anchor_tensors = lab.local_tensors(trainer.model)
    return {
        "history": history,
        "anchor": anchor_tensors,
        "batches": batches,
        "kls": kls,
        "losses": losses,
        "nbytes": trainer.objective.reference.nbytes,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }


@pytest.fixture(scope="module")
def runs(materials, tmp_path_factory):
    """Every layout once; the tests below look at different sides of the same runs."""
    directory = tmp_path_factory.mktemp("layouts")
    return {
        layout: run_ranks(train_on_given_rollouts, layout.ranks, materials, directory, layout)
        for layout in [Layout(), *LAYOUTS]
    }


def weights_after(run, step):
    return lab.assemble([rank["history"][step] for rank in run])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_same_updated_weights(runs, layout):
    expected, found = weights_after(runs[Layout()], STEPS), weights_after(runs[layout], STEPS)
    start = weights_after(runs[Layout()], 0)
    assert found.keys() == expected.keys()
    for key in expected:
        update = expected[key] - start[key]
        assert np.linalg.norm(update) > 0, key
        assert lab.relative_error(found[key] - start[key], update) < 2e-3, key
        assert lab.relative_error(found[key], expected[key]) < 1e-5, key


@pytest.mark.parametrize("layout", [Layout(1, 1, 2), Layout(1, 1, 4)], ids=str)
def test_advantages_do_not_depend_on_data_parallelism(runs, layout):
    first = runs[Layout()][0]["batches"][0]
    for rank in runs[layout]:
        assert torch.equal(rank["batches"][0], first)


@pytest.mark.parametrize("layout", [Layout(), *LAYOUTS], ids=str)
def test_anchor_follows_the_float64_recurrence(runs, layout):
    anchor = {k: v.astype(np.float64) for k, v in weights_after(runs[layout], 0).items()}
    for step in range(1, STEPS + 1):
        policy = weights_after(runs[layout], step)
        for key in anchor:
            anchor[key] = (1 - RATE) * anchor[key] + RATE * policy[key].astype(np.float64)
    found = lab.assemble([rank["anchor"] for rank in runs[layout]])
    for key in anchor:
        assert lab.relative_error(found[key], anchor[key]) <= 1e-6, key


@pytest.mark.parametrize("layout", [Layout(), *LAYOUTS], ids=str)
def test_anchor_costs_four_bytes_per_parameter_over_data_parallel_size(runs, layout):
    for rank in runs[layout]:
        assert rank["nbytes"] == 4 * -(-rank["parameters"] // layout.data)


def test_kl_to_the_anchor_is_zero_at_step_zero_and_moves_after(runs):
    for run in runs.values():
        assert run[0]["kls"][0] == 0.0
        assert run[0]["kls"][1] != 0.0


def test_rate_zero_is_the_static_anchor_bit_for_bit(materials, tmp_path):
    layout = Layout(1, 1, 2)
    moving = run_ranks(train_on_given_rollouts, 2, materials, tmp_path, layout, 0.0)
    static = run_ranks(train_on_given_rollouts, 2, materials, tmp_path, layout, 0.0, "sft")
    for one, other in zip(moving, static, strict=True):
        assert one["kls"] == other["kls"]
        for left, right in zip(one["history"][-1], other["history"][-1], strict=True):
            assert np.array_equal(left[3], right[3]), left[0]
        for left, right in zip(one["anchor"], one["history"][0], strict=True):
            assert np.array_equal(left[3], right[3]), left[0]


def test_rate_one_is_the_policy_itself(materials, tmp_path):
    run = run_ranks(train_on_given_rollouts, 1, materials, tmp_path, Layout(), 1.0)[0]
    assert run["kls"] == [0.0] * STEPS
    for left, right in zip(run["anchor"], run["history"][-1], strict=True):
        assert np.array_equal(left[3], right[3]), left[0]


def gradients_by_micro_batch(materials, directory):
    """Gradients at micro batch 1, 2, 4, and those of the loss written out in plain torch."""
    config = lab.member_config(materials, directory)
    trainer = lab.build_trainer(config)
    model = trainer.model
    batch = trainer.objective.batch(lab.given_rollouts(0)).data
    found = {}
    for size in (1, 2, 4):
        model.cfg.micro_batch_size = size
        model.prepare_for_training()
        trainer.updater.optimizer.zero_grad()
        model.prepare_for_training_step()
        model.get_loss_and_metrics(trainer.optimizer_batches(batch)[0], forward_only=False)
        model.finish_training_step()
        found[size] = {name: p.grad.clone().numpy() for name, p in model.model.named_parameters()}
    trainer.updater.optimizer.zero_grad()
    tokens = batch["response_tokens"]
    mask, _, positions = model.get_ltor_masks_and_position_ids(tokens)
    logits = model.model(tokens, positions, mask, labels=None)[:, :-1]
    tempered = logits.double() / config.algorithm.log_prob_temperature
    log_probs = tempered.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    (-(batch["weights"] * log_probs).sum()).backward()
    found["torch"] = {name: p.grad.clone().numpy() for name, p in model.model.named_parameters()}
    return found


def test_gradient_does_not_depend_on_the_micro_batch(materials, tmp_path):
    found = run_ranks(gradients_by_micro_batch, 1, materials, tmp_path)[0]
    for size in (1, 2, 4):
        for name, expected in found["torch"].items():
            assert lab.relative_error(found[size][name], expected) < 1e-5, (size, name)
