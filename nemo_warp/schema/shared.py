"""Sections that several configurations have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_warp.schema.key import REQUIRED, key, section


@dataclass
class PromptRules:
    """Keys that ``prompts`` of a member and of an evaluation share."""

    max_tokens: int | None = key(
        None, "longest prompt, template and BOS included; null is what the context leaves room for",
        unit="tokens", low=1,
    )  # fmt: skip
    too_long: str = key("refuse", "what becomes of a longer one", choices=("refuse", "drop"))
    template: str | None = key(
        None, "text around every prompt, such as a chat template's; null is none",
        pattern=r"(?s).*\{prompt\}.*", pattern_help="with {prompt} in it",
    )  # fmt: skip
    add_bos: bool = key(
        False, "put the tokenizer's BOS before a prompt that does not begin with it"
    )


@dataclass
class TensorRT:
    """``rollout.trt_llm``: generation with TensorRT-LLM, in the NeMo container."""

    enable: bool = key(False, "generate with TensorRT-LLM (in the NeMo container)")
    model_type: str = key("llama", "TensorRT-LLM's name of the model family", nonempty=True)
    unload_engine_train: bool = key(False, "free the engine's memory while training")
    max_input_len: int | None = key(
        None, "longest prompt the engine takes; null: all that the model has room for",
        unit="tokens", low=1,
    )  # fmt: skip
    batch_size: int | None = key(
        None, "sequences the engine takes together; null: the larger micro batch of rollouts and "
        "evaluations", low=1,
    )  # fmt: skip
    reshard: bool = key(False, "build without pipeline stages, for engines at PP above 1")


@dataclass
class Rollout:
    """``rollout``: sampling responses."""

    prompts_per_step: int = key(128, "prompts per step", low=1, paper="section 4")
    samples_per_prompt: int = key(1, "k, responses per prompt", low=1, paper="section 4")
    updates_per_rollout: int = key(
        1, "optimizer steps per rollout batch; 1 is on-policy", low=1, paper="algorithm 1"
    )
    max_response_tokens: int = key(512, "longest response", unit="tokens", low=1)
    temperature: float = key(0.9, "of the distribution of samples", above=0, paper="section 4")
    top_k: int = key(0, "sample from the k most likely tokens only; 0 is all", low=0)
    top_p: float = key(1.0, "sample from the likeliest tokens of this mass", above=0, high=1)
    end_strings: list[str] = key([], "end a response, beside the model's own end tokens",
                                 pattern=r"(?s).+", pattern_help="that is not empty")  # fmt: skip
    micro_batch_size: int = key(8, "sequences generated together", low=1)
    forward_micro_batch_size: int = key(
        "${rollout.micro_batch_size}", "sequences scored together", low=1
    )
    forward_tokens: int | None = key(
        None, "sequences scored together hold up to so many, padding included, in place of "
        "forward_micro_batch_size", unit="tokens", low=1,
    )  # fmt: skip
    train_tokens: int | None = key(
        None, "sequences of a training micro batch hold up to so many, padding included, in place "
        "of model.micro_batch_size", unit="tokens", low=1,
    )  # fmt: skip
    trt_llm: TensorRT = section(TensorRT)


@dataclass
class Algorithm:
    """``algorithm``: the estimator and its KL reference (algorithm 1)."""

    anchor: str = key("ema", "KL reference", choices=("ema", "sft", "none"), paper="section 3.1")
    ema_update_rate: float = key(
        0.01, "mu, per optimizer step", low=0, high=1, paper="section 4, appendix D.2"
    )
    offload_anchor: bool = key(False, "keep the anchor in host memory")
    kl_coefficient: float = key(0.1, "beta", low=0, high=1e6, paper="section 4")
    kl_estimator: str = key(
        "log_ratio", "estimate of a token's KL",
        choices=("log_ratio", "absolute", "squared", "exponential", "top_k", "exact"),
        paper="algorithm 1, line 7",
    )  # fmt: skip
    kl_top_k: int = key(64, "likeliest tokens that top_k sums over", low=1)
    kl_reduction: str = key("sum", "over the response", choices=("sum", "mean"), paper="line 7")
    baseline: str = key(
        "leave_one_out", "what is subtracted from a reward",
        choices=("leave_one_out", "batch_mean", "none"),
    )  # fmt: skip
    policy_reduction: str = key(
        "sequence_sum", "how tokens' gradients add up",
        choices=("sequence_sum", "sequence_mean", "token_mean"), paper="algorithm 1, line 8",
    )  # fmt: skip
    log_prob_temperature: float = key(
        "${rollout.temperature}", "of log-probabilities in KL and gradient", above=0
    )
    importance_limit: float = key(
        2.0, "with updates_per_rollout above 1: largest weight of a response, its probability now "
        "over that when it was sampled", low=1,
    )  # fmt: skip
    exclude_truncated: bool = key(
        False, "responses cut at max_response_tokens: no baseline, no gradient"
    )


@dataclass
class Scaled:
    """A reward's scale: ``clip((score + shift) * scale)``, before its weight."""

    shift: float = key(0.0, "added to each score")
    scale: float = key(1.0, "factor of each score, after the shift", above=0)
    clip: list[float] | None = key(None, "[low, high], bounds of each score after both")
    standardize: str = key(
        "none", "over each training batch: take the mean off, or also divide by the deviation",
        choices=("none", "mean", "deviation"),
    )  # fmt: skip


