"""Everything that can be refused before NeMo is imported: ranges, sizes, files, layout. No NeMo."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import yaml

from nemo_warp import yaml_text
from nemo_warp.aligner.entry.allowed_settings import check_settings
from nemo_warp.aligner.entry.engine import engine_batch_size
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.meaning import check_same_meaning, read_meaning
from nemo_warp.config import to_plain
from nemo_warp.schema.evaluation import Front
from nemo_warp.schema.member import Member
from nemo_warp.schema.rules import check_clip, check_signal

_MODEL_CONFIG = "model_config.yaml"
_SIZES = (
    "num_layers",
    "num_attention_heads",
    "num_query_groups",
    "encoder_seq_length",
    "max_position_embeddings",
)
"""What is computed with before NeMo is imported; null is allowed for the query groups only."""


def validate_member(config: Member) -> None:
    """Refuse a member that cannot work.

    Raises:
        ValueError: what is wrong, where, and what was expected.
    """
    _check_algorithm(config)
    _check_batch_sizes(config)
    check_judges(config)
    for name in ("init", "sft"):
        path = Path(getattr(config, name))
        check_layout(read_model_config(path), config, path)
    check_same_model(config, "init", "sft")


def check_judges(config: Member | Front) -> None:
    """Refuse judges that cannot be told from a reward, or from each other.

    Raises:
        ValueError: names the judge.
    """
    seen = {reward.name for reward in config.rewards}
    for number, judge in enumerate(config.judges):
        if judge.name in seen:
            raise ValueError(
                f"judges.{number}.name is {judge.name}, which a reward or another judge has: a "
                "judge is never trained on; remove one of them, or give it another name"
            )
        seen.add(judge.name)


def check_same_model(config: Member | Front, *names: str) -> None:
    """Refuse checkpoints whose weights would mean something else in the first one's model.

    Raises:
        ValueError: names the two and the property, such as the rotary base or the tokenizer.
    """
    if config.allow_different_configs:
        return
    # In the order given (the first is the reference), and a file that serves twice read once.
    paths = dict.fromkeys(getattr(config, name) for name in names)
    try:
        models = {path: read_meaning(Path(path)) for path in paths}
    except CheckpointError as error:
        raise ValueError(str(error)) from error
    check_same_meaning(models, "set allow_different_configs=true")


def _check_algorithm(config: Member) -> None:
    algorithm = config.algorithm
    if algorithm.anchor == "none" and algorithm.kl_coefficient != 0:
        raise ValueError(
            f"algorithm.anchor is none, but kl_coefficient is {algorithm.kl_coefficient}; without "
            "an anchor there is no KL: set algorithm.kl_coefficient=0"
        )
    if config.run.measure_anchor and algorithm.anchor != "ema":
        raise ValueError(
            f"run.measure_anchor is true, but algorithm.anchor is {algorithm.anchor}: only an EMA "
            "anchor is a policy of its own; set run.measure_anchor=false"
        )
    plain = to_plain(config)
    check_signal(plain["rollout"], plain["algorithm"])
    for number, reward in enumerate(plain["rewards"]):
        check_clip(reward, f"rewards.{number}")
    scheme = (config.model.extra.get("peft") or {}).get("peft_scheme", "none")
    if scheme not in (None, "none"):
        raise ValueError(
            f"model.extra.peft.peft_scheme is {scheme}; WARP averages full weights, adapters "
            "(PEFT, LoRA) are not supported: merge the adapter into the model first"
        )


def _check_batch_sizes(config: Member) -> None:
    dp, rollout = data_parallel_size(config), config.rollout
    # Members are checked for whole batches here, because Megatron's microbatch calculator asserts
    # in the middle of the first step otherwise, on every rank and with no key named.
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
    engine_batch_size(rollout, config.evaluation)
    # A save in the middle of a rollout would need the rollout itself to be saved.
    for key in ("total_steps", "eval_interval", "save_interval"):
        _require_multiple(
            f"run.{key}", getattr(config.run, key), "rollout.updates_per_rollout", updates
        )


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
    where = f"{path}/{_MODEL_CONFIG}"
    try:
        text = _model_config_text(path)
        # utf-8-sig: editors on other systems put a byte order mark first, which YAML takes for a
        # key.
        model = yaml_text.load(text.decode("utf-8-sig"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{where} is damaged: {said}; copy the checkpoint again") from error
    if not isinstance(model, dict):
        raise ValueError(f"{where} holds {type(model).__name__}, expected a table of keys")
    for key in _SIZES:
        value = model.get(key)
        optional = key == "num_query_groups" and value is None
        if not optional and (type(value) is not int or value < 1):
            raise ValueError(f"'{key}' in {where} is {value!r}, expected a whole number above 0")
    return model


def _model_config_text(path: Path) -> bytes:
    if path.is_dir():
        file = path / _MODEL_CONFIG
        if not file.is_file():
            raise ValueError(f"{path} has no {_MODEL_CONFIG}; {_guess(path)}")
        return file.read_bytes()
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}")
    try:
        with tarfile.open(path) as archive:
            # NeMo writes names with "./" (arcname="."), other tools without.
            members = {m.name.removeprefix("./"): m for m in archive.getmembers()}
            stream = archive.extractfile(members[_MODEL_CONFIG])
            if stream is None:
                raise ValueError(f"{_MODEL_CONFIG} in {path} is no file; is it a NeMo checkpoint?")
            return stream.read()
    except KeyError:
        raise ValueError(f"{path} has no {_MODEL_CONFIG}; is it a NeMo checkpoint?") from None
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} is truncated or no .nemo file: {error}; copy it again") from error


def _guess(folder: Path) -> str:
    """What a folder without NeMo 1's configuration is, and how it gets one."""
    through_hf = "export it to Hugging Face and import that with tools/import_hf.py"
    if (folder / "config.json").is_file():
        return "it is a Hugging Face folder: import it with tools/import_hf.py"
    if (folder / "context").is_dir():
        return f"it is a NeMo 2 checkpoint: {through_hf}"
    if folder.name.startswith("iter_") or (folder / "latest_checkpointed_iteration.txt").is_file():
        return f"it is a checkpoint of Megatron-LM or Megatron-Bridge: {through_hf}"
    return "is it a NeMo checkpoint?"


