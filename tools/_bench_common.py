"""What both sides of bench_member.py share: the task, the clock, model settings and reward."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_warp.config import CONF_DIRECTORY, load_config

SPECIAL_TOKENS = 4
KL_COEFFICIENT = 0.1


@dataclass(frozen=True)
class Size:
    """What one step has to do: ``prompts`` times ``samples`` responses of exactly ``response``."""

    vocabulary: int
    prompts: int
    samples: int
    prompt: int
    response: int
    micro_batch: int
    repetitions: int
    also: tuple[str, ...] = ()

    @property
    def batch(self) -> int:
        return self.prompts * self.samples


def write_tokenizer(directory: Path, vocabulary: int) -> Path:
    """A SentencePiece model of exactly ``vocabulary`` tokens, from made-up words."""
    import tiny_models

    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), (vocabulary, 6))
    return tiny_models.write_tokenizer(directory, vocabulary, map("".join, letters))


class Stopwatch:
    """Wall and CPU seconds of this process by name; takes the place of a trainer's `Timings`."""

    def __init__(self) -> None:
        self._seconds: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        torch.cuda.synchronize()
        started = np.array([time.perf_counter(), time.process_time()])
        yield
        torch.cuda.synchronize()
        now = np.array([time.perf_counter(), time.process_time()])
        self._seconds[name] = self._seconds[name] + (now - started)

    def take(self) -> dict[str, list[float]]:
        """[wall, CPU] by name since the last call."""
        taken, self._seconds = self._seconds, defaultdict(lambda: np.zeros(2))
        return {name: seconds.tolist() for name, seconds in taken.items()}


def member_config(checkpoint: Path, world_size: int, size: Size) -> Any:
    base = {
        "run": {"name": "bench", "directory": str(checkpoint.parent), "total_steps": 10**6},
        "init": str(checkpoint),
        "prompts": {"train": "unused", "heldout": "unused"},
        "rollout": {
            "prompts_per_step": size.prompts,
            "samples_per_prompt": size.samples,
            "max_response_tokens": size.response,
            "micro_batch_size": size.micro_batch,
        },
        "algorithm": {"kl_coefficient": KL_COEFFICIENT},
        "rewards": [{"name": "in_process", "weight": 1.0, "endpoint": "unused"}],
        "optim": {"name": "adamw", "lr": 1e-6, "warmup_steps": 1},
        "trainer": {"devices": world_size, "accelerator": "auto", "precision": "32"},
        "model": {
            "tensor_model_parallel_size": 1,
            "sequence_parallel": False,
            "megatron_amp_O2": False,
            # no early end: every response has the same length on both sides
            "extra": {"reinforce": {"length_params": {"min_length": size.response}}},
        },
    }
    return load_config(CONF_DIRECTORY / "member.yaml", base, list(size.also))


def prompt_tokens(size: Size, rows: int = 4096) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (rows, size.prompt)
    return torch.randint(SPECIAL_TOKENS, size.vocabulary, shape, generator=generator)


def check_length(length: float, size: Size) -> None:
    if length != size.response:
        raise AssertionError(f"responses of {length} tokens, expected {size.response}: not paired")


def score(texts: list[str]) -> np.ndarray:
    """An in-process reward for both sides: the share of vowels."""
    return np.array([sum(c in "aeiou" for c in text) / (len(text) or 1) for text in texts])
