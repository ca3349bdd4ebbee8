"""Where nothing is meant to change, NeMo-Aligner's own classes give the same numbers; and what
upstream 0.7.0 gets wrong, run on upstream."""

import ast
import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import member_lab as lab
import numpy as np
import pytest
import torch
from ranks import RankError, run_ranks

pytestmark = pytest.mark.nemo

STEPS = 3
BETA = 0.05


def upstream_config(materials, directory):
    """Our options that restate upstream's choices."""
    return lab.member_config(
        materials,
        directory,
        algorithm={
            "anchor": "sft",
            "kl_coefficient": BETA,
            "kl_estimator": "absolute",
            "kl_reduction": "mean",
            "policy_reduction": "sequence_mean",
            "log_prob_temperature": 1.0,
            "exclude_truncated": True,
        },
    )


def ours(materials, directory):
    trainer = lab.build_trainer(upstream_config(materials, directory))
    losses = []
    for step in range(STEPS):
        batch = trainer.objective.batch(lab.given_rollouts(step))
        losses.append(trainer.run_training(trainer.optimizer_batches(batch.data))[0])
    return losses, lab.local_tensors(trainer.model)


def upstream_trainer(materials, directory, micro_batch_size=1):
    """Unmodified ReinforceTrainer and MegatronGPTReinforceActorModel on the same checkpoint."""
    from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
    from nemo_aligner.algorithms.reinforce import ReinforceTrainer
    from nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor import (
        MegatronGPTReinforceActorModel,
    )
    from nemo_aligner.utils.train_script_utils import (
        extract_optimizer_scheduler_from_ptl_model,
        init_distributed,
        init_using_ptl,
    )
    from nemo_aligner.utils.utils import load_from_nemo, retrieve_model_state_dict_in_cpu
    from omegaconf import OmegaConf

    from nemo_warp.aligner.policy.nemo_config import nemo_config

    config = upstream_config(materials, directory)
    tree = nemo_config(config, config.init, 8, config.run.total_steps)
    tree.model.micro_batch_size = micro_batch_size
    trainer = MegatronTrainerBuilder(tree).create_trainer()
    model = load_from_nemo(
        MegatronGPTReinforceActorModel, tree.model, trainer, restore_path=config.init
    )
    model.init_policy_state_dict = retrieve_model_state_dict_in_cpu(model, megatron_amp_O2=False)
    init_distributed(trainer, model)
    loader = torch.utils.data.DataLoader([0])
    init_using_ptl(trainer, model, loader, loader.dataset)
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(model)
    sampler = SimpleNamespace(total_samples=64, global_batch_size=8, drop_last=True)
    settings = {
        "initial_policy_kl_penalty": BETA,
        "use_absolute_kl": True,
        "gradient_clip_val": 1.0,
        "max_epochs": 1,
        "rollout_batch_seq_length": None,
    }
    return ReinforceTrainer(
        cfg=OmegaConf.create(settings),
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        train_dataloader_builder=lambda consumed_samples: SimpleNamespace(batch_sampler=sampler),
        val_dataloader_builder=None,
        collate_fn=None,
        rm=None,
        batch_iterator_cls=None,
        logger=SimpleNamespace(log_metrics=lambda *_, **__: None),
        ckpt_callback=None,
        run_timer=None,
    )


def upstream_step(trainer, step):
    from nemo_aligner.algorithms.reinforce import ReinforceRolloutBatch

    rollouts = lab.given_rollouts(step)
    width = int(rollouts.prompt_lengths.max())
    prompts = torch.where(
        torch.arange(width) < rollouts.prompt_lengths[:, None], rollouts.tokens[:, :width], 2
    )
    with torch.no_grad():
        batch = ReinforceRolloutBatch(
            prompt_lengths=rollouts.prompt_lengths,
            response_lengths=rollouts.lengths,
            prompt_tokens=prompts,
            response_tokens=rollouts.tokens,
            rewards=rollouts.rewards,
            is_end=rollouts.is_end,
            logprobs=trainer.model.get_inference_log_probs(rollouts.tokens),
            init_logprobs=trainer.model.get_init_policy_logprobs(rollouts.tokens),
        )
        data, _ = trainer.generate_reinforce_data(batch)
    return trainer.run_training([data])


def theirs(materials, directory):
    trainer = upstream_trainer(materials, directory)
    losses = [upstream_step(trainer, step)[0] for step in range(STEPS)]
    return losses, lab.local_tensors(trainer.model)


def test_equal_to_unmodified_nemo_aligner(materials, tmp_path):
    our_losses, our_weights = run_ranks(ours, 1, materials, tmp_path)[0]
    their_losses, their_weights = run_ranks(theirs, 1, materials, tmp_path)[0]
    assert our_losses == pytest.approx(their_losses, rel=1e-5, abs=1e-6)
    # Three steps of Adam move the weights by about 1e-2 of their size. It divides by the gradient's
    # own size, so where a gradient is all but 0 its rounding shows: 1e-6 on some processors.
    for left, right in zip(our_weights, their_weights, strict=True):
        assert left[0] == right[0]
        assert lab.relative_error(left[3], right[3]) < 1e-5, left[0]


