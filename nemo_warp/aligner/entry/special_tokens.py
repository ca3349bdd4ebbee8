"""Special tokens that a prompt spells out, such as ``<bos>``, read as tokens. No NeMo.

Hugging Face tokenizers do that themselves. SentencePiece does not for control pieces (``<bos>``,
``<s>``, often ``<|im_end|>``): it reads their letters, and NeMo's wrapper leaves it at that.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Encode = Callable[[str], list[int]]


def encoder_of(tokenizer: Any) -> Encode:
    """``text_to_ids`` of one of NeMo's tokenizers, with control pieces read as tokens."""
    plain: Encode = tokenizer.text_to_ids
    pieces = _control_pieces(tokenizer)
    if not pieces:
        return plain
    # Or "<s>" would be found inside "<s>x>"-like pieces: alternatives are tried in order.
    longest_first = sorted(pieces, key=len, reverse=True)
    pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(text: str) -> list[int]:
        found: list[int] = []
        # The pattern is a group, so split keeps the pieces it splits at.
        for part in pattern.split(text):
            if part:
                found += [pieces[part]] if part in pieces else plain(part)
        return found

    return encode


def with_begin(encode: Encode, begin: int) -> Encode:
    """Encode with a first token, unless the text spells it out."""

    def encode_after(text: str) -> list[int]:
        found = encode(text)
        # A chat template may spell its BOS; a second one changes what the model says.
        return found if found[:1] == [begin] or not found else [begin, *found]

    return encode_after


def _control_pieces(tokenizer: Any) -> dict[str, int]:
    """Text -> token; none for tokenizers other than SentencePiece's, or in NeMo's legacy mode."""
    processor: Any = getattr(tokenizer, "tokenizer", None)
    # NeMo's legacy SentencePiece mode adds its special tokens itself.
    if not hasattr(processor, "is_control") or getattr(tokenizer, "legacy", False):
        return {}
    size = range(processor.get_piece_size())
    return {processor.id_to_piece(n): n for n in size if processor.is_control(n)}
