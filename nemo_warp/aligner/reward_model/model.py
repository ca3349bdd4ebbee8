"""A NeMo reward model that scores texts, on all its ranks. Import after `compat.activate`."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from nemo_aligner.models.nlp.gpt.reward_model_classes import (
    REWARD_MODEL_CLASS_DICT,
    RewardModelType,
)
from nemo_aligner.utils.distributed import run_distributed_inference
from nemo_aligner.utils.server_utils import (
    calculate_inference_batch_padding_multiple,
    pad_batch_and_strip_sequence,
)
from nemo_aligner.utils.train_script_utils import init_distributed
from nemo_aligner.utils.utils import load_from_nemo
from omegaconf import DictConfig, OmegaConf

from nemo_warp.aligner.entry.job import job_size
from nemo_warp.aligner.policy.stored_config import stored_config
from nemo_warp.aligner.reward_model.scaling import scale_as_trained
from nemo_warp.rewards.triton import answer, log

_PAD_MULTIPLE = 64  # tokens; few distinct shapes, and a multiple of any tensor-parallel size
_IDLE = timedelta(days=365)  # a server may wait for its next request for any time


class _Command(IntEnum):
    SCORE = 0
    STOP = 1


@dataclass(frozen=True)
class RewardModelSetup:
    """How to run a reward model.

    Attributes:
        path: the ``.nemo``, a tar or a directory.
        tensor, pipeline: parallel sizes; the remaining ranks are data parallel.
        micro_batch_size: sequences per forward pass.
        precision: ``32`` or ``bf16``.
    """

    path: Path
    tensor: int = 1
    pipeline: int = 1
    micro_batch_size: int = 8
    precision: str = "32"

    def tree(self) -> DictConfig:
        """NeMo's ``trainer`` and ``model`` sections, for the ranks of this job."""
        ranks, nodes = job_size()
        data_parallel = ranks // (self.tensor * self.pipeline)
        overrides = {
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipeline,
            "virtual_pipeline_model_parallel_size": None,
            "micro_batch_size": self.micro_batch_size,
            "global_batch_size": self.micro_batch_size * data_parallel,
            "forward_micro_batch_size": self.micro_batch_size,
            "precision": self.precision,
            "megatron_amp_O2": self.precision == "bf16",
            "sequence_parallel": False,
            # NeMo reads these keys in inference as well, and recomputation without a backward pass
            # is waste.
            "activations_checkpoint_granularity": None,
            "activations_checkpoint_method": None,
            "regression": {"merge_attributes": True},
        }
        trainer = {
            "num_nodes": nodes,
            "devices": ranks // nodes,
            "accelerator": "auto",
            "precision": self.precision,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
        }
        tree = OmegaConf.create({"trainer": trainer, "model": {}})
        tree.model = stored_config(str(self.path), OmegaConf.create(overrides))
        return tree


def load_reward_model(setup: RewardModelSetup) -> Any:
    """The model, ready for ``model.infer``. Collective over all ranks."""
    tree = setup.tree()
    trainer = MegatronTrainerBuilder(tree).create_trainer()
    kind = RewardModelType(tree.model.get("reward_model_type", "binary_ranking"))
    model = load_from_nemo(
        REWARD_MODEL_CLASS_DICT[kind],
        tree.model,
        trainer,
        strict=True,
        restore_path=str(setup.path),
    )
    # No gradients: Megatron would allocate buffers for them.
    model.freeze()
    init_distributed(trainer, model, tree.model.get("transformer_engine", False))
    scale_as_trained(model)
    model = model.cuda()
    model.prepare_for_inference()
    return model


class RewardModelScorer:
    """Scores batches on all ranks: rank 0 calls `infer`, the others are in `follow` meanwhile.

    Args:
        model: see `load_reward_model`. Collective: every rank makes one.
    """

    def __init__(self, model: Any):
        self.broken = threading.Event()  # set when the ranks may no longer be in step
        self._model = model
        self._max_tokens = model.cfg.encoder_seq_length
        self._append_eos = bool(model.cfg.get("data", {}).get("append_eod", False))
        # Gloo, not the default group: on NCCL a rank that waits long for a command is killed.
        self._commands = torch.distributed.new_group(backend="gloo", timeout=_IDLE)

    def infer(
        self,
        sentences: np.ndarray | None = None,
        tokens: np.ndarray | None = None,
        sequence_lengths: np.ndarray | None = None,
        prompt_lengths: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """The protocol of `nemo_warp.rewards.triton`; ``prompt_lengths`` make no difference here.

        A sequence that is empty or longer than the model's context comes back as NaN.
        """
        if sentences is not None:
            sequences = [self._encode(text.decode()) for text in sentences[:, 0]]
        else:
            assert tokens is not None and sequence_lengths is not None, "one of the two forms"
            lengths = sequence_lengths[:, 0].tolist()
            # NeMo-Aligner's own client sends padded tokens with their lengths.
            sequences = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
        reasons = [self._refusal(sequence) for sequence in sequences]
        good = [place for place, reason in enumerate(reasons) if not reason]
        scores = np.full(len(sequences), np.nan, np.float32)
        if good:
            scores[good] = self._score([sequences[place] for place in good])
        for place in good:
            if not math.isfinite(scores[place]):
                reasons[place] = f"the reward model returned {scores[place]}"
        return answer(np.where(np.isfinite(scores), scores, np.nan), reasons)

    def follow(self) -> None:
        """Take part in every `infer` of rank 0, until its `stop`."""
        while self._broadcast(_Command.STOP) == _Command.SCORE:
            self._run(None)

    def stop(self) -> None:
        """Release the ranks in `follow`. Called by rank 0; a broken job its launcher must end."""
        if not self.broken.is_set():
            self._broadcast(_Command.STOP)

    def _encode(self, text: str) -> list[int]:
        """As NeMo-Aligner's RewardModelDataset did for training (data/nlp/datasets.py:234)."""
        ids = self._model.tokenizer.text_to_ids(text)
        return [*ids, self._model.tokenizer.eos_id] if ids and self._append_eos else ids

    def _refusal(self, sequence: list[int]) -> str:
        if not sequence:
            return "the text is empty"
        if len(sequence) > self._max_tokens:
            return f"the text has {len(sequence)} tokens, the reward model reads {self._max_tokens}"
        return ""

    def _score(self, sequences: list[list[int]]) -> np.ndarray:
        """Scores float32 [B] of sequences that fit; called by rank 0."""
        longest = math.ceil(max(map(len, sequences)) / _PAD_MULTIPLE) * _PAD_MULTIPLE
        width = min(longest, self._max_tokens)
        eos = self._model.tokenizer.eos_id
        tokens = torch.tensor([row + [eos] * (width - len(row)) for row in sequences])
        lengths = torch.tensor([[len(row)] for row in sequences])
        multiple = calculate_inference_batch_padding_multiple(
            len(sequences), self._model.forward_micro_batch_size
        )
        inputs, _, _ = pad_batch_and_strip_sequence(tokens, lengths, multiple)
        try:
            # First: the other ranks wait in `follow`, and enter the same forward pass.
            self._broadcast(_Command.SCORE)
            return self._run(inputs)[: len(sequences), 0]
        except Exception:
            log.exception("a forward pass failed")
            self.broken.set()
            raise

    def _run(self, inputs: dict[str, torch.Tensor] | None) -> np.ndarray:
        with torch.inference_mode():
            return run_distributed_inference(inputs=inputs, infer_fn=self._model.infer)

    def _broadcast(self, command: _Command) -> int:
        message = torch.tensor([command])
        torch.distributed.broadcast(message, 0, group=self._commands)
        return int(message)
