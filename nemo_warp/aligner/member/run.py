"""One member from its checked configuration to its completion record."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nemo.utils import logging

from nemo_warp import exit_codes
from nemo_warp.aligner.entry.prompts import Prompt, Rules, describe, encoder, lacking_bos, tokenize
from nemo_warp.aligner.entry.validation import max_prompt_tokens
from nemo_warp.aligner.entry.versions import package_versions
from nemo_warp.aligner.evaluation.evaluator import Evaluator
from nemo_warp.aligner.member.metrics import MetricsLog, SilentLog
from nemo_warp.aligner.member.stopping import StopRequest
from nemo_warp.aligner.member.trainer import Outcome, WarpReinforceTrainer
from nemo_warp.aligner.policy.build import Policy, build_policy
from nemo_warp.aligner.policy.device import describe_footprint
from nemo_warp.aligner.sampling.rewards import RewardSource
from nemo_warp.aligner.weights import training_checkpoint
from nemo_warp.aligner.weights.anchor import EmaAnchor, describe_memory
from nemo_warp.aligner.weights.export import export_policy
from nemo_warp.aligner.weights.intact import damage_of, refuse_damaged
from nemo_warp.aligner.weights.sharded import ShardedWeights
from nemo_warp.config import identity_hash, to_plain
from nemo_warp.core.footprint import NO_ROOM
from nemo_warp.core.seeds import order_hash
from nemo_warp.prompts import PromptLine
from nemo_warp.records import (
    Completion,
    RecordError,
    code_version,
    hash_file,
    write_completion,
    write_json_atomically,
)
from nemo_warp.schema.member import Member as MemberConfig

EXIT_CODES = {
    Outcome.DONE: exit_codes.DONE,
    Outcome.STOPPED: exit_codes.STOPPED_RESUMABLE,
    Outcome.REWARDS_FAILED: exit_codes.REWARDS_FAILED,
    Outcome.KL_LIMIT: exit_codes.KL_LIMIT,
}
POLICY_FILE = "policy.nemo"


def run_member(config: MemberConfig, texts: dict[str, list[PromptLine]], started: float) -> int:
    """Train to step T, or stop resumably. Collective; call after `compat.activate`.

    Args:
        config: checked by `train.check_member`.
        texts: the ``train`` and ``heldout`` prompts, with their further fields.
        started: when the process began (s since the epoch), for the time limit.

    Returns:
        An exit code of `nemo_warp.exit_codes`.
    """
    stop = StopRequest(config.run.time_limit, config.run.save_margin, started)
    # First of all: a signal while the model loads must not kill the member, but end it at step 0.
    # (NeMo's PreemptionCallback installs its handler in on_train_start, which NeMo-Aligner's
    # trainers never call; they fire on_fit_start only, utils/train_script_utils.py l.113.)
    stop.install()
    member = build_member(config, texts, stop)
    outcome = member.trainer.fit()
    if outcome is Outcome.DONE:
        finish(config, texts, member)
    member.trainer.log.close()
    member.trainer.rewards.close()
    return EXIT_CODES[outcome]


@dataclass(frozen=True)
class Member:
    """What `build_member` made."""

    policy: Policy
    trainer: WarpReinforceTrainer


def build_member(
    config: MemberConfig, texts: dict[str, list[PromptLine]], stop: StopRequest
) -> Member:
    """Load, restore and connect everything one member needs."""
    rollout = config.rollout
    batch = rollout.prompts_per_step * rollout.samples_per_prompt
    others = () if config.sft == config.init else (config.sft,)
    policy, shards = build_policy(
        config, batch // rollout.updates_per_rollout, config.run.total_steps, others
    )
    # After the model was built, since it is collective and needs the process groups.
    refuse_damaged(config.init, config.sft)
    model = policy.model
    _check_end_token(model, config.init)
    offload = config.algorithm.offload_anchor
    sft = policy.other_weights(shards.get(config.sft), offload).round_()
    anchor = None
    if config.algorithm.anchor == "ema":
        anchor = EmaAnchor(policy.other_weights(None, offload), config.algorithm.ema_update_rate)
    ema = None if anchor is None else anchor.weights
    reference = {"ema": ema, "sft": sft, "none": None}
    # The anchor was made from init and is now replaced by the checkpoint's. NeMo-Aligner reads its
    # reference from the initial checkpoint again, so an EMA anchor would be reset at every requeue.
    state = _resume(config, policy, anchor)
    rewards = RewardSource(config, config.run.name)
    # Before tokenizing: what waits longest (a server that loads a model) begins first.
    rewards.connect(state["rewards"], texts)
    prompts = {name: _tokenize(config, model, name, texts[name]) for name in texts}
    evaluator = Evaluator(
        config, model, prompts["heldout"][: config.evaluation.num_prompts], rewards, sft
    )
    trainer = WarpReinforceTrainer(
        config=config,
        model=model,
        optimizer=policy.optimizer,
        scheduler=policy.scheduler,
        prompts=prompts["train"],
        rewards=rewards,
        anchor=anchor,
        reference=reference[config.algorithm.anchor],
        evaluator=evaluator,
        log=_open_log(config, state["step"]),
        stop=stop,
        step=state["step"],
        evaluated=state["evaluated"],
    )
    _announce(trainer, {"sft": sft} | ({"anchor": anchor.weights} if anchor else {}))
    return Member(policy, trainer)


def _check_end_token(model: Any, init: str) -> None:
    """Without an end token no response ever ends, and padding with it would be no token.

    Raises:
        ValueError: the tokenizer has none.
    """
    tokenizer = model.tokenizer
    end = getattr(tokenizer, "eos_id", None)
    if end is None or not 0 <= end < tokenizer.vocab_size:
        raise ValueError(
            f"the tokenizer in {init} has no end-of-sequence token (EOS is {end}): no response "
            "could end; use a model whose tokenizer has one"
        )


def finish(config: MemberConfig, texts: dict[str, list[PromptLine]], member: Member) -> None:
    """Export the policy of step T and write the completion record, last."""
    trainer = member.trainer
    directory = Path(config.run.directory)
    output = directory / POLICY_FILE
    name = training_checkpoint.checkpoint_name(trainer.step)
    export_policy(
        member.policy.model,
        Path(config.init),
        output,
        config.export.dtype,
        trainer.checkpoints / name,
    )
    # Collective: outside of the branch for rank 0.
    fingerprints = trainer.rewards.fingerprints
    if torch.distributed.get_rank() == 0:
        details = {
            "step": trainer.step,
            "total_steps": config.run.total_steps,
            "seed": config.run.seed,
            "evaluation_seed": config.evaluation.seed,
            "prompt_order_hash": order_hash(
                [prompt.text for prompt in trainer.prompts], config.run.seed
            ),
            **_left_out(trainer, texts["train"]),
            "dtype": config.export.dtype,
            "rewards": fingerprints,
            "baseline": trainer.objective.baseline,
        }
        record = Completion(
            kind="member",
            config_hash=identity_hash(to_plain(config)),
            files={POLICY_FILE: hash_file(output)},
            details=details,
            code_version=code_version(),
            versions=package_versions(),
        )
        # Last: the merge reads policy.nemo only if this record exists.
        write_completion(directory, record)
    torch.distributed.barrier()


def _left_out(trainer: WarpReinforceTrainer, lines: list[PromptLine]) -> dict[str, int]:
    """How many prompts were too long to be trained on, where there are any."""
    dropped = len(lines) - len(trainer.prompts)
    return {"prompts_dropped": dropped} if dropped else {}


def _resume(config: MemberConfig, policy: Policy, anchor: EmaAnchor | None) -> dict[str, Any]:
    directory = Path(config.run.directory) / "checkpoints"
    checkpoints = training_checkpoint.completed_checkpoints(directory)
    if not checkpoints:
        return {"step": 0, "evaluated": False, "rewards": None}
    newest = _newest_intact(checkpoints)
    state = training_checkpoint.read_trainer_state(newest)
    training_checkpoint.load(newest, policy.model, anchor)
    return state


def _newest_intact(checkpoints: list[Path]) -> Path:
    """The newest checkpoint whose bytes are as they were written; damaged ones are moved aside.

    Raises:
        RecordError: every checkpoint is damaged. All stay where they are: with none there, the
            next attempt would begin at step 0 without a word.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints):
        damage = damage_of(checkpoint)
        if damage is None:
            _move_aside(damaged, checkpoint)
            return checkpoint
        damaged[checkpoint] = damage
    raise RecordError(
        f"{damaged[checkpoints[-1]]}, and there is no older one that is intact; remove "
        f"{checkpoints[0].parent} to start the member again"
    )


