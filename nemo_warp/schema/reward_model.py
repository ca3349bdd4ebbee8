"""``conf/reward_model.yaml``: training a reward model on pairs."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_warp.schema.key import REQUIRED, key, section
from nemo_warp.schema.shared import Model, Optim, Trainer


@dataclass
class Pairs:
    """``pairs``: NeMo-Aligner's format."""

    train: str = key(REQUIRED, "JSON lines; of each two, the chosen text and the rejected one")
    validation: str = key(REQUIRED, "the same, held out")


@dataclass
class RewardModelOptim(Optim):
    """``optim`` with a reward model's defaults."""

    name: str = key("distributed_fused_adam", "NeMo's name; adamw on CPU", nonempty=True)
    lr: float = key(9e-6, "learning rate after the warm-up", above=0)
    betas: list[float] = key([0.9, 0.98], "Adam's decay rates", low=0, high=1)
    weight_decay: float = key(0.1, "decoupled weight decay", low=0)
    warmup_steps: int = key(10, "linear warm-up", unit="steps", low=0)


@dataclass
class HeadedModel(Model):
    """``model`` with the reward head; no anchor, no reference and no KV cache beside it."""

    tensor_model_parallel_size: int = key(1, "TP", low=1)
    sequence_parallel: bool = key(False, "share activations of norms over TP")
    force_head_dtype: str = key("float32", "of the reward head", nonempty=True)


@dataclass
class RewardModel:
    """A reward model's training."""

    init: str = key(REQUIRED, ".nemo of the language model to start from")
    output: str = key(REQUIRED, ".nemo to write; metrics go next to it, with the suffix .json")
    seed: int = key(1, "order of the pairs, initial reward head", low=0)
    pairs: Pairs = section(Pairs)
    steps: int = key(1000, "optimizer steps", low=1)
    global_batch_size: int = key(64, "pairs per step", low=1)
    validation_interval: int = key(100, "between validations", unit="steps", low=1)
    max_tokens: int | None = key(
        None, "pairs with a longer text are left out; null is the model's context",
        unit="tokens", low=1,
    )  # fmt: skip
    optim: RewardModelOptim = section(RewardModelOptim)
    trainer: Trainer = section(Trainer)
    model: HeadedModel = section(HeadedModel)
