"""The loop of one member: NeMo-Aligner's REINFORCE with WARP's estimator and stopping rules.

One step: generate with the policy, score, log-probabilities of policy and anchor, KL-regularised
rewards and baselines on the global batch, one optimizer step, one EMA update of the anchor
(WARP, Algorithm 1, lines 5-10). The optimizer step is upstream's, see `update`.
"""

from __future__ import annotations

import gc
import time
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from nemo.utils import logging
from torch import Tensor
from tqdm import tqdm

from nemo_warp.aligner.entry.prompts import Prompt
from nemo_warp.aligner.evaluation.evaluator import Evaluator
from nemo_warp.aligner.member.objective import Batch, Objective
from nemo_warp.aligner.member.profile import ProfileWindow
from nemo_warp.aligner.member.stopping import StopRequest
from nemo_warp.aligner.member.throughput import Throughput
from nemo_warp.aligner.member.update import Updater
from nemo_warp.aligner.policy import device
from nemo_warp.aligner.sampling.rewards import RewardSource
from nemo_warp.aligner.sampling.rollouts import Rollouts, Sampled, generate, local_rows, shown
from nemo_warp.aligner.sampling.timings import Timings
from nemo_warp.aligner.weights import training_checkpoint
from nemo_warp.aligner.weights.anchor import EmaAnchor
from nemo_warp.aligner.weights.sharded import ShardedWeights
from nemo_warp.core.seeds import prompt_indices
from nemo_warp.evidence.responses import responses_file
from nemo_warp.progress import progress
from nemo_warp.records import RecordError
from nemo_warp.rewards import RewardFailureRateError
from nemo_warp.schema.member import Member


class Outcome(Enum):
    """How `WarpReinforceTrainer.fit` ended; everything but DONE can be resumed, except KL_LIMIT."""

    DONE = "step T is reached"
    STOPPED = "stopped early, saved"
    REWARDS_FAILED = "too many rewards failed, saved"
    KL_LIMIT = "KL to SFT passed its limit, saved"


