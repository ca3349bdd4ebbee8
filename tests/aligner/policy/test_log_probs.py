"""The chunked log-probabilities against the plain ones: values, gradients, layouts, memory."""

import dataclasses
import types

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


def chunked(soft_cap, positions, monkeypatch):
    """Log-probabilities, gradients of this rank, likeliest, and KL; so many positions a chunk."""
    from megatron.core import parallel_state

    from nemo_warp.aligner.policy import log_probs

    torch.distributed.init_process_group("gloo")
    size = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(size)
    columns = PADDED // size
    monkeypatch.setattr(log_probs, "CHUNK_LOGITS", positions * columns)
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
@pytest.mark.parametrize(("soft_cap", "positions"), [(0.0, 3), (5.0, 3), (0.0, 100)])
def test_values_and_gradients_are_the_plain_ones(nemo, monkeypatch, ranks, soft_cap, positions):
    parts = run_ranks(chunked, ranks, soft_cap, positions, monkeypatch)
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


def second_update(materials, directory, layout):
    """Gradients of the second update from one rollout, and the plain ones with the ratio."""
    rollout = {"prompts_per_step": 4, "samples_per_prompt": 2, "updates_per_rollout": 2}
    config = lab.member_config(
        materials, directory, layout, rollout=rollout, algorithm={"importance_limit": 1.2},
        optim={"name": "adamw", "lr": 0.01, "warmup_steps": 0},
    )  # fmt: skip
    trainer = lab.build_trainer(config)
    model, rollouts = trainer.model, lab.given_rollouts(0)
    batch = trainer.objective.batch(rollouts).data
    first, second = trainer.optimizer_batches(batch)
    _, metrics = trainer.run_training([first])
    start = [metrics[name] for name in ("importance_mean", "importance_cut")]
    model.prepare_for_training()
    trainer.updater.optimizer.zero_grad()
    model.prepare_for_training_step()
    loss, told = model.get_loss_and_metrics(second, forward_only=False)
    model.finish_training_step()
    found = loss, told, _as_weights(model, [p.grad.clone() for p in model.parameters()])
    if layout.ranks > 1:
        return start, found, None
    trainer.updater.optimizer.zero_grad()
    tokens, mask = second["response_tokens"], rollouts.mask[4:]
    attention, _, positions = model.get_ltor_masks_and_position_ids(tokens)
    logits = model.model(tokens, positions, attention, labels=None)[:, :-1]
    law = (logits.double() / TEMPERATURE).log_softmax(-1)
    log_probs = law.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    ratio = ((log_probs.detach() - second["sampled_log_probs"]) * mask).sum(-1).exp()
    loss = -(second["weights"] * log_probs * ratio.clamp(max=1.2)[:, None]).sum()
    loss.backward()
    plain = loss.item(), ratio, _as_weights(model, [p.grad for p in model.parameters()])
    return start, found, plain


def test_later_updates_weigh_responses_by_their_probability(materials, tmp_path):
    ranks = {
        layout: run_ranks(second_update, layout.ranks, materials, tmp_path, layout)
        for layout in (Layout(), Layout(1, 2), Layout(1, 1, 2))
    }
    loss, ratio, gradients = ranks[Layout()][0][2]
    assert (ratio > 1.2).any() and (ratio < 1.2).any(), "the limit has to matter"
    expected = lab.assemble([gradients])
    for layout, found in ranks.items():
        for start, (own, told, _), _ in found:
            assert start == [pytest.approx(1.0, abs=1e-5), 0.0], "nothing has moved yet"
            assert own == pytest.approx(loss, abs=1e-4)
            assert told["importance_mean"] == pytest.approx(ratio.mean().item(), rel=1e-3)
            assert told["importance_cut"] == pytest.approx((ratio > 1.2).double().mean().item())
        whole = lab.assemble([rank[1][2] for rank in found])
        for key in expected:
            assert lab.relative_error(whole[key], expected[key]) < 2e-3, (layout, key)


class Engine:
    """What TensorRT-LLM's decoder answers, as it is read; its C++ and Python count differently."""

    def __init__(self, log_probs, prompt_lengths, whole):
        self.rows, self.prompts, self.whole, self.asked = log_probs, prompt_lengths, whole, {}

    def generate(self, *, sampling_config, batch_input_ids, streaming):
        width = self.rows.size(1) + 1
        generated = [row[p - 1 :] for row, p in zip(self.rows, self.prompts, strict=True)]
        if self.whole:
            found = torch.nn.functional.pad(self.rows, (1, 0))
        else:
            found = torch.zeros(len(self.rows), width - 2)
            for row, values in zip(found, generated, strict=True):
                row[: len(values)] = values
        ids = torch.zeros(len(self.rows), 1, width, dtype=torch.int32)
        return (
            {"output_ids": ids, "log_probs": found[:, None]} if self.asked else {"output_ids": ids}
        )

    def update(self, **options):  # of a SamplingConfig
        self.asked |= options


