"""The KL summed over likely tokens as a part of training: against plain autograd, at any layout."""

import member_lab as lab
import pytest
import torch
from member_lab import Layout
from ranks import run_ranks

pytestmark = pytest.mark.nemo


def gradients(materials, directory, layout, estimator):
    """KL of each response and the gradient; on one rank also written out in float64."""
    algorithm = {"ema_update_rate": 0.5, "kl_estimator": estimator, "kl_top_k": 5}
    config = lab.member_config(
        materials, directory, layout, algorithm=algorithm, also=["optim.lr=0.05"]
    )
    trainer = lab.build_trainer(config)
    first = trainer.objective.batch(lab.given_rollouts(0))
    trainer.run_training(trainer.optimizer_batches(first.data))  # policy and anchor differ now
    model, rollouts = trainer.model, lab.given_rollouts(1)
    with model.inference():
        batch = trainer.objective.batch(rollouts)
    model.prepare_for_training()
    trainer.updater.optimizer.zero_grad()
    model.prepare_for_training_step()
    (data,) = trainer.optimizer_batches(batch.data)
    loss, _ = model.get_loss_and_metrics(data, forward_only=False)
    model.finish_training_step()
    found = loss, batch.kl, [p.grad.clone() for p in model.parameters()]
    if layout.ranks > 1:
        return loss, batch.kl, lab.gradient_parts(model), None
    return loss, batch.kl, lab.gradient_parts(model), plain(trainer, batch, rollouts, found[2])


def plain(trainer, batch, rollouts, gradients):
    """Loss and KL from all logits; the largest relative difference of a gradient."""
    model, tokens, mask = trainer.model, rollouts.tokens, rollouts.mask
    trainer.updater.optimizer.zero_grad()
    attention, _, positions = model.get_ltor_masks_and_position_ids(tokens)

    def law():
        logits = model.model(tokens, positions, attention, labels=None)[:, :-1]
        return (logits[..., : model.tokenizer.vocab_size].double() / 0.9).log_softmax(-1)

    with torch.no_grad(), trainer.objective.reference.in_place():
        anchor = law()
    policy = law()
    exact = (policy.exp() * (policy - anchor)).sum(-1).detach() * mask
    sampled = policy.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    count = batch.data["kl_tokens"].size(-1)
    top = policy.topk(count).indices
    direct = (policy.exp() * (policy - anchor).detach()).gather(-1, top).sum(-1)
    loss = (-batch.data["weights"] * sampled + 0.1 / len(tokens) * mask * direct).sum()
    loss.backward()
    differences = [
        lab.relative_error(mine.numpy(), p.grad.numpy())
        for mine, p in zip(gradients, model.parameters(), strict=True)
    ]
    return loss.item(), exact.sum(-1), max(differences), count


@pytest.mark.parametrize("estimator", ["exact", "top_k"])
def test_gradients_are_the_plain_ones_at_any_layout(materials, tmp_path, estimator):
    ((loss, kl, gradient, expected),) = run_ranks(
        gradients, 1, materials, tmp_path, Layout(), estimator
    )
    plain_loss, exact, difference, count = expected
    assert loss == pytest.approx(plain_loss, abs=1e-5) and difference < 2e-5
    assert (exact > 1e-3).all()
    if estimator == "exact":
        assert count > 5
        torch.testing.assert_close(kl.double(), exact, rtol=1e-4, atol=1e-5)
    else:
        assert count == 5 and not torch.allclose(kl.double(), exact, rtol=1e-3)
    whole = lab.assemble([gradient])
    for layout in (Layout(2, 2), Layout(2, 1, 2)):
        ranks = run_ranks(gradients, layout.ranks, materials, tmp_path, layout, estimator)
        for other_loss, other_kl, _, _ in ranks:
            assert other_loss == pytest.approx(loss, abs=1e-4)
            torch.testing.assert_close(other_kl, kl, rtol=1e-3, atol=1e-4)
        found = lab.assemble([rank[2] for rank in ranks])
        for key in whole:
            assert lab.relative_error(found[key], whole[key]) < 2e-3, (layout, key)


def refused(materials, directory):
    from nemo_warp.aligner.member import objective

    objective._MOST_BYTES = 1000
    config = lab.member_config(materials, directory, algorithm={"kl_estimator": "exact"})
    trainer = lab.build_trainer(config)
    with pytest.raises(ValueError, match=r"use top_k, with a smaller"):
        trainer.objective.batch(lab.given_rollouts(0))
    return True


def test_what_would_not_fit_is_refused(materials, tmp_path):
    assert run_ranks(refused, 1, materials, tmp_path) == [True]
