"""bf16 with O2, which H100s run: fp32 masters, sharded optimizers, sequence parallelism.

Megatron's optimizers and NeMo's fp32 masters run on a CPU; what a save, a load or an export does to
them is what it does on a GPU.
"""

import gc
import os
import signal

import member_lab as lab
import numpy as np
import pytest
import torch
from member_lab import Layout
from ranks import RankError, run_ranks

pytestmark = pytest.mark.nemo

STEPS, SAVE_AFTER = 4, 2
OPTIMIZERS = ("adam", "mcore_distributed_optim")


def _config(materials, directory, layout, optimizer, **changes):
    config = lab.member_config(
        materials,
        directory,
        layout,
        algorithm={"anchor": "ema", "ema_update_rate": 0.3, "kl_coefficient": 0.1},
        optim={"name": optimizer, "lr": 1e-3, "warmup_steps": 2},
        also=["model.megatron_amp_O2=true", 'trainer.precision="bf16"', *changes.get("also", [])],
    )
    return config


def _train(trainer, first, last):
    """Gradient norms of the steps, and the gradients of the masters in the last one."""
    from nemo_warp.aligner.weights.masters import _masters

    norms, gradients, norm = [], [], trainer.updater._norm

    def kept():
        found = norm()
        gradients[:] = [m.weights.grad.float().numpy().copy() for m in _masters(trainer.model)]
        return found

    trainer.updater._norm = kept
    for step in range(first, last):
        batch = trainer.objective.batch(lab.given_rollouts(step))
        _, metrics = trainer.run_training(trainer.optimizer_batches(batch.data))
        norms.append(metrics["grad_norm"])
    trainer.updater._norm = norm
    return norms, gradients


def _state(trainer):
    """Weights, masters and anchor on this rank."""
    from nemo_warp.aligner.weights.masters import copy_masters

    weights = (copy_masters(trainer.model), trainer.anchor.weights)
    return [
        lab.local_tensors(trainer.model),
        *(lab.state_tensors(w.sharded_state_dict("")) for w in weights),
    ]


def _save(trainer, directory):
    from nemo_warp.aligner.weights import training_checkpoint

    state = {"step": SAVE_AFTER, "evaluated": True, "rewards": None}
    trainer.model.prepare_for_training()
    saved = training_checkpoint.save(
        directory / "checkpoints", trainer.model, trainer.anchor, state, keep=2
    )
    trainer.model.finish_training()
    return saved


def uninterrupted_and_saved(materials, directory, layout, optimizer):
    """A run without a break; one with a save, a swap and an export in the middle; their masters."""
    from nemo_warp.aligner.weights.export import export_policy

    config = _config(materials, directory, layout, optimizer)
    plain = lab.build_trainer(config)
    results = {"plain": (_train(plain, 0, STEPS), _state(plain))}
    assert {p.dtype for p in plain.model.parameters()} == {torch.bfloat16}
    del plain

    saved = lab.build_trainer(config)
    norms, _ = _train(saved, 0, SAVE_AFTER)
    checkpoint = _save(saved, directory)
    with saved.anchor.weights.in_place():
        pass
    export_policy(saved.model, materials.sft, directory / "policy.nemo", "float32", checkpoint)
    masters = _state(saved)[1]
    rest, gradients = _train(saved, SAVE_AFTER, STEPS)
    results["saved"] = ((norms + rest, gradients), _state(saved))
    return results, masters


def killed(materials, directory, layout, optimizer):
    """Every rank dies in the step after the save."""
    trainer = lab.build_trainer(_config(materials, directory, layout, optimizer))
    _train(trainer, 0, SAVE_AFTER)
    _save(trainer, directory)
    _train(trainer, SAVE_AFTER, SAVE_AFTER + 1)
    os.kill(os.getpid(), signal.SIGKILL)


def resumed(materials, directory, layout, optimizer):
    from nemo_warp.aligner.weights import training_checkpoint

    trainer = lab.build_trainer(_config(materials, directory, layout, optimizer))
    checkpoint = training_checkpoint.completed_checkpoints(directory / "checkpoints")[-1]
    training_checkpoint.load(checkpoint, trainer.model, trainer.anchor)
    return _train(trainer, SAVE_AFTER, STEPS), _state(trainer)


def exported(path):
    import tiny_models

    return lab.local_tensors(tiny_models.load_tiny_nemo(path))


def _same(found, expected):
    for left, right in zip(found, expected, strict=True):
        if isinstance(left, tuple):  # name, shape, place, values
            assert left[:3] == right[:3]
            left, right = left[3], right[3]
        assert np.array_equal(left, right)


