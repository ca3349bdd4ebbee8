"""What every rank of gpu_check.py does at one layout; rank 0 writes what was found.

    python -m nemo_warp.pipeline.ranks --nproc-per-node N -- python tools/_gpu_check_ranks.py SPEC

Numbers that must not depend on luck come from given responses (`_numbers`); speed, saves and
exports from a whole member with responses and rewards of its own, through its entry point
(`_member`).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from nemo_warp.config import CONF_DIRECTORY, load_config, to_plain

STEPS, SAVE_AFTER = 3, 2
MEMBER_STEPS = 4
BATCH, PROMPT = 8, 8
_MIB_EXCHANGED = 64


def share_of_vowels(prompt: str, response: str) -> float:
    """The members' reward."""
    return sum(letter in "aeiou" for letter in response) / max(1, len(response))


def main(spec_file: Path) -> int:
    """Run one layout's checks."""
    from nemo_warp.aligner.compat import activate

    spec = json.loads(spec_file.read_text())
    activate()
    if spec["prepare"]:
        _save_model(spec)
    found: dict[str, Any] = {"members": {}}
    for optimizer in spec["optimizers"]:
        directory = Path(spec["directory"]) / spec["name"] / optimizer
        numbers = {} if spec["engine"] else _numbers(spec, optimizer, directory / "numbers")
        found["members"][optimizer] = numbers | _member(spec, optimizer, directory / "member")
    if spec["front"]:
        found["front"] = _front(spec, Path(spec["directory"]) / spec["name"] / "front")
    found["exchange"] = exchange()
    if torch.distributed.get_rank() == 0:
        Path(spec["result"]).write_text(json.dumps(found, indent=1))
    torch.distributed.barrier()
    return 0


def _save_model(spec: dict[str, Any]) -> None:
    """A small GPT as NeMo initialises it, in the way of Llama."""
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder

    config = load_config(Path(spec["pretrain"]), spec["model"])
    trainer = MegatronTrainerBuilder(config).create_trainer()
    model = MegatronGPTModel(config.model, trainer)
    trainer.strategy.setup_environment()
    model.cuda().save_to(spec["init"])


def member_config(spec: dict[str, Any], optimizer: str, directory: Path) -> Any:
    """A member at this layout, in bf16 with O2."""
    tensor, pipeline = spec["tensor"], spec["pipeline"]
    # Members of equal seeds are nearly one policy, whatever the optimizer: no merge takes them.
    seed = 1 + sorted([*spec["optimizers"], optimizer]).index(optimizer)
    together = BATCH // (spec["ranks"] // (tensor * pipeline))  # each rank's share, at once
    given = {
        "run": {
            "name": "gpu-check", "seed": seed, "directory": str(directory),
            "total_steps": MEMBER_STEPS,
            "eval_interval": MEMBER_STEPS, "save_interval": SAVE_AFTER, "save_margin": 0,
        },
        "init": spec["init"],
        "prompts": {"train": spec["prompts"], "heldout": spec["prompts"], "max_tokens": PROMPT},
        "rollout": {
            "prompts_per_step": BATCH, "max_response_tokens": spec["response"],
            "micro_batch_size": together, "trt_llm": {"enable": spec["engine"]},
        },
        "rewards": [{"name": "vowels", "weight": 1.0, "endpoint": spec["endpoint"]}],
        "evaluation": {"num_prompts": BATCH},
        "optim": {"name": optimizer, "lr": 1e-4, "warmup_steps": 0},
        "algorithm": {"ema_update_rate": 0.3},
        "trainer": {"devices": spec["ranks"], "accelerator": "auto", "precision": "bf16"},
        "model": {
            "tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline,
            "sequence_parallel": tensor > 1, "megatron_amp_O2": True,
            "extra": {"transformer_engine": spec["transformer_engine"]},
        },
        "export": {"dtype": "float32"},
        "loggers": {"tensorboard": False},
    }  # fmt: skip
    return load_config(CONF_DIRECTORY / "member.yaml", given)


def _trainer(config: Any) -> Any:
    """A trainer that is fed responses by hand: no prompts, rewards, evaluation or log."""
    from nemo_warp.aligner.member.stopping import StopRequest
    from nemo_warp.aligner.member.trainer import WarpReinforceTrainer
    from nemo_warp.aligner.policy.build import build_policy
    from nemo_warp.aligner.weights.anchor import EmaAnchor

    _forget_batch_sizes()
    policy, _ = build_policy(config, BATCH, config.run.total_steps)
    anchor = EmaAnchor(policy.other_weights(None), config.algorithm.ema_update_rate)
    unused: Any = None
    return WarpReinforceTrainer(
        config=config, model=policy.model, optimizer=policy.optimizer, scheduler=policy.scheduler,
        prompts=[], rewards=unused, anchor=anchor, reference=anchor.weights, evaluator=unused,
        log=None, stop=StopRequest(None, 0.0, 0.0),
    )  # fmt: skip


def given_rollouts(spec: dict[str, Any], seed: int) -> Any:
    """Responses that come from no policy, the same at every layout."""
    from nemo_warp.aligner.sampling.rollouts import Rollouts

    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, PROMPT + spec["response"])
    tokens = torch.randint(4, spec["vocabulary"], shape, generator=generator)
    rows = [
        tokens, torch.full((BATCH,), PROMPT), torch.full((BATCH,), shape[1]),
        torch.ones(BATCH, dtype=torch.bool), torch.randn(BATCH, generator=generator),
        torch.zeros(BATCH, dtype=torch.bool),
    ]  # fmt: skip
    return Rollouts(*(row.cuda() for row in rows))