def check_layout(model: dict[str, Any], config: Any, path: Path) -> None:
    """Refuse sizes that do not divide the model, adapters, and settings that are wrong here."""
    check_settings(model, config, path)
    tp, pp = config.model.tensor_model_parallel_size, config.model.pipeline_model_parallel_size
    # Megatron-core asserts the same when it builds the model, after minutes of loading.
    heads: int = model["num_attention_heads"]
    groups: int = model.get("num_query_groups") or heads
    for name, number in (("num_attention_heads", heads), ("num_query_groups", groups)):
        _require_multiple(f"{name} of {path}", number, "model.tensor_model_parallel_size", tp)
    _require_multiple(f"num_layers of {path}", model["num_layers"],
                      "model.pipeline_model_parallel_size", pp)  # fmt: skip
    if (model.get("mcore_customization_config") or {}).get("final_logit_softcapping") and pp > 1:
        raise ValueError(
            f"model.pipeline_model_parallel_size is {pp}, expected 1: the logits of {path} are "
            "soft-capped (Gemma 2), and NeMo 2.2.1 looks for the output layer on every stage "
            "(megatron_gpt_model.py l.203)"
        )
    if ((model.get("peft") or {}).get("peft_scheme") or "none") != "none":
        raise ValueError(f"{path} holds an adapter (PEFT); merge it into the full model first")


def context_length(model: dict[str, Any]) -> int:
    """Longest sequence the model can read."""
    return min(model["max_position_embeddings"], model["encoder_seq_length"])


def max_prompt_tokens(config: Member | Front, checkpoint: str) -> int:
    """What the context of ``checkpoint`` leaves for a prompt; ``prompts.max_tokens`` if less.

    With TensorRT-LLM no more than the engine takes: a longer prompt would end the run at the step
    that draws it, in every attempt.

    Raises:
        ValueError: nothing is left, or less than the engine is to take.
    """
    context = context_length(read_model_config(Path(checkpoint)))
    room = context - config.rollout.max_response_tokens
    if room < 1:
        raise ValueError(
            f"rollout.max_response_tokens is {config.rollout.max_response_tokens}, but "
            f"{checkpoint} reads at most {context} tokens: no room for a prompt"
        )
    engine = config.rollout.trt_llm
    taken = (engine.max_input_len or room) if engine.enable else room
    if taken > room:
        raise ValueError(
            f"rollout.trt_llm.max_input_len is {taken}, but {checkpoint} reads at most {context} "
            f"tokens, of which rollout.max_response_tokens = {config.rollout.max_response_tokens} "
            f"are the response's: expected at most {room}"
        )
    return min(taken, config.prompts.max_tokens or taken)


def _require_multiple(name: str, value: int, of_name: str, of: int) -> None:
    if not isinstance(value, int) or value % of:
        raise ValueError(f"{name} is {value}, expected a multiple of {of_name} ({of})")