def upstream_at_micro_batch_two(materials, directory):
    upstream_step(upstream_trainer(materials, directory, micro_batch_size=2), 0)


def test_upstream_loss_needs_micro_batch_one(materials, tmp_path):
    """Traps 5 and 6: [B, S-1] times [B]; ours is shown for 1, 2 and 4 in test_layouts."""
    with pytest.raises(RankError, match="must match the size of tensor"):
        run_ranks(upstream_at_micro_batch_two, 1, materials, tmp_path)


def split_eight_rows():
    from megatron.core import parallel_state
    from nemo_aligner.algorithms.reinforce import ReinforceRolloutBatch

    from nemo_warp.aligner.sampling.rollouts import gather_rows, local_rows

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    batch = torch.arange(8)
    upstream = ReinforceRolloutBatch(x=batch).chunk(rank, size, seed=0)["x"].tolist()
    mine = batch[local_rows(8)]
    return mine.tolist(), gather_rows(mine).tolist(), upstream


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_sample_is_trained_on_once(nemo, ranks):
    """Trap 1: the ranks' rows together are the batch; upstream's are the batch on every rank."""
    results = run_ranks(split_eight_rows, ranks)
    rows = [row for mine, _, _ in results for row in mine]
    assert rows == list(range(8))
    assert all(gathered == list(range(8)) for _, gathered, _ in results)
    assert all(upstream == list(range(8)) for _, _, upstream in results)


def beta_zero_upstream(materials, directory):
    trainer = upstream_trainer(materials, directory)
    trainer.compute_init_policy_kl = False
    upstream_step(trainer, 0)


def beta_zero_ours(materials, directory):
    algorithm = {"anchor": "none", "kl_coefficient": 0.0}
    trainer = lab.build_trainer(lab.member_config(materials, directory, algorithm=algorithm))
    batch = trainer.objective.batch(lab.given_rollouts(0))
    _, metrics = trainer.run_training(trainer.optimizer_batches(batch.data))
    return metrics["grad_norm"]


def test_no_anchor_works(materials, tmp_path):
    """Trap 18: upstream raises with a KL penalty of 0."""
    assert run_ranks(beta_zero_ours, 1, materials, tmp_path)[0] > 0
    with pytest.raises(RankError):
        run_ranks(beta_zero_upstream, 1, materials, tmp_path)


def one_sample_per_prompt(materials, directory):
    config = lab.member_config(
        materials, directory, rollout={"prompts_per_step": 8, "samples_per_prompt": 1}
    )
    trainer = lab.build_trainer(config)
    batch = trainer.objective.batch(lab.given_rollouts(0))
    _, metrics = trainer.run_training(trainer.optimizer_batches(batch.data))
    return trainer.objective.baseline, metrics["grad_norm"]


def test_gradient_with_one_sample_per_prompt(materials, tmp_path):
    baseline, norm = run_ranks(one_sample_per_prompt, 1, materials, tmp_path)[0]
    assert baseline == "batch_mean"
    assert norm > 0


def failed_and_truncated(materials, directory):
    algorithm = {"exclude_truncated": True}
    trainer = lab.build_trainer(lab.member_config(materials, directory, algorithm=algorithm))
    rollouts = lab.given_rollouts(0)
    rollouts.rewards[2] = torch.nan
    rollouts.failed[2] = True
    batch = trainer.objective.batch(rollouts)
    loss, metrics = trainer.run_training(trainer.optimizer_batches(batch.data))
    return batch, np.isfinite(loss) and np.isfinite(metrics["grad_norm"])


def test_excluded_samples_have_no_gradient(materials, tmp_path):
    """Sample 1 is truncated and 2 failed; their partners 0 and 3 then have no baseline."""
    batch, finite = run_ranks(failed_and_truncated, 1, materials, tmp_path)[0]
    weights = batch.data["weights"].abs().sum(-1)
    assert (weights[:4] == 0).all()
    assert (weights[4:] > 0).all()
    assert batch.metrics["failed_rewards"] == 1
    assert batch.metrics["samples_used"] == 4
    assert finite


def test_benchmarks_find_all_that_they_import(nemo, monkeypatch):
    """From what `make setup` installs, modules of NeMo-Aligner's imports included (flask once)."""
    tools = Path(__file__).parents[3] / "tools"
    monkeypatch.syspath_prepend(str(tools))
    modules = set()
    for file in [*tools.glob("bench*.py"), *tools.glob("_bench*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module)
            elif isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
    assert "nemo_aligner.utils.batch_iterators" in modules
    for module in sorted(modules):
        importlib.import_module(module)


def test_bench_of_a_step_measures_both_sides(nemo, monkeypatch, tmp_path):
    """Smaller than small: whether it runs, not what it finds."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "tools"))
    bench = importlib.import_module("bench_member")
    words = "--repetitions 1 --hidden 32 --layers 1 --heads 2 --vocabulary 200 --prompts 4"
    words += f" --prompt 4 --response 4 --micro-batch 2 --json {tmp_path / 'bench.json'}"
    monkeypatch.setattr("sys.argv", ["bench_member.py", *words.split()])
    assert bench.main() == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert len(rows) >= 5
    assert all(math.isfinite(row["median"]) and row["median"] > 0 for row in rows)
