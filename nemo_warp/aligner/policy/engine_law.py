"""How far the law that TensorRT-LLM samples from is from the one that is scored and trained.

Both are the policy's, tempered; they differ by the engine's kernels, precision and fusions, and a
difference is a bias of the gradient that nothing else shows. NeMo-Aligner does not ask the engine
for log-probabilities (utils/trt_llm.py l.165), so its decoder is asked here.

Read in TensorRT-LLM's source (runtime/model_runner_cpp.py, generation.py); no engine was at hand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class AskedDecoder:
    """TensorRT-LLM's decoder, with the log-probabilities of what it generated last.

    Attributes:
        log_probs: [b, 1, L] on the ranks that the decoder answers, else None.
        width: tokens in a row of its output, there.
    """

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.log_probs: Tensor | None = None
        self.width = 0

    def generate(self, *, sampling_config: Any, **arguments: Any) -> Any:
        """As the decoder's own.

        Raises:
            RuntimeError: it has no log-probabilities.
        """
        sampling_config.update(output_log_probs=True)
        output = self._decoder.generate(sampling_config=sampling_config, **arguments)
        self.log_probs = None
        if output:
            if output.get("log_probs") is None:
                raise RuntimeError(
                    "TensorRT-LLM gave no log-probabilities of what it sampled, so that its law "
                    "cannot be compared with the model's; alarms.sampler_gap=null goes on without"
                )
            self.log_probs, self.width = output["log_probs"], output["output_ids"].size(-1)
        return output

    def placed(self, output: dict[str, Tensor]) -> Tensor | None:
        """The log-probabilities as in `Responses.sampler`, where the decoder answered.

        Args:
            output: of NeMo-Aligner's `infer`.
        """
        if self.log_probs is None:
            return None
        lengths = output["prompt_lengths"], output["response_lengths"]
        positions = output["response_tokens"].size(1) - 1
        given = self.log_probs.squeeze(1).to(output["response_tokens"].device)
        return by_position(given, *lengths, positions, self.width)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


def ask(worker: Any) -> AskedDecoder:
    """Take the place of the decoder in NeMo's ``tensorrt_llm_worker_context``; once per engine."""
    if not isinstance(worker.decoder, AskedDecoder):
        worker.decoder = AskedDecoder(worker.decoder)
    return worker.decoder


def by_position(
    log_probs: Tensor, prompt_lengths: Tensor, lengths: Tensor, width: int, whole: int
) -> Tensor:
    """An engine's log-probabilities in the place of the tokens they are of, float32 [b, width].

    Args:
        log_probs: [b, L]. L is ``whole`` where the engine counts positions from the beginning of
            the prompt (Python's session), else it counts generated tokens (the C++ one).
        prompt_lengths, lengths: int64 [b]; ``lengths`` counts prompt and response.
        width: S-1; position j is of token j+1. 0 outside of the response.
        whole: tokens in a row of the engine's output.
    """
    token = torch.arange(1, width + 1, device=log_probs.device)
    inside = (token >= prompt_lengths[:, None]) & (token < lengths[:, None])
    place = token.expand(len(log_probs), -1)
    if log_probs.size(1) != whole:
        place = place - prompt_lengths[:, None]
    found = log_probs.float().gather(1, place.clamp(0, log_probs.size(1) - 1))
    return torch.where(inside, found, 0.0)


def gap(sampler: Tensor, scorer: Tensor, mask: Tensor) -> Tensor:
    """Sum of |difference| over response tokens, their number, and the largest, float32 [3].

    Args:
        sampler, scorer: [b, S-1], nats.
        mask: [b, S-1] of response positions.
    """
    difference = torch.where(mask > 0, (sampler - scorer).abs(), 0.0)
    return torch.stack([difference.sum(), mask.sum(), difference.max()])
