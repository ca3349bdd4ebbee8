"""One optimizer step: gradients, their norm, and the update, unless a gradient is not finite.

NeMo-Aligner's own (algorithms/reinforce.py l.404, `run_training`) in the same order, with one
difference: the norm is looked at before the update, so that a gradient that is not finite costs a
step and not the weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from nemo.utils import logging
from nemo_aligner.utils.train_utils import clip_gradients
from torch import Tensor


class Updater:
    """Applies batches to a policy.

    Args:
        model, optimizer, scheduler: see `nemo_warp.aligner.policy.build.Policy`.
        clip: largest gradient norm; 0 does not clip, but the norm is measured all the same.
        max_skipped: updates in a row that may be left out before training stops.
    """

    def __init__(
        self, model: Any, optimizer: Any, scheduler: Any, clip: float, max_skipped: int
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.clip = clip or math.inf
        self.max_skipped = max_skipped
        self._skipped = 0

    def step(self, batch: dict[str, Tensor]) -> tuple[bool, dict[str, float]]:
        """One update from this rank's rows of a batch. Collective.

        Returns:
            Whether the weights were updated, and ``loss``, ``grad_norm``, ``lr``; if not,
            ``skipped`` counts the updates in a row that were left out.

        Raises:
            FloatingPointError: ``max_skipped`` gradients in a row were not finite, or a gradient is
                exactly 0 although samples have weight: the model's gradients are not collected.
        """
        # A batch may rightly have no gradient: all rewards equal, or all failed.
        weighs = bool(batch["weights"].count_nonzero())
        self.model.prepare_for_training()
        self.optimizer.zero_grad()
        self.model.prepare_for_training_step()
        loss, metrics = self.model.get_loss_and_metrics(batch=batch, forward_only=False)
        self.model.finish_training_step()
        norm = self._norm()
        metrics |= {"loss": loss, "grad_norm": norm, "lr": self.optimizer.param_groups[0]["lr"]}
        updated = self._usable(loss, norm, weighs)
        if updated:
            self.optimizer.step()
        else:
            metrics["skipped"] = self._skipped
        self.scheduler.step()  # the learning rate is a function of the step, skipped or not
        self.model.finish_training()
        self.optimizer.zero_grad()
        return updated, metrics

    def _norm(self) -> float:
        """L2 norm of the whole gradient, clipped afterwards; the same on all ranks."""
        if self.model.use_mcore_dist_optim:
            # Megatron's optimizer clips inside its step, where it is too late to look.
            inner = self.optimizer.mcore_optimizer
            # Copies the main gradients into the optimizer's shards; its step would do it again, to
            # no effect.
            inner.prepare_grads()
            return float(inner.get_grad_norm())
        norm = clip_gradients(self.model, self.clip)
        return norm.item() if torch.is_tensor(norm) else float(norm)

    def _usable(self, loss: float, norm: float, weighs: bool) -> bool:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._skipped += 1
            if self._skipped >= self.max_skipped:
                raise FloatingPointError(
                    f"{self._skipped} updates in a row have no finite gradient (loss {loss}, norm "
                    f"{norm}); the weights are those of before"
                )
            logging.error(f"loss {loss}, gradient norm {norm}: this update is left out")
            return False
        self._skipped = 0
        # Seen when a parameter's dtype was changed in place: torch drops its gradient accumulator,
        # and with it the hooks that collect main gradients.
        if norm == 0.0 and _anywhere(weighs):
            raise FloatingPointError(
                "the gradient is exactly 0 although samples have weight: the optimizer does not "
                "see the model's gradients"
            )
        return True


def _anywhere(flag: bool) -> bool:
    """Whether the flag is set on any rank. Collective."""
    found = torch.tensor(float(flag), device=torch.cuda.current_device())
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found.item())