@dataclass
class RewardEntry(Scaled):
    """An entry of ``rewards`` of a member or an evaluation."""

    name: str = key(
        REQUIRED, "the reward's name", pattern=r"[A-Za-z0-9._-]{1,64}",
        pattern_help="of letters, digits, . _ - (at most 64)",
    )  # fmt: skip
    weight: float = key(1.0, "factor in the sum that is optimised; may be negative")
    endpoint: str | None = key(REQUIRED, "the server's endpoint file")
    fingerprint: str | None = key(None, "refuse a server of any other reward")
    shared: bool = key(False, "somebody else's server: of any run, known by its fingerprint")


@dataclass
class JudgeEntry:
    """An entry of ``judges`` of a member or an evaluation: measured, never trained on."""

    name: str = key(
        REQUIRED, "the judge's name", pattern=r"[A-Za-z0-9._-]{1,64}",
        pattern_help="of letters, digits, . _ - (at most 64)",
    )  # fmt: skip
    endpoint: str | None = key(REQUIRED, "the server's endpoint file")
    fingerprint: str | None = key(None, "refuse a server of any other judge")
    shared: bool = key(False, "somebody else's server: of any run, known by its fingerprint")


@dataclass
class RewardClientSettings:
    """``reward_client``: how rewards are asked for."""

    ready_deadline_s: float = key(600, "how long a server may take to come up", unit="s", above=0)
    # A server that knows requests' keys answers at once with what it has; there it is how long a
    # call, or a line that finishes nothing, may last. One that hangs costs retries + 1 times this.
    request_timeout_s: float = key(120, "of one attempt at one batch", unit="s", above=0)
    retries: int = key(4, "further attempts after a transport error or timeout", low=0)
    backoff_s: float = key(
        1.0, "wait before the first of them; doubles, up to a minute", unit="s", low=0
    )
    batch_size: int = key(32, "samples per request", low=1)
    in_flight: int = key(4, "requests at a time", low=1)
    max_failure_rate: float = key(
        0.1, "of the last failure_window samples; above it the member saves and stops",
        low=0, high=1,
    )  # fmt: skip
    failure_window: int = key(512, "samples that the failure rate is taken over", low=1)


@dataclass
class Evaluation:
    """``evaluation``: measuring on held-out prompts."""

    num_prompts: int = key(512, "held-out prompts (the first ones)", low=1)
    generations: int = key(1, "responses to each prompt; 2 or more show diversity", low=1)
    micro_batch_size: int = key("${rollout.micro_batch_size}", "sequences at a time", low=1)
    seed: int = key(0, "common random numbers: equal for all members", low=0)
    exact_kl: bool = key(False, "also the sum over the vocabulary at each token")
    num_samples_shown: int = key(3, "texts in the records", low=0)
    kl_limit: float | None = key(
        None, "stop for good above this KL to SFT", unit="nats", paper="figure 3: 200"
    )


@dataclass
class Trainer:
    """``trainer``: NeMo's names."""

    num_nodes: int = key(1, "nodes", low=1)
    devices: int = key(8, "processes per node, one per GPU", low=1)
    accelerator: str = key("gpu", "Lightning's accelerator", choices=("gpu", "cpu", "auto"))
    precision: str = key(
        "bf16", "Lightning's precision", choices=("bf16", "bf16-mixed", "16", "16-mixed", "32",
                                                  "32-true")
    )  # fmt: skip
    gradient_clip_val: float = key(1.0, "largest gradient norm; 0 does not clip", low=0)


@dataclass
class Optim:
    """``optim``: NeMo's names."""

    name: str = key("mcore_distributed_optim", "NeMo's name; adam on CPU", nonempty=True)
    lr: float = key(1e-6, "learning rate after the warm-up", above=0, high=1, paper="section 4")
    betas: list[float] = key([0.9, 0.95], "Adam's decay rates", low=0, high=1)
    weight_decay: float = key(0.0, "decoupled weight decay", low=0)
    warmup_steps: int = key(100, "linear warm-up", unit="steps", low=0, paper="section 4")
    extra: dict[str, Any] = key({}, "further keys of NeMo's model.optim")


@dataclass
class Model:
    """``model``: overrides of the checkpoint's own NeMo configuration."""

    tensor_model_parallel_size: int = key(
        "${shards_up_to:4}", "TP; the default is 4, or 2 or 1 where there are too few ranks", low=1
    )
    pipeline_model_parallel_size: int = key(1, "PP", low=1)
    sequence_parallel: bool = key(True, "share activations of norms over TP")
    megatron_amp_O2: bool = key(True, "bf16 weights with fp32 masters")  # noqa: N815
    micro_batch_size: int = key(1, "sequences per training micro batch", low=1)
    extra: dict[str, Any] = key({}, "any further key of NeMo's model configuration")
