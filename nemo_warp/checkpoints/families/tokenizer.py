"""The tokenizer of a Hugging Face folder: checked against the model, taken into a ``.nemo``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_warp.checkpoints.containers.archive import Archive
from nemo_warp.checkpoints.vocabulary import count_pieces

PIECES, FAST, SETTINGS = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
_ADDED = "added_tokens.json"
CARRIED = (SETTINGS, "special_tokens_map.json", "generation_config.json", _ADDED)
"""Small JSON files that travel inside ``model_config.yaml``, which every save keeps."""

_LEAST = 0.75
"""Share of a model's rows that a tokenizer of its own uses; another family's use far fewer."""


def tokenizer_section(archive: Archive, vocabulary: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The ``tokenizer`` section of ``model_config.yaml``, and the artifacts that it names.

    SentencePiece models are what NeMo reads. Other tokenizers NeMo takes by name or folder
    (``type``); their tokenizer.json goes along as ``model``, which NeMo carries from save to save.

    Args:
        archive: a Hugging Face folder.
        vocabulary: rows of the model's embedding.

    Raises:
        ValueError: there is no tokenizer, or it is not this model's.
    """
    found = {name: archive.read(name) for name in (PIECES, FAST) if name in archive.members}
    if not found:
        raise ValueError(f"{archive.path} holds no tokenizer ({PIECES} or {FAST})")
    _check_size(archive, found, vocabulary)
    # NeMo's names have 32 random hex digits there; a hash gives equal imports equal bytes.
    artifacts = {f"{hashlib.sha256(data).hexdigest()[:32]}_{n}": data for n, data in found.items()}
    names = {name.partition("_")[2]: f"nemo:{name}" for name in artifacts}
    section = {"type": None, "vocab_file": None, "merge_file": None, "sentencepiece_legacy": False}
    if PIECES in names and not _adds_tokens(archive, found):
        return section | {
            **{"library": "sentencepiece", "model": names[PIECES], "vocab_file": names.get(FAST)}
        }, artifacts
    folder = str(Path(archive.path).resolve())
    return section | {
        **{"library": "huggingface", "type": folder, "model": names[FAST], "use_fast": True}
    }, artifacts


def stored_tokenizer(archive: Archive, config: dict[str, Any], origin: Any) -> dict[str, Any]:
    """Files of the tokenizer that a ``.nemo`` of ours holds: name -> bytes, parsed JSON or text.

    Args:
        archive: the ``.nemo``.
        config: its ``model_config.yaml``.
        origin: what the import left in it; None of any other checkpoint.
    """
    found: dict[str, Any] = {}
    files = origin.get("files") if isinstance(origin, dict) else None
    for name, content in (files if isinstance(files, dict) else {}).items():
        if Path(name).name == name:  # a configuration can be anybody's
            found[name] = content
    section = config.get("tokenizer") or {}
    for reference in (section.get("model"), section.get("vocab_file")):
        name = str(reference).removeprefix("nemo:")
        for kind in (PIECES, FAST):
            if name in archive.members and name.endswith(f"_{kind}"):
                found[kind] = archive.read(name)
    return found


def token_texts(files: dict[str, Any], tokens: Sequence[int]) -> list[str]:
    """Texts of special tokens, as far as they are known.

    Args:
        files: see `stored_tokenizer`.
        tokens: their numbers.
    """
    added = json.loads(files[FAST]).get("added_tokens") or [] if FAST in files else []
    settings = files.get(SETTINGS)
    table = settings.get("added_tokens_decoder") if isinstance(settings, dict) else None
    known = {int(number): entry["content"] for number, entry in (table or {}).items()}
    known |= {entry["id"]: entry["content"] for entry in added}
    return [known[token] for token in tokens if token in known]


def write_files(folder: Path, files: dict[str, Any]) -> None:
    """Write files of a Hugging Face folder: bytes, text, or what becomes JSON."""
    for name, content in files.items():
        if isinstance(content, dict | list):
            content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)


def carried_files(archive: Archive) -> dict[str, Any]:
    """File name -> contents of what goes along: parsed JSON, chat templates as text."""
    found: dict[str, Any] = {}
    for name in archive.members:
        if name in CARRIED:
            found[name] = json.loads(archive.read(name))
        elif name.endswith(".jinja") and "/" not in name:
            found[name] = archive.read(name).decode()
    return found


def _check_size(archive: Archive, found: dict[str, bytes], vocabulary: int) -> None:
    name = FAST if FAST in found else PIECES
    try:
        size = _tokens(found[FAST]) if name == FAST else count_pieces(found[PIECES])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise ValueError(f"{archive.path}/{name} is not a tokenizer that is understood") from None
    if not _LEAST * vocabulary <= size <= vocabulary:
        raise ValueError(
            f"{archive.path}: {name} has {size} tokens and the model {vocabulary} rows for them; "
            "it is another model's tokenizer"
        )
    if FAST in found and SETTINGS in archive.members:
        _check_bos(archive, json.loads(found[FAST]))


def _adds_tokens(archive: Archive, found: dict[str, bytes]) -> bool:
    """Whether a model has tokens beyond its SentencePiece pieces, which only tokenizer.json knows.

    Raises:
        ValueError: it has them, and no tokenizer.json.
    """
    pieces = count_pieces(found[PIECES])
    if FAST in found:
        return _tokens(found[FAST]) > pieces
    added = json.loads(archive.read(_ADDED)) if _ADDED in archive.members else {}
    beyond = sorted(token for token, number in added.items() if number >= pieces)
    if beyond:
        raise ValueError(
            f"{archive.path}: {', '.join(beyond[:3])} (of {_ADDED}) are not among the {pieces} "
            f"pieces of {PIECES}, and there is no {FAST}; save the tokenizer with transformers' "
            "fast class, which writes one"
        )
    return False


def _tokens(fast: bytes) -> int:
    """Largest token number in a tokenizer.json, plus one."""
    table = json.loads(fast)
    vocabulary = table["model"]["vocab"]
    # Unigram models have a list of pieces, BPE a table.
    last = len(vocabulary) - 1 if isinstance(vocabulary, list) else max(vocabulary.values())
    return 1 + max([last, *(token["id"] for token in table.get("added_tokens") or [])])


def _check_bos(archive: Archive, fast: dict[str, Any]) -> None:
    """The first token as the model's configuration knows it and as the tokenizer does."""
    settings, config = (json.loads(archive.read(name)) for name in (SETTINGS, "config.json"))
    token, expected = settings.get("bos_token"), config.get("bos_token_id")
    token = token.get("content") if isinstance(token, dict) else token
    ids = {entry["content"]: entry["id"] for entry in fast.get("added_tokens") or []}
    if token in ids and isinstance(expected, int) and ids[token] != expected:
        raise ValueError(
            f"{archive.path}: {token} is token {ids[token]} of the tokenizer and {expected} in "
            "config.json (bos_token_id); it is another model's tokenizer"
        )