@pytest.mark.parametrize("whole", [True, False])
def test_an_engines_law_is_held_against_the_models(nemo, whole):
    """Differences of 0.01, and one of 0.5: their mean and the largest, and the alarm."""
    from nemo_warp.aligner.policy import engine_law
    from nemo_warp.evidence.trends import Thresholds, sampler_alarm

    rollouts = lab.given_rollouts(0)
    scored = -torch.rand(rollouts.mask.shape) * rollouts.mask
    theirs = scored + 0.01
    theirs[0, int(rollouts.prompt_lengths[0])] += 0.49
    engine = Engine(theirs, rollouts.prompt_lengths, whole)
    worker = types.SimpleNamespace(decoder=engine)
    decoder = engine_law.ask(worker)
    assert engine_law.ask(worker) is decoder is worker.decoder
    decoder.generate(sampling_config=engine, batch_input_ids=[], streaming=False)
    output = {
        "prompt_lengths": rollouts.prompt_lengths, "response_lengths": rollouts.lengths,
        "response_tokens": rollouts.tokens,
    }  # fmt: skip
    placed = decoder.placed(output)
    torch.testing.assert_close(placed, theirs * rollouts.mask)
    total, count, largest = engine_law.gap(placed, scored, rollouts.mask).tolist()
    assert count == rollouts.mask.sum()
    assert total == pytest.approx(0.01 * count + 0.49, rel=1e-4)
    assert largest == pytest.approx(0.5, abs=1e-6)
    told = {"sampler_gap_mean": total / count, "sampler_gap_max": largest}
    assert not sampler_alarm(told, Thresholds()) and not sampler_alarm({}, Thresholds())
    assert "another law" in sampler_alarm(told, Thresholds(sampler_gap=0.01))["sampler"]
    engine.update = lambda **_: None
    engine.asked = {}
    with pytest.raises(RuntimeError, match="gave no log-probabilities"):
        decoder.generate(sampling_config=engine, batch_input_ids=[], streaming=False)


def sampled_by_an_engine(materials, directory):
    """A step's metrics where the actor's `infer` brings an engine's log-probabilities."""
    trainer = lab.build_trainer(lab.member_config(materials, directory))
    rollouts = lab.given_rollouts(0)
    with trainer.model.inference():
        own = trainer.model.get_inference_log_probs(rollouts.tokens, rollouts.mask)
    half = dataclasses.replace(rollouts, sampler=own + 0.25 * rollouts.mask)
    return trainer.objective.batch(half).metrics, trainer.objective.batch(rollouts).metrics


def test_the_gap_is_in_every_steps_metrics(materials, tmp_path):
    with_engine, without = run_ranks(sampled_by_an_engine, 1, materials, tmp_path)[0]
    assert with_engine["sampler_gap_mean"] == pytest.approx(0.25, abs=1e-5)
    assert with_engine["sampler_gap_max"] == pytest.approx(0.25, abs=1e-5)
    assert not [name for name in without if name.startswith("sampler")]


def one_step(materials, directory, monkeypatch):
    """What a step waits for, in order, with rewards that come last."""
    from nemo_warp.aligner.sampling.rewards import LocalScores, PendingRewards
    from nemo_warp.aligner.sampling.rollouts import Responses, Sampled

    trainer, events = lab.build_trainer(lab.member_config(materials, directory)), []
    given = lab.given_rollouts(0)
    fields = [field.name for field in dataclasses.fields(Responses)]
    responses = Responses(**{name: getattr(given, name) for name in fields})

    def wait():
        events.append("rewards")
        return LocalScores(given.rewards, given.failed, given.rewards[:, None])

    scoring = trainer.model.score
    monkeypatch.setattr(trainer.model, "score", lambda *a: events.append("score") or scoring(*a))
    trainer.generate_rollouts = lambda: Sampled(responses, [PendingRewards(wait)])
    trainer.rewards = types.SimpleNamespace(
        check=lambda _: events.append("check"), means=lambda _: {}, deviations=lambda _: {}
    )
    metrics = trainer.train_step()
    return events, metrics["reward"], given.rewards.mean().item(), trainer.timings.take()


def test_rewards_are_waited_for_after_the_log_probabilities(materials, tmp_path, monkeypatch):
    events, found, expected, seconds = run_ranks(one_step, 1, materials, tmp_path, monkeypatch)[0]
    assert events == ["score", "score", "rewards", "check"]  # of the policy, of the anchor
    assert found == pytest.approx(expected)
    assert {"log_prob", "anchor_log_prob", "reward_wait", "train"} <= seconds.keys()
