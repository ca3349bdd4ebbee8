"""A model's own chat template and tokenizer, through transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from nemo_warp.checkpoints.containers.archive import open_archive
from nemo_warp.checkpoints.containers.configuration import CONFIG, read_configuration
from nemo_warp.checkpoints.families.importing import ORIGIN
from nemo_warp.checkpoints.families.tokenizer import FAST, PIECES, stored_tokenizer, write_files
from nemo_warp.prompt_sets.rows import Message


class Template:
    """Turns messages into a prompt's text and tokens.

    Args:
        model: a Hugging Face folder, a ``.nemo`` that `import_hf` made, or anything trained or
            merged from one.
        plain: leave the chat template alone: the text is the last message's, after BOS where the
            tokenizer adds it.

    Raises:
        ValueError: no tokenizer or no chat template there.
    """

    def __init__(self, model: Path, plain: bool = False):
        self._tokenizer = _load(model)
        self._plain = plain
        if not plain and not getattr(self._tokenizer, "chat_template", None):
            raise ValueError(
                f"the tokenizer of {model} has no chat template (it is no chat model?); take the "
                "texts as they are with --plain"
            )

    def text(self, messages: list[Message], where: str) -> str:
        """The prompt, up to where the response begins.

        Raises:
            ValueError: the template refuses the messages.
        """
        if self._plain:
            return self._begin() + messages[-1]["content"]
        try:
            found = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise what their authors like
            said = " ".join(str(error).split())
            raise ValueError(f"{where}: the model's chat template says: {said}") from None
        return str(found)

    def tokens(self, text: str) -> list[int]:
        """Tokens of a prompt as members read it: special tokens as tokens, none added."""
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def pieces(self, tokens: list[int]) -> list[str]:
        """The tokens by name."""
        return list(self._tokenizer.convert_ids_to_tokens(tokens))

    def _begin(self) -> str:
        # Asked of the tokenizer and not read from its settings, which say it in different ways.
        adds = self._tokenizer("").input_ids[:1] == [self._tokenizer.bos_token_id]
        return str(self._tokenizer.bos_token) if adds else ""


def _load(model: Path) -> Any:
    if not model.exists():
        raise ValueError(f"no model {model}; expected a Hugging Face folder or a .nemo")
    archive = open_archive(model)
    if CONFIG not in archive.members:
        return _from_folder(model, str(model))
    config = read_configuration(archive)
    files = stored_tokenizer(archive, config, config.get(ORIGIN))
    if not files.keys() & {FAST, PIECES} or ORIGIN not in config:
        raise ValueError(
            f"{model} holds no Hugging Face tokenizer (tools/import_hf.py did not make it); give "
            "--model the Hugging Face folder that it came from"
        )
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), files)
        return _from_folder(Path(folder), str(model))


def _from_folder(folder: Path, where: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ValueError("chat templates need transformers: pip install transformers") from None
    said = ""
    for fast in (True, False):  # a fast one is made of SentencePiece only where protobuf fits
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=fast)
        except Exception as error:  # of many kinds, with many lines
            said = " ".join(str(error).split())[:200]
    raise ValueError(f"{where}: transformers finds no tokenizer there: {said}")
