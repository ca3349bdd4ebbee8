"""The true size of the vocabulary, without loading a tokenizer.

Stored embeddings are padded to a multiple of ``make_vocab_size_divisible_by`` times the writer's
tensor parallel size (NeMo megatron_base_model.py); only the tokenizer knows how many rows count.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from nemo_warp.checkpoints.checkpoint import Checkpoint
from nemo_warp.checkpoints.containers.archive import Archive
from nemo_warp.checkpoints.containers.configuration import read_configuration
from nemo_warp.checkpoints.iterations import RUN_CONFIG
from nemo_warp.checkpoints.logical import LogicalTensor

VOCABULARY_TENSORS = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Tensors with one row per token."""

_MAX_TOKENIZER_BYTES = 1 << 27
_LENGTH_DELIMITED = 2
_FIXED_BYTES = {1: 8, 5: 4}


def true_vocab_size(checkpoint: Checkpoint) -> int | None:
    """Tokens in the vocabulary: ``override_vocab_size``, or counted in a tokenizer artifact.

    Of a Hugging Face folder ``vocab_size``, which is what its embedding has; of Megatron-Bridge the
    model's ``vocab_size``, which its provider pads (models/gpt_provider.py).

    None if neither says: Hugging Face tokenizers that are only named, or SentencePiece models in
    NeMo's legacy mode, to which special tokens are added when they are loaded.
    """
    key = "vocab_size" if checkpoint.format == "safetensors" else "override_vocab_size"
    override = checkpoint.config.get(key)
    if isinstance(override, int) and override > 0:
        return override
    model = read_configuration(checkpoint.archive, RUN_CONFIG).get("model")
    if isinstance(model, dict) and isinstance(size := model.get("vocab_size"), int) and size > 0:
        return size
    tokenizer = checkpoint.config.get("tokenizer")
    if not isinstance(tokenizer, dict):
        return None
    try:
        return _count(checkpoint.archive, tokenizer)
    except (ValueError, IndexError, KeyError, TypeError, RecursionError):
        return None  # not a tokenizer that is understood: the caller says so


def true_rows(tensor: LogicalTensor, vocab_size: int | None) -> int:
    """Rows of a tensor that are not vocabulary padding."""
    if tensor.name not in VOCABULARY_TENSORS or vocab_size is None:
        return tensor.rows
    return min(tensor.rows, vocab_size)


def _count(archive: Archive, tokenizer: dict[str, Any]) -> int | None:
    library = tokenizer.get("library")
    if library == "sentencepiece":
        legacy = tokenizer.get("sentencepiece_legacy") and tokenizer.get("special_tokens")
        return None if legacy else count_pieces(_artifact(archive, tokenizer.get("model")))
    if library == "megatron":
        return len(json.loads(_artifact(archive, tokenizer.get("vocab_file"))))
    return None


def _artifact(archive: Archive, reference: Any) -> bytes:
    """Contents of the file that the configuration calls ``nemo:<name>``."""
    if not isinstance(reference, str) or not reference.startswith("nemo:"):
        raise ValueError("the tokenizer is not inside the checkpoint")
    name = reference.removeprefix("nemo:")
    if name not in archive.members or archive.members[name].size > _MAX_TOKENIZER_BYTES:
        raise ValueError(f"{name} is missing or too large")
    return archive.read(name)


def count_pieces(model: bytes) -> int:
    """Number of ``pieces`` (field 1) in a serialized SentencePiece ModelProto."""
    count = sum(1 for field in _fields(model) if field == 1)
    if count == 0:
        raise ValueError("no pieces")
    return count


def _fields(message: bytes) -> Iterator[int]:
    """Field numbers of a protobuf message, in order; contents are skipped."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == 0:
            _, position = _varint(message, position)
        elif kind == _LENGTH_DELIMITED:
            size, position = _varint(message, position)
            position += size
        else:
            position += _FIXED_BYTES[kind]
        yield tag >> 3
    if position != len(message):
        raise ValueError("the message is cut short")


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
