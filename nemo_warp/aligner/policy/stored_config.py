"""A checkpoint's own NeMo configuration, such that this machine can build the model.

Imports NeMo: after `compat.activate`.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_aligner.utils.utils import load_and_override_model_config
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_warp.aligner.compat.kernels import absent_kernels
from nemo_warp.checkpoints.containers.archive import open_archive
from nemo_warp.checkpoints.containers.configuration import CONFIG, read_configuration
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.families.importing import ORIGIN
from nemo_warp.checkpoints.families.tokenizer import (
    FAST,
    SETTINGS,
    stored_tokenizer,
    token_texts,
    write_files,
)
from nemo_warp.config import overlaid

_READ_ALWAYS = dict.fromkeys(
    f"activations_checkpoint_{name}"
    for name in ("granularity", "method", "num_layers", "layers_per_pipeline")
)
"""Keys that NeMo reads without a default when it generates (megatron_gpt_model.py l.2114)."""


def stored_config(checkpoint: str, overrides: DictConfig) -> DictConfig:
    """The configuration of a ``.nemo`` under overrides.

    Kernels that are not installed are switched off below the overrides, and a Hugging Face
    tokenizer is the one inside the ``.nemo``, where there is one.

    Raises:
        ValueError: the tokenizer is only named, and cannot be had.
    """
    below = dict.fromkeys(absent_kernels(), False)
    config = load_and_override_model_config(checkpoint, overlaid(below, overrides))
    config = overlaid(_READ_ALWAYS, config)
    tokenizer = config.get("tokenizer")
    given = OmegaConf.select(overrides, "tokenizer.type")
    if tokenizer is not None and tokenizer.get("library") == "huggingface":
        folder = None if given else unpacked_tokenizer(Path(checkpoint))
        with open_dict(config):
            tokenizer.type = str(folder) if folder else tokenizer.get("type")
        if folder is None:
            _check_name(str(tokenizer.type), checkpoint)
    return config


def needs_begin_token(config: DictConfig) -> bool:
    """Whether prompts begin with BOS: Gemma, or imported with a tokenizer that adds it.

    Args:
        config: a checkpoint's NeMo configuration.
    """
    gemma = config.get("layernorm_zero_centered_gamma") and config.get("apply_embedding_scaling")
    settings = _origin(config).get(SETTINGS)
    return bool(gemma or (isinstance(settings, Mapping) and settings.get("add_bos_token")))


def imported_end_strings(checkpoint: Path) -> list[str]:
    """Texts of the tokens that end a response beside EOS, as the imported model says it itself.

    Llama 3 ends its turns with ``<|eot_id|>``, Gemma with ``<end_of_turn>``: its
    generation_config.json names several tokens. None of a checkpoint that was not imported.
    """
    files = _inside(checkpoint)
    generation = files.get("generation_config.json")
    ends = generation.get("eos_token_id") if isinstance(generation, Mapping) else None
    settings = files.get(SETTINGS)
    end = settings.get("eos_token") if isinstance(settings, Mapping) else None
    own = end.get("content") if isinstance(end, Mapping) else end
    texts = token_texts(files, ends) if isinstance(ends, Sequence) else []
    return [text for text in texts if text != own]  # which NeMo ends at by itself


def unpacked_tokenizer(checkpoint: Path) -> Path | None:
    """A folder with the Hugging Face tokenizer of a ``.nemo``; it goes with the process.

    NeMo loads such tokenizers by name or folder only (tokenizer_utils.py, get_nmt_tokenizer).
    None if the ``.nemo`` holds none.
    """
    files = _inside(checkpoint)
    if FAST not in files:
        return None
    folder = Path(tempfile.mkdtemp(prefix="nemo-warp-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_files(folder, files)
    return folder


def _inside(checkpoint: Path) -> dict[str, Any]:
    """The tokenizer's files in a ``.nemo``; {} of other formats."""
    try:
        archive = open_archive(checkpoint)
        if CONFIG not in archive.members:
            return {}
        config = read_configuration(archive)
        return stored_tokenizer(archive, config, config.get(ORIGIN))
    except CheckpointError:
        return {}


def _origin(config: DictConfig) -> Mapping[str, Any]:
    found = (config.get(ORIGIN) or {}).get("files")
    return found if isinstance(found, Mapping) else {}


def _check_name(name: str, checkpoint: str) -> None:
    """Raise where NeMo would, with one sentence instead of a page."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever its files, the hub and the network may do
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"the tokenizer of {checkpoint} is {name!r} of Hugging Face, which cannot be loaded "
            f"here ({said}); download it where there is a network, and set "
            "model.extra.tokenizer.type to its folder"
        ) from None