class WarpReinforceTrainer:
    """Trains one member.

    Args:
        config: the member's configuration (conf/member.yaml).
        anchor: the EMA anchor, moved after each optimizer step; None for a static or no anchor.
        reference: weights of the KL reference: the anchor's, the SFT policy's, or None.
        step: optimizer steps already done.
        evaluated: whether nothing is to be measured at that step (any more).
    """

    def __init__(
        self,
        config: Member,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        prompts: list[Prompt],
        rewards: RewardSource,
        anchor: EmaAnchor | None,
        reference: ShardedWeights | None,
        evaluator: Evaluator,
        log: Any,
        stop: StopRequest,
        step: int = 0,
        evaluated: bool = False,
    ) -> None:
        self.config = config
        self.model = model
        self.updater = Updater(
            model,
            optimizer,
            scheduler,
            config.trainer.gradient_clip_val,
            config.run.max_skipped_updates,
        )
        self.prompts = prompts
        self.rewards = rewards
        self.anchor = anchor
        self.evaluator = evaluator
        self.log = log
        self.stop = stop
        self.step = step
        self.evaluated = evaluated
        self.checkpoints = Path(config.run.directory) / "checkpoints"
        # Inside `inference` NeMo says that sequence parallelism is off.
        self.sequence_multiple = _sequence_multiple(model)
        self.timings = Timings()
        self.throughput = Throughput.of_job(model)
        self.profile = ProfileWindow(
            Path(config.run.directory), config.profile.first_step, config.profile.num_steps
        )
        self.objective = Objective(config, model, reference, self.timings)

    def fit(self) -> Outcome:
        """Train to step T, or until told to stop; returns how it ended. Collective."""
        run = self.config.run
        # The garbage collections of every step need not look at what set-up made and NeMo's
        # modules: 0.3 to 0.6 s a step, half the time of a tiny one.
        gc.collect()
        gc.freeze()
        bar = progress(
            total=run.total_steps,
            initial=self.step,
            desc=run.name,
            unit="step",
            disable=torch.distributed.get_rank() != 0,
        )
        try:
            outcome = self._fit(bar)
        except RewardFailureRateError as error:
            logging.error(f"step {self.step}: {error}")
            outcome = Outcome.REWARDS_FAILED
        self.profile.finish()
        if outcome is not Outcome.DONE:
            self.save()
            logging.warning(f"{outcome.value} at step {self.step}")
        bar.close()
        return outcome

    def _fit(self, bar: tqdm) -> Outcome:
        run = self.config.run
        while True:
            # Evaluated before the save: the checkpoint then knows that this step was measured, and
            # a resumed member does not measure it twice.
            if not self.evaluated and self._evaluate_and_check_limit():
                return Outcome.KL_LIMIT
            if self.step and self._due(run.save_interval):
                self.save()
            if self.step == run.total_steps:
                return Outcome.DONE
            # After evaluation and save of this step, so that a stop costs nothing that was done.
            if reason := self.stop.agreed():
                logging.warning(reason)
                return Outcome.STOPPED
            started = time.monotonic()
            with self.profile.step(self.step):
                metrics = self.train_step()
            self.stop.step_took(time.monotonic() - started)
            self.evaluated = not self._due(run.eval_interval)
            self._report(metrics, bar)

    def train_step(self) -> dict[str, Any]:
        """One rollout batch and its optimizer steps.

        Raises:
            RewardFailureRateError: on every rank, before anything was changed.
            FloatingPointError: see `Updater.step`.
        """
        gc.collect()  # cheap: `fit` has frozen what was there before
        if self.model.use_trtllm_generation or device.nearly_full():
            torch.cuda.empty_cache()  # an engine allocates by itself; else torch reuses its own
        with self.model.inference():
            with self.timings.measure("rollout"):
                sampled = self.generate_rollouts()
            scores = self.objective.score(sampled.responses)
            with self.timings.measure("reward_wait"):
                rollouts = sampled.scored()
            # Before anything is trained: a batch without rewards must leave no trace in weights or
            # order.
            self.rewards.check(rollouts.failed)
            self.throughput.count(rollouts)
            batch = self.objective.batch(rollouts, scores)
        self._check_start(batch)
        with self.timings.measure("train"):
            _, metrics = self.run_training(self.optimizer_batches(batch.data))
        return batch.metrics | metrics | self._told(rollouts)

    @torch.no_grad()
    def generate_rollouts(self) -> Sampled:
        """Responses of the present policy to the next prompts of the member's order.

        Their rewards are under way.
        """
        run, rollout = self.config.run, self.config.rollout
        # From the step alone: nothing about the data has to be in the checkpoint. (NeMo-Aligner
        # counts responses where its sampler counts prompts, algorithms/reinforce.py l.390.)
        number = self.step // rollout.updates_per_rollout
        first = number * rollout.prompts_per_step
        indices = prompt_indices(run.seed, first, rollout.prompts_per_step, len(self.prompts))
        prompts = [self.prompts[i] for i in indices for _ in range(rollout.samples_per_prompt)]
        return generate(
            self.model,
            prompts,
            self.rewards,
            rollout.micro_batch_size,
            seed_parts=(run.seed, "rollout", number),
            pad_multiple=self.sequence_multiple,
        )

    def optimizer_batches(self, data: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """This rank's rows of each optimizer step's part of the batch.

        The parts are equal and the weights are normalised by the whole batch, hence the factor.
        """
        parts = self.config.rollout.updates_per_rollout
        # Equal parts in order: groups of a prompt's samples stay together.
        chunks = zip(*(tensor.chunk(parts) for tensor in data.values()), strict=True)
        batches = []
        for chunk in chunks:
            rows = local_rows(len(chunk[0]))
            batch = {key: value[rows] for key, value in zip(data, chunk, strict=True)}
            scaled = [key for key in ("weights", "kl_weights") if key in batch]
            batches.append(batch | {key: batch[key] * parts for key in scaled})
        return batches

    def run_training(self, batches: list[dict[str, Tensor]]) -> tuple[float, dict[str, float]]:
        """An optimizer step for each batch, each followed by one step of the anchor.

        A step whose gradient is not finite leaves weights, moments and anchor as they were.
        """
        metrics: dict[str, float] = {}
        clipped = 0
        for batch in batches:
            updated, metrics = self.updater.step(batch)
            clipped += metrics["grad_norm"] > self.updater.clip
            if updated and self.anchor is not None:
                with self.timings.measure("ema_update"):
                    self.anchor.update_()
            # Counts skipped updates as well: the step is what data, seeds and learning rate depend
            # on.
            self.step += 1
            metrics["optim_step"] = self.step - 1
        metrics["clip_share"] = clipped / len(batches)
        return metrics["loss"], metrics

    def save(self) -> None:
        """Write a training checkpoint of this step boundary. Collective."""
        # Saving wants the optimizer's states on the device.
        self.model.prepare_for_training()
        state = {
            "step": self.step,
            "evaluated": self.evaluated,
            "rewards": self.rewards.fingerprints,
        }
        with self.timings.measure("save"):
            training_checkpoint.save(
                self.checkpoints, self.model, self.anchor, state, self.config.run.keep_checkpoints
            )
        self.model.finish_training()

    def _check_start(self, batch: Batch) -> None:
        """At step 0 the EMA anchor is the policy. Collective."""
        if self.step != 0 or self.anchor is None:
            return
        # Two bf16 forward passes of equal weights need not agree (kernels, all-reduce order), so
        # the weights are compared and the KL is only told.
        logging.info(f"KL to the anchor at step 0: at most {batch.kl.abs().max().item():.3g} nats")
        if not self.anchor.weights.equal_model():
            raise RecordError(
                "the anchor does not hold the policy's weights at step 0, bit for bit"
            )

    def _due(self, interval: int) -> bool:
        """At multiples of ``interval``, counted over updates, and at step T."""
        return self.step % interval == 0 or self.step == self.config.run.total_steps

    def _evaluate(self) -> dict[str, Any]:
        directory = Path(self.config.run.directory)
        with self.timings.measure("evaluation"):
            keep = responses_file(directory, "step", self.step)
            values = self.evaluator.evaluate(self.objective.reference, keep)
            self._evaluate_anchor(responses_file(directory, "anchor", self.step))
        if self.anchor is not None and self.anchor.flat is not None:
            values["anchor_flat"] = self.anchor.flat
        self.evaluated = True
        self.log.write("eval", self.step, values)
        return values

    def _evaluate_anchor(self, keep: Path) -> None:
        """The anchor as a policy of its own, where that is asked for (the paper's Figure 14)."""
        if self.anchor is None or not self.config.run.measure_anchor:
            return
        with self.anchor.weights.in_place():
            values = self.evaluator.evaluate(keep=keep)
        self.log.write("anchor", self.step, values)

    def _evaluate_and_check_limit(self) -> bool:
        limit = self.config.evaluation.kl_limit
        kl = self._evaluate()["kl_to_sft"]
        if limit is None or kl <= limit:
            return False
        self.evaluated = False  # so that a rerun measures, and stops, again
        logging.error(f"KL to SFT is {kl:.1f} nats at step {self.step}, above the limit of {limit}")
        return True

    def _told(self, rollouts: Rollouts) -> dict[str, Any]:
        """Each reward's own mean and, where an evaluation is due, a few responses."""
        told: dict[str, Any] = {"rewards": self.rewards.means(rollouts)}
        if deviations := self.rewards.deviations(rollouts):
            told["rewards_deviation"] = deviations
        if self._due(self.config.run.eval_interval):
            number = self.config.evaluation.num_samples_shown
            told["samples"] = shown(rollouts, number, self.model)
        return told

    def _report(self, metrics: dict[str, Any], bar: tqdm) -> None:
        self.log.write("train", self.step, metrics)
        self.log.write("timing", self.step, self.throughput.take(self.timings.take()))
        bar.set_postfix(
            reward=f"{metrics['reward']:.3f}", kl=f"{metrics.get('kl_to_anchor', 0):.2f}"
        )
        bar.update(self.step - bar.n)


def _sequence_multiple(model: Any) -> int:
    """What the sequence length must be a multiple of."""
    parallel = model.cfg.get("sequence_parallel", False)
    return model.cfg.tensor_model_parallel_size if parallel else 1