@pytest.mark.parametrize("data", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_save_export_kill_and_resume_change_nothing(materials, tmp_path, optimizer, data):
    """Gradients, weights, masters and anchor, bit for bit; gradients are never 0."""
    layout = Layout(1, 1, data)
    given = materials, tmp_path, layout, optimizer
    runs = run_ranks(uninterrupted_and_saved, layout.ranks, *given)
    other = materials, tmp_path / "killed", layout, optimizer
    with pytest.raises(RankError, match="died without a word"):
        run_ranks(killed, layout.ranks, *other)
    again = run_ranks(resumed, layout.ranks, *other)
    for (results, _), after in zip(runs, again, strict=True):
        (norms, gradients), state = results["plain"]
        assert all(norm > 0 for norm in norms)
        assert results["saved"][0][0] == norms
        assert after[0][0] == norms[SAVE_AFTER:]
        for (_, found_gradients), found in (results["saved"], after):
            _same(found_gradients, gradients)
            for part, expected in zip(found, state, strict=True):
                _same(part, expected)
    whole = lab.assemble(run_ranks(exported, 1, tmp_path / "policy.nemo"))
    masters = lab.assemble([masters for _, masters in runs])
    assert whole.keys() == masters.keys()
    for key, values in masters.items():
        assert np.array_equal(whole[key], values), key


def trained(materials, directory, layout, optimizer, sequence_parallel):
    also = ["model.sequence_parallel=true"] if sequence_parallel else []
    trainer = lab.build_trainer(_config(materials, directory, layout, optimizer, also=also))
    start = lab.local_tensors(trainer.model)
    with trainer.model.inference():  # log-probabilities under sequence parallelism
        scored = trainer.model.get_inference_log_probs(lab.given_rollouts(0).tokens)
    return _train(trainer, 0, STEPS)[0], start, lab.local_tensors(trainer.model), scored


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_layouts_agree_to_bf16(materials, tmp_path, optimizer):
    """TP 2, PP 2 (tied embeddings), TP 2 with sequence parallelism, against one rank."""
    layouts = {
        "one": (Layout(), False),
        "tp2": (Layout(2), False),
        "pp2": (Layout(1, 2), False),
        "tp2 sp": (Layout(2), True),
    }
    found = {
        name: run_ranks(trained, layout.ranks, materials, tmp_path, layout, optimizer, sp)
        for name, (layout, sp) in layouts.items()
    }
    one = found["one"]
    start, end = (lab.assemble([rank[i] for rank in one]) for i in (1, 2))
    for name, ranks in found.items():
        for norm, expected in zip(ranks[0][0], one[0][0], strict=True):
            assert norm == pytest.approx(expected, rel=0.05), name
        torch.testing.assert_close(ranks[0][3], one[0][3], atol=0.05, rtol=0.02)
        weights = lab.assemble([rank[2] for rank in ranks])  # replicas must agree
        for key in end:
            update = end[key] - start[key]
            assert lab.relative_error(weights[key] - start[key], update) < 0.35, (name, key)
            assert lab.relative_error(weights[key], end[key]) < 2**-6, (name, key)


def finer_than_bf16(materials, path):
    """The SFT model, and an init written from it whose weights bf16 cannot hold."""
    from nemo_warp.aligner.weights.export import export_policy

    model = lab.build_trainer(lab.member_config(materials, path.parent)).model
    sft = lab.local_tensors(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float() * (1 + 2.0**-10))
    export_policy(model, materials.sft, path, "same", path.parent)
    return sft, lab.local_tensors(model)


def started(materials, path, layout, optimizer):
    """What a member in bf16 starts from: parameters, masters, anchor, and an SFT copy."""
    from nemo_warp.aligner.policy.build import build_policy
    from nemo_warp.aligner.weights.masters import copy_masters

    config = _config(materials, path.parent, layout, optimizer, also=[f"init={path}"])
    policy, shards = build_policy(config, 8, 4, (str(materials.sft),))
    model = policy.model
    sft = policy.other_weights(shards[str(materials.sft)])
    views = {"masters": copy_masters(model), "anchor": policy.other_weights(None), "sft": sft}
    parts = {"policy": lab.local_tensors(model)}
    for name, weights in views.items():
        parts[name] = lab.state_tensors(weights.sharded_state_dict(""))
    return parts


@pytest.mark.parametrize("layout", [Layout(2), Layout(1, 2), Layout(1, 1, 2)], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masters_anchor_and_sft_start_from_the_files_own_precision(
    materials, tmp_path, optimizer, layout
):
    path = tmp_path / "init.nemo"
    sft, init = run_ranks(finer_than_bf16, 1, materials, path)[0]
    sft, expected = lab.assemble([sft]), lab.assemble([init])
    ranks = run_ranks(started, layout.ranks, materials, path, layout, optimizer)
    found = {name: lab.assemble([rank[name] for rank in ranks]) for name in ranks[0]}
    for key, values in expected.items():
        assert np.array_equal(found["masters"][key], values), key
        assert np.array_equal(found["anchor"][key], values), key
        assert np.array_equal(
            found["policy"][key], torch.from_numpy(values).bfloat16().float().numpy()
        ), key
        assert np.array_equal(found["sft"][key], sft[key]), key


def poisoned(materials, directory):
    """A gradient that is not finite, twice, then good ones; then too many."""
    config = _config(materials, directory, Layout(), "adam", also=["run.max_skipped_updates=3"])
    trainer = lab.build_trainer(config)
    _train(trainer, 0, 1)
    before = lab.local_tensors(trainer.model)
    moments = [s["exp_avg"].clone() for s in trainer.updater.optimizer.optimizer.state.values()]
    batch = trainer.objective.batch(lab.given_rollouts(1)).data
    bad = {**batch, "weights": batch["weights"] * float("inf")}
    skipped = [trainer.run_training(trainer.optimizer_batches(bad))[1]["skipped"] for _ in range(2)]
    after = lab.local_tensors(trainer.model)
    same = all(np.array_equal(a[3], b[3]) for a, b in zip(before, after, strict=True))
    kept = zip(moments, trainer.updater.optimizer.optimizer.state.values(), strict=True)
    same = same and all(torch.equal(m, s["exp_avg"]) for m, s in kept)
    good = _train(trainer, 1, 2)[0][0]
    for _ in range(2):
        trainer.run_training(trainer.optimizer_batches(bad))
    try:
        trainer.run_training(trainer.optimizer_batches(bad))
    except FloatingPointError as error:
        return skipped, same, good, str(error), trainer.step
    return None


def test_a_gradient_that_is_not_finite_costs_a_step_and_not_the_weights(materials, tmp_path):
    skipped, same, good, message, step = run_ranks(poisoned, 1, materials, tmp_path)[0]
    assert skipped == [1, 2] and same and good > 0 and step == 6
    assert message.startswith("3 updates in a row have no finite gradient")


def deaf(materials, directory):
    """The hooks that collect main gradients are lost, as data of another dtype once lost them."""
    trainer = lab.build_trainer(_config(materials, directory, Layout(), "adam"))
    for parameter in trainer.model.parameters():
        own = parameter.data
        parameter.data = own.float()
        parameter.data = own
    _train(trainer, 0, 1)


def test_gradients_that_nobody_collects_are_an_error(materials, tmp_path):
    with pytest.raises(RankError, match="exactly 0 although samples have weight"):
        run_ranks(deaf, 1, materials, tmp_path)


def swapped_dtype(materials, directory):
    from nemo_warp.aligner.weights.sharded import GatheredWeights

    weights = lab.build_trainer(_config(materials, directory, Layout(), "adam")).anchor.weights
    GatheredWeights(weights._parameters, weights.tensors(torch.float32))


def test_no_parameter_can_get_data_of_another_dtype(materials, tmp_path):
    with pytest.raises(RankError, match="would lose its gradient hooks"):
        run_ranks(swapped_dtype, 1, materials, tmp_path)


def loaded(materials, directory, trains, monkeypatch):
    """How many models are in memory when one is loaded; and what a rounded SFT copy computes."""
    from nemo_warp.aligner.policy import build

    alive, restore = [], build._restore

    def counted(*args):
        gc.collect()
        alive.append(sum(type(found) is build.WarpActorModel for found in gc.get_objects()))
        return restore(*args)

    monkeypatch.setattr(build, "_restore", counted)
    config, sft = _config(materials, directory, Layout(), "adam"), str(materials.other)
    policy, shards = build.build_policy(config, 8, 4, (sft,), trains=trains)
    weights, tokens = policy.other_weights(shards[sft]), lab.given_rollouts(0).tokens
    sizes, scores = [], []
    for reference in (weights, weights.clone().round_()):
        with policy.model.inference(), reference.in_place():
            scores.append(policy.model.get_inference_log_probs(tokens))
        sizes.append(reference.nbytes)
    moving = sum(p.grad is not None for p in policy.model.parameters())
    return alive, policy.optimizer is None, moving, sizes, torch.equal(*scores)


@pytest.mark.parametrize("trains", [True, False])
def test_one_model_at_a_time_and_no_optimizer_for_an_evaluation(
    materials, tmp_path, monkeypatch, trains
):
    alive, none, moving, sizes, same = run_ranks(
        loaded, 1, materials, tmp_path, trains, monkeypatch
    )[0]
    assert alive == [0, 0]
    assert none is not trains
    assert moving == 0
    assert sizes[0] == 2 * sizes[1], "an SFT copy may stay in bf16"
    assert same