def _train(trainer: Any, spec: dict[str, Any], steps: range) -> list[float]:
    """Gradient norms of the steps."""
    norms = []
    for step in steps:
        with trainer.model.inference():
            batch = trainer.objective.batch(given_rollouts(spec, step))
        _, metrics = trainer.run_training(trainer.optimizer_batches(batch.data))
        norms.append(metrics["grad_norm"])
    return norms


def _numbers(spec: dict[str, Any], optimizer: str, directory: Path) -> dict[str, Any]:
    """Uninterrupted steps with a save among them, and the last of them again after a resume."""
    from nemo_warp.aligner.weights import training_checkpoint

    directory.mkdir(parents=True, exist_ok=True)
    trainer = _trainer(member_config(spec, optimizer, directory))
    starts_as_policy = trainer.anchor.weights.equal_model()
    norms = _train(trainer, spec, range(SAVE_AFTER))
    trainer.step, trainer.evaluated = SAVE_AFTER, True
    state = {"step": SAVE_AFTER, "evaluated": True, "rewards": None}
    trainer.model.prepare_for_training()
    checkpoint = training_checkpoint.save(
        directory / "checkpoints", trainer.model, trainer.anchor, state, keep=2
    )
    trainer.model.finish_training()
    saved = trainer.anchor.weights.shard.clone()
    norms += _train(trainer, spec, range(SAVE_AFTER, STEPS))
    with trainer.model.inference():
        log_probs = trainer.model.get_inference_log_probs(given_rollouts(spec, 99).tokens)
    del trainer
    resumed = _trainer(member_config(spec, optimizer, directory))
    training_checkpoint.load(checkpoint, resumed.model, resumed.anchor)
    same_anchor = torch.equal(resumed.anchor.weights.shard, saved)
    again = _train(resumed, spec, range(SAVE_AFTER, STEPS))
    return {
        "norms": norms,
        "resumed_norms": again,
        "anchor_starts_as_policy": starts_as_policy,
        "anchor_survives": everywhere(same_anchor),
        "log_probs": log_probs.float().cpu().tolist(),
    }


def _member(spec: dict[str, Any], optimizer: str, directory: Path) -> dict[str, Any]:
    """A whole member; its speed and memory, against the estimate."""
    from omegaconf import OmegaConf

    from nemo_warp.aligner import train
    from nemo_warp.core.footprint import ALLOWANCE, member_footprint
    from nemo_warp.core.transformer import Sizes

    config = member_config(spec, optimizer, directory)
    file = directory.with_suffix(f".{_rank()}.yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, file)
    _forget_batch_sizes()
    code = train.main(["--config", str(file)])
    torch.distributed.barrier()
    metrics, timings = (_lines(directory / name) for name in ("metrics.jsonl", "timings.jsonl"))
    trained = [line for line in metrics if line["kind"] == "train"]
    last = timings[-1]
    sizes = Sizes.of_nemo(spec["model"]["model"], spec["vocabulary"])
    estimate = member_footprint(sizes, to_plain(config))
    return {
        "exit_code": code,
        "member_norms": [line["grad_norm"] for line in trained],
        "kl_to_anchor": [line["kl_to_anchor"] for line in trained],
        "seconds_per_step": last["rollout"] + last["train"],
        "estimated_bytes": estimate.peak - ALLOWANCE,
        **{k: last.get(k) for k in (
            "generated_tokens_per_second", "trained_tokens_per_second", "flops_utilisation",
            "peak_memory_bytes",
        )},
        "policy": str(directory / "policy.nemo"),
    }  # fmt: skip


def _front(spec: dict[str, Any], directory: Path) -> list[dict[str, float]]:
    """Reward and KL between init and a merge of two members."""
    from omegaconf import OmegaConf

    from nemo_warp.aligner import evaluate

    member = to_plain(member_config(spec, "adam", directory))
    shared = ("rewards", "rollout", "algorithm", "evaluation", "trainer", "model")
    given = {name: member[name] for name in shared} | {
        "directory": str(directory), "base": spec["init"], "slerp": spec["front"],
        "sft": spec["init"], "etas": [0.0, 1.0], "run_id": "gpu-check",
        "prompts": {"heldout": spec["prompts"], "max_tokens": PROMPT},
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"config.{_rank()}.yaml"
    OmegaConf.save(OmegaConf.create(given), file)
    _forget_batch_sizes()
    code = evaluate.main(["--config", str(file)])
    if code:
        raise RuntimeError(f"the front ended with exit code {code}")
    keys = ("eta", "reward", "kl_to_sft")
    return [{k: point[k] for k in keys} for point in _lines(directory / "points.jsonl")]


def exchange() -> dict[str, Any]:
    """Sums 64 MiB over all ranks: whether they are right, and how fast."""
    world = torch.distributed.get_world_size()
    values = torch.full((_MIB_EXCHANGED * 2**18,), 1.0, device=torch.cuda.current_device())
    torch.distributed.all_reduce(values)  # the first one connects
    right = bool((values == world).all())
    torch.cuda.synchronize()
    started = time.perf_counter()
    torch.distributed.all_reduce(values)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return {
        "backend": torch.distributed.get_backend(),
        "ranks": world,
        "right": everywhere(right),
        "gigabytes_per_second": _MIB_EXCHANGED * 2**20 / 1e9 / seconds,
    }


def everywhere(flag: bool) -> bool:
    """Whether the flag is set on all ranks. Collective."""
    found = torch.tensor(float(flag), device=torch.cuda.current_device())
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN)
    return bool(found.item())


def _rank() -> int:
    return int(os.environ["RANK"])


def _forget_batch_sizes() -> None:
    """NeMo refuses to build a model whose batches are not those of the one before."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    destroy_num_microbatches_calculator()


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