def _move_aside(damaged: dict[Path, str], intact: Path) -> None:
    for checkpoint, damage in damaged.items():
        logging.warning(f"{damage}; going on from {intact.name}")
        if torch.distributed.get_rank() == 0:
            # Renamed and not removed: the damaged file may be needed to find out what happened on
            # the disk.
            checkpoint.rename(checkpoint.with_name(f"damaged_{checkpoint.name}"))
    torch.distributed.barrier()


def _tokenize(config: MemberConfig, model: Any, name: str, lines: list[PromptLine]) -> list[Prompt]:
    rules = Rules.of(config.prompts, max_prompt_tokens(config, config.init))
    file, needed = Path(getattr(config.prompts, name)), 1
    if name == "heldout":
        needed = config.evaluation.num_prompts
    encode = encoder(model.prompt_encoder(), model.tokenizer, config.prompts.add_bos)
    prompts = tokenize(lines, encode, rules, file, needed)
    for line in describe(prompts, len(lines), model.tokenizer, file):
        logging.info(line)
    if name == "train" and (warning := lacking_bos(prompts, model.tokenizer)):
        logging.warning(warning)
    return prompts


def _open_log(config: MemberConfig, step: int) -> MetricsLog | SilentLog:
    if torch.distributed.get_rank() != 0:
        return SilentLog()
    directory = Path(config.run.directory)
    plain = to_plain(config)
    write_json_atomically(
        directory / "provenance.json",
        {"config": plain, "code_version": code_version(), "versions": package_versions(),
         "slurm_job_id": os.environ.get("SLURM_JOB_ID"), "resumed_at_step": step},
    )  # fmt: skip
    return MetricsLog(directory, config.loggers, plain, step, config.run.name)


def _announce(trainer: WarpReinforceTrainer, weights: dict[str, ShardedWeights]) -> None:
    """What this run does, in the log: estimator, baseline, reductions, memory."""
    algorithm = trainer.config.algorithm
    logging.info(describe_memory(weights))
    for line in describe_footprint(trainer.model, to_plain(trainer.config)):
        logging.warning(line) if NO_ROOM in line else logging.info(line)
    logging.info(
        f"reward - {algorithm.kl_coefficient} * KL to {algorithm.anchor} anchor; KL estimator "
        f"{algorithm.kl_estimator}, {algorithm.kl_reduction} over the response; baseline "
        f"{trainer.objective.baseline}; policy loss {algorithm.policy_reduction}; "
        f"log-probabilities at temperature {algorithm.log_prob_temperature}, sampling at "
        f"{trainer.config.rollout.temperature}"
    )
    logging.info(f"starting at step {trainer.step} of {trainer.config.run.total_steps}")
