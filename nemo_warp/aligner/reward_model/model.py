"""A NeMo reward model that scores texts, on all its ranks. Import after `compat.activate`."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
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
from nemo_warp.aligner.reward_model.template import ChatTemplate, special_tokens
from nemo_warp.rewards.errors import RewardError
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
    """Scores on all ranks: rank 0 calls `texts` and `tokens`, the others are in `follow` meanwhile.

    Args:
        model: see `load_reward_model`. Collective: every rank makes one.
        template: source of the chat template that its texts are made with; None: they are prompt
            and response, one after the other.
    """

    def __init__(self, model: Any, template: str | None = None):
        self.broken = threading.Event()  # set when the ranks may no longer be in step
        self.at_a_time = (
            model.forward_micro_batch_size * parallel_state.get_data_parallel_world_size()
        )
        self._model = model
        self._max_tokens = model.cfg.encoder_seq_length
        self._append_eos = bool(model.cfg.get("data", {}).get("append_eod", False))
        self._template = None
        if template is not None:
            self._template = ChatTemplate(template, special_tokens(model.tokenizer))
        self._lock = threading.Lock()  # texts and tokens come from different threads
        self._stopped = False
        # Gloo, not the default group: on NCCL a rank that waits long for a command is killed.
        self._commands = torch.distributed.new_group(backend="gloo", timeout=_IDLE)

    @property
    def score(self) -> Callable[..., list[float | Exception]]:
        """A callable of lists, for `nemo_warp.rewards.scoring`."""
        return self._texts if self._template is None else self._conversations

    def infer(self, tokens: np.ndarray, sequence_lengths: np.ndarray) -> dict[str, np.ndarray]:
        """Tokens of the protocol of `nemo_warp.rewards.triton`.

        A sequence that is empty or longer than the model's context comes back as NaN.
        """
        lengths = sequence_lengths[:, 0].tolist()
        # NeMo-Aligner's own client sends padded tokens with their lengths.
        rows = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
        scores = self._sequences(rows)
        reasons = [str(score) if isinstance(score, Exception) else "" for score in scores]
        values = [np.nan if isinstance(score, Exception) else score for score in scores]
        return answer(np.array(values, np.float32), reasons)

    def _texts(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float | Exception]:
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        return self._sequences([self._encode(text) for text in texts])

    def _conversations(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        messages: Sequence[Sequence[Mapping[str, str]]],
    ) -> list[float | Exception]:
        """The text is made anew: the prompt's holds the marks of the policy's family."""
        assert self._template is not None
        made: list[list[int] | Exception] = []
        for response, talk in zip(responses, messages, strict=True):
            try:
                made.append(self._encode(self._template.text(talk, response)))
            except ValueError as error:
                made.append(error)
        return self._sequences(made)

    def _sequences(self, sequences: Sequence[list[int] | Exception]) -> list[float | Exception]:
        """Scores of what can be scored, and why not of the others."""
        scores: list[float | Exception] = []
        good: list[list[int]] = []
        for one in sequences:
            problem = one if isinstance(one, Exception) else ValueError(self._refusal(one))
            scores.append(problem)
            if not isinstance(one, Exception) and not str(problem):
                good.append(one)
        found = iter(self._score(good).tolist() if good else [])
        return [_finite(next(found)) if not str(score) else score for score in scores]

    def follow(self) -> None:
        """Take part in every `infer` of rank 0, until its `stop`."""
        while self._broadcast(_Command.STOP) == _Command.SCORE:
            self._run(None)

    def stop(self) -> None:
        """Release the ranks in `follow`. Called by rank 0; a broken job its launcher must end."""
        with self._lock:
            self._stopped = True
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
        with self._lock:
            if self._stopped or self.broken.is_set():
                raise RewardError("the reward model can answer no more")
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


def _finite(score: float) -> float | Exception:
    if math.isfinite(score):
        return score
    return ValueError(f"the reward model returned {score}")
