"""A language model that sees two responses and says which is better, asked in both orders."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_warp.rewards.library.chat import ChatClient, ChatError, ChatSettings
from nemo_warp.rewards.library.judge import filled

_TEMPLATE = """\
Below are a prompt and two responses to it, A and B. Judge which one is more helpful, correct and \
well written. Their order and their length say nothing about their quality. Think briefly, then \
end with one of these lines:
Verdict: A much better
Verdict: A better
Verdict: A slightly better
Verdict: tie
Verdict: B slightly better
Verdict: B better
Verdict: B much better

[Prompt]
{prompt}

[Response A]
{first}

[Response B]
{second}
"""
_VERDICT = re.compile(r"verdict\W{0,4}(?:(tie)\b|([ab])\W{1,3}((?:much |slightly )?better))", re.I)

Pair = tuple[str, str, str]
"""Prompt, first and second response."""


@dataclass(frozen=True)
class Verdicts:
    """Of N pairs, in the words of `nemo_warp.evidence.preference`; "" where there is none.

    Attributes:
        straight: with the first response shown as A.
        swapped: with the first response shown as B.
        reason: why a verdict is missing, of the first one that is; "" if none is.
    """

    straight: list[str]
    swapped: list[str]
    reason: str


class Pairwise:
    """A judge of pairs.

    Args:
        model: its name at the endpoint.
        template: what it is asked; {prompt}, {first} and {second} are filled in. Its answer must
            hold one of the lines of the usual template; the last counts.
        settings: further options, see `ChatSettings`.
    """

    def __init__(self, model: str, template: str = _TEMPLATE, **settings: Any) -> None:
        lacking = [name for name in ("{first}", "{second}") if name not in template]
        if lacking:
            raise ValueError(f"template does not hold {lacking[0]}: the judge would not see it")
        try:
            self.client = ChatClient(ChatSettings(model, **settings))
        except TypeError as error:
            raise ValueError(f"an option of no judge: {error}") from None
        self._template = template

    def both_orders(
        self,
        pairs: Sequence[Pair],
        concurrency: int = 16,
        told: Callable[[], object] | None = None,
    ) -> Verdicts:
        """Ask about each pair twice, the second time in the other order.

        Args:
            pairs: N pairs.
            concurrency: questions at a time.
            told: called after each answer.
        """
        swapped = [(prompt, second, first) for prompt, first, second in pairs]
        outcomes = asyncio.run(self._ask([*pairs, *swapped], concurrency, told))
        words = [verdict for verdict, _ in outcomes]
        reason = next((why for _, why in outcomes if why), "")
        return Verdicts(words[: len(pairs)], words[len(pairs) :], reason)

    async def _ask(
        self, pairs: Sequence[Pair], concurrency: int, told: Callable[[], object] | None
    ) -> list[tuple[str, str]]:
        slots = asyncio.Semaphore(concurrency)

        async def one(pair: Pair) -> tuple[str, str]:
            async with slots:
                outcome = await self._verdict(*pair)
            if told is not None:
                told()
            return outcome

        return await asyncio.gather(*(one(pair) for pair in pairs))

    async def _verdict(self, prompt: str, first: str, second: str) -> tuple[str, str]:
        """The verdict and "", or "" and why there is none."""
        values = {"prompt": prompt, "first": first, "second": second}
        messages = [{"role": "user", "content": filled(self._template, values)}]
        try:
            answer = await self.client.ask(messages)
        except ChatError as error:
            return "", str(error)
        verdict = verdict_of(answer)
        return verdict, "" if verdict else f"the judge gave no verdict: {answer[-200:]!r}"


def verdict_of(answer: str) -> str:
    """The last verdict in an answer, such as ``A much better`` or ``tie``; "" if there is none."""
    found = list(_VERDICT.finditer(answer))
    if not found:
        return ""
    tie, side, words = found[-1].groups()
    return "tie" if tie else f"{side.upper()} {words.lower()}"
