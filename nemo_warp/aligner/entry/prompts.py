"""Prompts as tokens. No NeMo."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_warp.aligner.entry.special_tokens import Encode, with_begin
from nemo_warp.prompts import PromptLine

_SHOWN_TOKENS = 48


@dataclass(frozen=True)
class Prompt:
    """A prompt's text, its tokens, and what else its line says, for the rewards."""

    text: str
    tokens: list[int]
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rules:
    """What becomes of a prompt's text, see ``prompts`` in conf/member.yaml.

    Attributes:
        max_tokens: longest prompt, template and BOS included.
        too_long: ``refuse`` or ``drop`` one that is longer.
        template: the text with ``{prompt}`` in the place of the line's; None: the line's alone.
    """

    max_tokens: int
    too_long: str = "refuse"
    template: str | None = None

    @classmethod
    def of(cls, prompts: Any, max_tokens: int) -> Rules:
        """From the section ``prompts`` of a member or an evaluation."""
        return cls(max_tokens, prompts.too_long, prompts.template)

    def text(self, line: str) -> str:
        """The whole text of a prompt: what is tokenized, and what rewards are told."""
        # replace, not format: prompts and templates may hold braces.
        return line if self.template is None else self.template.replace("{prompt}", line)


def tokenize(
    lines: list[PromptLine], encode: Encode, rules: Rules, path: Path, needed: int = 1
) -> list[Prompt]:
    """Tokenize prompts, refusing or leaving out those that are too long.

    Args:
        encode: from a text to its tokens, see `encoder`.
        needed: prompts that must be left.

    Raises:
        ValueError: names the prompt that has no tokens or too many, and how many it has; or too few
            are left.
    """
    prompts = []
    for number, line in enumerate(lines, 1):
        text = rules.text(line.text)
        tokens = encode(text)
        # NeMo generates from at least one token; of none it makes an index error inside the model.
        if not tokens:
            raise ValueError(f"{path}: prompt {number} ({text!r}) has no tokens; remove it")
        if len(tokens) <= rules.max_tokens:
            prompts.append(Prompt(text, tokens, line.fields))
        elif rules.too_long == "refuse":
            raise ValueError(
                f"{path}: prompt {number} has {len(tokens)} tokens, expected at most "
                f"{rules.max_tokens}; shorten it, leave such prompts out with prompts.too_long="
                "drop, or change prompts.max_tokens, rollout.max_response_tokens or the model's "
                "context length"
            )
    if len(prompts) < needed:
        raise ValueError(
            f"{path}: {len(prompts)} of {len(lines)} prompts have at most {rules.max_tokens} "
            f"tokens (the others are dropped, prompts.too_long), but {needed} are needed; raise "
            "prompts.max_tokens"
        )
    return prompts


def encoder(encode: Encode, tokenizer: Any, add_bos: bool) -> Encode:
    """The model's own encoder or, with ``prompts.add_bos``, one that begins with BOS.

    Raises:
        ValueError: the tokenizer has no BOS to be added.
    """
    if not add_bos:
        return encode
    bos = bos_token(tokenizer)
    if bos is None:
        raise ValueError("prompts.add_bos is true, but the tokenizer has no BOS; set it to false")
    return with_begin(encode, bos)


def describe(prompts: list[Prompt], given: int, tokenizer: Any, path: Path) -> Iterator[str]:
    """For the log: how many were left out, and what the first prompt looks like as tokens."""
    if len(prompts) < given:
        yield f"{path}: {given - len(prompts)} of {given} prompts are too long and left out"
    tokens = prompts[0].tokens
    pieces = zip(tokenizer.ids_to_tokens(tokens[:_SHOWN_TOKENS]), tokens, strict=False)
    more = f" and {n} more" if (n := len(tokens) - _SHOWN_TOKENS) > 0 else ""
    listed = " ".join(f"{piece}={token}" for piece, token in pieces)
    yield f"{path}: the first prompt's {len(tokens)} tokens: {listed}{more}"


def lacking_bos(prompts: list[Prompt], tokenizer: Any) -> str | None:
    """A warning if the tokenizer has a BOS that prompts do not begin with."""
    bos = bos_token(tokenizer)
    without = sum(prompt.tokens[0] != bos for prompt in prompts)
    if bos is None or not without:
        return None
    piece = tokenizer.ids_to_tokens([bos])[0]
    return (
        f"the tokenizer has a BOS, {piece}={bos}, and {without} of {len(prompts)} prompts do not "
        "begin with it; if the SFT policy was trained with it, set prompts.add_bos=true"
    )


def bos_token(tokenizer: Any) -> int | None:
    """The tokenizer's beginning-of-sequence token; None if it has none of its own.

    GPT-2's is its end-of-sequence token; SentencePiece says -1 for none; older SentencePiece
    tokenizers of NeMo know no ``<s>``, and then answer with the unknown token.
    """
    bos = getattr(tokenizer, "bos_id", None)
    others = (getattr(tokenizer, "eos_id", None), getattr(tokenizer, "unk_id", None))
    return bos if isinstance(bos, int) and bos >= 0 and bos not in others else None
