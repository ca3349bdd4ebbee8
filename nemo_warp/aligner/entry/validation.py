"""Everything that can be refused before NeMo is imported: ranges, sizes, files, layout. No NeMo."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import yaml

from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.meaning import check_same_meaning, read_meaning
from nemo_warp.core.reinforce import (
    BASELINES,
    KL_ESTIMATORS,
    KL_REDUCTIONS,
    POLICY_REDUCTIONS,
)

ANCHORS = ("ema", "sft", "none")
EXPORT_DTYPES = ("same", "float32", "bfloat16")
_MODEL_CONFIG = "model_config.yaml"


def validate_member(config: Any) -> None:
    """Refuse a member that cannot work.

    Raises:
        ValueError: what is wrong, where, and what was expected.
    """
    _check_choices(config)
    _check_ranges(config)
    _check_batch_sizes(config)
    for name in ("init", "sft"):
        check_layout(read_model_config(Path(config[name])), config, Path(config[name]))
    check_same_model(config, "init", "sft")


def check_same_model(config: Any, *names: str) -> None:
    """Refuse checkpoints whose weights would mean something else in the first one's model.

    Raises:
        ValueError: names the two and the property, such as the rotary base or the tokenizer.
    """
    if config.allow_different_configs:
        return
    paths = dict.fromkeys(config[name] for name in names)
    try:
        models = {path: read_meaning(Path(path)) for path in paths}
    except CheckpointError as error:
        raise ValueError(str(error)) from error
    check_same_meaning(models, "set allow_different_configs=true")


def _check_choices(config: Any) -> None:
    algorithm = config.algorithm
    _require_one_of("algorithm.anchor", algorithm.anchor, ANCHORS)
    _require_one_of("algorithm.kl_estimator", algorithm.kl_estimator, tuple(KL_ESTIMATORS))
    _require_one_of("algorithm.kl_reduction", algorithm.kl_reduction, KL_REDUCTIONS)
    _require_one_of("algorithm.baseline", algorithm.baseline, BASELINES)
    _require_one_of("algorithm.policy_reduction", algorithm.policy_reduction, POLICY_REDUCTIONS)
    _require_one_of("export.dtype", config.export.dtype, EXPORT_DTYPES)
    if algorithm.anchor == "none" and algorithm.kl_coefficient != 0:
        raise ValueError(
            f"algorithm.anchor is none, but kl_coefficient is {algorithm.kl_coefficient}; without "
            "an anchor there is no KL: set algorithm.kl_coefficient=0"
        )
    scheme = (config.model.extra.get("peft") or {}).get("peft_scheme", "none")
    if scheme not in (None, "none"):
        raise ValueError(
            f"model.extra.peft.peft_scheme is {scheme}; WARP averages full weights, adapters "
            "(PEFT, LoRA) are not supported: merge the adapter into the model first"
        )


def _check_ranges(config: Any) -> None:
    _require_range("algorithm.kl_coefficient", config.algorithm.kl_coefficient, 0, 1e6)
    _require_range("algorithm.ema_update_rate", config.algorithm.ema_update_rate, 0, 1)
    _require_positive("rollout.temperature", config.rollout.temperature)
    _require_positive("algorithm.log_prob_temperature", config.algorithm.log_prob_temperature)
    _require_positive("optim.lr", config.optim.lr)
    for key in ("total_steps", "eval_interval", "save_interval"):
        _require_positive(f"run.{key}", config.run[key])
    _require_range("run.keep_checkpoints", config.run.keep_checkpoints, 2, 1e6)
    for key in ("prompts_per_step", "samples_per_prompt", "updates_per_rollout",
                "max_response_tokens", "micro_batch_size", "forward_micro_batch_size"):  # fmt: skip
        _require_positive(f"rollout.{key}", config.rollout[key])
    for key in ("num_prompts", "micro_batch_size"):
        _require_positive(f"evaluation.{key}", config.evaluation[key])


def _check_batch_sizes(config: Any) -> None:
    dp, rollout = data_parallel_size(config), config.rollout
    updates, forward = rollout.updates_per_rollout, rollout.forward_micro_batch_size
    batch = rollout.prompts_per_step * rollout.samples_per_prompt
    name = "rollout.prompts_per_step * samples_per_prompt"
    _require_multiple(
        name, batch, "rollout.micro_batch_size * data parallel", rollout.micro_batch_size * dp
    )
    _require_multiple(name, batch, "forward_micro_batch_size * data parallel", forward * dp)
    training = updates * config.model.micro_batch_size * dp
    _require_multiple(
        name, batch, "updates_per_rollout * model.micro_batch_size * data parallel", training
    )
    check_evaluation_sizes(config.evaluation, forward, dp)
    for key in ("total_steps", "eval_interval", "save_interval"):
        _require_multiple(f"run.{key}", config.run[key], "rollout.updates_per_rollout", updates)


def check_evaluation_sizes(evaluation: Any, forward_micro_batch_size: int, dp: int) -> None:
    """Refuse a number of held-out prompts that does not divide over micro batches and ranks."""
    for name, size in (
        ("evaluation.micro_batch_size", evaluation.micro_batch_size),
        ("rollout.forward_micro_batch_size", forward_micro_batch_size),
    ):
        number = evaluation.num_prompts
        _require_multiple("evaluation.num_prompts", number, f"{name} * data parallel", size * dp)


def data_parallel_size(config: Any) -> int:
    """Ranks over tensor and pipeline parallel size.

    Raises:
        ValueError: they do not divide.
    """
    ranks = config.trainer.num_nodes * config.trainer.devices
    tp, pp = config.model.tensor_model_parallel_size, config.model.pipeline_model_parallel_size
    _require_multiple("trainer.num_nodes * devices", ranks, "tensor * pipeline parallel", tp * pp)
    return ranks // (tp * pp)


def read_model_config(path: Path) -> dict[str, Any]:
    """``model_config.yaml`` of a .nemo, tar or directory, without unpacking it.

    Raises:
        ValueError: the file is missing, truncated or no NeMo checkpoint.
    """
    if path.is_dir():
        file = path / _MODEL_CONFIG
        if not file.is_file():
            raise ValueError(f"{path} has no {_MODEL_CONFIG}; is it a NeMo checkpoint?")
        return yaml.safe_load(file.read_text())
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}")
    try:
        with tarfile.open(path) as archive:
            members = {m.name.removeprefix("./"): m for m in archive.getmembers()}
            stream = archive.extractfile(members[_MODEL_CONFIG])
            return yaml.safe_load(stream.read())
    except KeyError:
        raise ValueError(f"{path} has no {_MODEL_CONFIG}; is it a NeMo checkpoint?") from None
    except (tarfile.TarError, EOFError, OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is truncated or no .nemo file: {error}; copy it again") from error


def check_layout(model: dict[str, Any], config: Any, path: Path) -> None:
    """Refuse tensor and pipeline sizes that do not divide the model, and adapters."""
    tp, pp = config.model.tensor_model_parallel_size, config.model.pipeline_model_parallel_size
    heads = model.get("num_attention_heads")
    groups = model.get("num_query_groups") or heads
    for name, number in (("num_attention_heads", heads), ("num_query_groups", groups)):
        _require_multiple(f"{name} of {path}", number, "model.tensor_model_parallel_size", tp)
    _require_multiple(f"num_layers of {path}", model.get("num_layers"),
                      "model.pipeline_model_parallel_size", pp)  # fmt: skip
    if ((model.get("peft") or {}).get("peft_scheme") or "none") != "none":
        raise ValueError(f"{path} holds an adapter (PEFT); merge it into the full model first")


def context_length(model: dict[str, Any]) -> int:
    """Longest sequence the model can read."""
    return min(model["max_position_embeddings"], model["encoder_seq_length"])


def max_prompt_tokens(config: Any, checkpoint: str) -> int:
    """What the context of ``checkpoint`` leaves for a prompt; ``prompts.max_tokens`` if less.

    Raises:
        ValueError: nothing is left.
    """
    context = context_length(read_model_config(Path(checkpoint)))
    room = context - config.rollout.max_response_tokens
    if room < 1:
        raise ValueError(
            f"rollout.max_response_tokens is {config.rollout.max_response_tokens}, but "
            f"{checkpoint} reads at most {context} tokens: no room for a prompt"
        )
    return min(room, config.prompts.max_tokens or room)


def _require_one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")


def _require_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, expected {low} to {high:g}")


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}, expected more than 0")


def _require_multiple(name: str, value: int, of_name: str, of: int) -> None:
    if not isinstance(value, int) or value % of:
        raise ValueError(f"{name} is {value}, expected a multiple of {of_name} ({of})")
