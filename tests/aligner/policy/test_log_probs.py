"""The chunked log-probabilities against the plain ones: values, gradients, layouts, memory."""

import member_lab as lab
import pytest
import tiny_models
import torch
from member_lab import Layout, Materials
from ranks import run_ranks

pytestmark = pytest.mark.nemo

VOCABULARY, PADDED, HIDDEN, TEMPERATURE = 50, 96, 24, 0.9


def _problem():
    """Hidden states [30, H], a weight, another one, positions, their targets, and factors."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(30, HIDDEN, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, generator=generator)
    other = weight + 0.3 * torch.randn(PADDED, HIDDEN, generator=generator)
    index = torch.randperm(30, generator=generator)[:17]
    targets = torch.randint(VOCABULARY, (17,), generator=generator)
    return states, weight, other, index, targets, torch.randn(17, generator=generator)


def _layer(weight, first, soft_cap):
    from nemo_warp.aligner.policy.log_probs import OutputLayer

    return OutputLayer(weight, first, VOCABULARY, TEMPERATURE, soft_cap, weight.dtype)


def chunked(soft_cap, monkeypatch):
    """Log-probabilities, gradients of this rank, likeliest, and KL; chunks of 3 positions."""
    from megatron.core import parallel_state

    from nemo_warp.aligner.policy import log_probs

    torch.distributed.init_process_group("gloo")
    size = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(size)
    columns = PADDED // size
    monkeypatch.setattr(log_probs, "CHUNK_LOGITS", 3 * columns)
    states, weight, other, index, targets, factors = _problem()
    first = torch.distributed.get_rank() * columns
    states.requires_grad_()
    part = weight[first : first + columns].clone().requires_grad_()
    layer = _layer(part, first, soft_cap)
    found, best = log_probs.target_log_probs(states, layer, index, targets)
    (found * factors).sum().backward()
    none = torch.zeros(0, dtype=torch.int64)
    empty, _ = log_probs.target_log_probs(states, layer, none, none)
    empty.sum().backward()  # in the graph, so that gradient hooks run
    reference = layer.with_weight(other[first : first + columns])
    policy = log_probs.FinalStates(states.detach()[index], layer.with_weight(part.detach()))
    theirs = log_probs.FinalStates(states.detach()[index], reference)
    kl, same = log_probs.exact_kl(policy, theirs), log_probs.exact_kl(policy, policy)
    return found.detach(), best, states.grad, part.grad, kl, same


def plain(soft_cap):
    """The same written out in float64; gradients of the whole weight."""
    states, weight, other, index, targets, factors = _problem()
    states, weight = states.double().requires_grad_(), weight.double().requires_grad_()

    def law(matrix):
        logits = (states[index] @ matrix.t())[:, :VOCABULARY]
        logits = soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits
        return (logits / TEMPERATURE).log_softmax(-1)

    ours, theirs = law(weight), law(other.double())
    found = ours.gather(1, targets[:, None]).squeeze(1)
    (found * factors).sum().backward()
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    return found.detach(), ours.detach().amax(-1), states.grad, weight.grad, kl.detach()


@pytest.mark.parametrize("ranks", [1, 2, 4])  # of 4, one is half padding and one all of it
@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
def test_values_and_gradients_are_the_plain_ones(nemo, monkeypatch, ranks, soft_cap):
    parts = run_ranks(chunked, ranks, soft_cap, monkeypatch)
    log_probs, best, grad_states, grad_weight, kl = plain(soft_cap)

    def close(left, right):
        torch.testing.assert_close(left.double(), right, rtol=2e-5, atol=2e-6)

    for found, likeliest, _, _, divergence, same in parts:
        close(found, log_probs)
        close(likeliest, best)
        close(divergence, kl)
        assert (same == 0).all()
    close(sum(part[2].double() for part in parts), grad_states)
    close(torch.cat([part[3] for part in parts]), grad_weight)


@pytest.fixture(scope="module")
def untied(materials, tmp_path_factory):
    """The materials with a model whose output layer has a weight of its own."""
    folder = tmp_path_factory.mktemp("untied")
    tokenizer = tiny_models.write_tokenizer(folder)
    run_ranks(_save, 1, folder / "untied.nemo", tokenizer)
    other = folder / "untied.nemo"
    return Materials(sft=other, other=other, train=materials.train, heldout=materials.heldout)


def _save(path, tokenizer):
    lengths = {"encoder_seq_length": 32, "max_position_embeddings": 32}
    tiny_models.save_tiny_nemo(path, tokenizer, num_layers=4, **lengths)


def gradients(materials, directory, layout, also, monkeypatch):
    """Loss, log-probabilities, and the gradient of every tensor; on one rank the plain one, too."""
    from nemo_warp.aligner.policy import log_probs

    monkeypatch.setattr(log_probs, "CHUNK_LOGITS", 20 * lab.VOCABULARY)
    config = lab.member_config(materials, directory, layout, also=also)
    trainer = lab.build_trainer(config)
    model, rollouts = trainer.model, lab.given_rollouts(0)
    with model.inference():
        scores = model.get_inference_log_probs(rollouts.tokens, rollouts.mask)
    batch = trainer.objective.batch(rollouts).data
    model.prepare_for_training()
    trainer.updater.optimizer.zero_grad()
    model.prepare_for_training_step()
    loss, _ = model.get_loss_and_metrics(trainer.optimizer_batches(batch)[0], forward_only=False)
    model.finish_training_step()
    parameters = list(model.parameters())
    found = loss, scores, _as_weights(model, [p.grad.clone() for p in parameters])
    if layout.ranks > 1 or also:
        return found, None
    trainer.updater.optimizer.zero_grad()
    tokens = batch["response_tokens"]
    mask, _, positions = model.get_ltor_masks_and_position_ids(tokens)
    logits = model.model(tokens, positions, mask, labels=None)[:, :-1]
    law = (logits.double() / TEMPERATURE).log_softmax(-1)
    expected = law.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    loss = -(batch["weights"] * expected).sum()
    loss.backward()
    return found, (loss.item(), expected.detach() * rollouts.mask,
                   _as_weights(model, [p.grad for p in parameters]))  # fmt: skip


def _as_weights(model, tensors):
    for parameter, tensor in zip(model.parameters(), tensors, strict=True):
        parameter.data, tensor.data = tensor, parameter.data
    parts = lab.local_tensors(model)
    for parameter, tensor in zip(model.parameters(), tensors, strict=True):
        parameter.data, tensor.data = tensor, parameter.data
    return parts


@pytest.mark.parametrize("which", ["materials", "untied"])
def test_any_layout_has_the_plain_gradients(request, tmp_path, monkeypatch, which):
    """Micro batches of other sizes and lengths, stages, and a split sequence change nothing."""
    materials = request.getfixturevalue(which)
    sequence, tokens = ["model.sequence_parallel=true"], ["rollout.train_tokens=40"]
    runs = [
        (Layout(), []),
        (Layout(), [*tokens, "rollout.forward_tokens=50"]),
        (Layout(2), sequence),
        (Layout(2), []),
        (Layout(1, 2), tokens),
        (Layout(2, 2), sequence),
    ]
    plain = None
    for layout, also in runs if which == "materials" else runs[:1] + runs[2:5]:
        ranks = run_ranks(gradients, layout.ranks, materials, tmp_path, layout, also, monkeypatch)
        plain = plain or ranks[0][1]
        loss, scores, expected = plain[0], plain[1], lab.assemble([plain[2]])
        for (found_loss, found_scores, _), _ in ranks:
            assert found_loss == pytest.approx(loss, abs=1e-5)  # sums cancel
            torch.testing.assert_close(found_scores.double(), scores, rtol=1e-5, atol=1e-5)
        found = lab.assemble([rank[0][2] for rank in ranks])
        assert found.keys() == expected.keys()
        for key in expected:
            assert lab.relative_error(found[key], expected[key]) < 2e-5, (layout, also, key)
