"""A language model as reward: it is shown prompt and response, and ends with a rating.

--callable nemo_warp.rewards.library.judge:Rating --concurrency 64
--options '{"model": "Qwen/Qwen2.5-72B-Instruct", "url": "http://judge:8000/v1"}'
"""

from __future__ import annotations

import re
from typing import Any

from nemo_warp.rewards.library.chat import ChatClient, ChatSettings

_TEMPLATE = """\
Below are a prompt and a response to it. Judge how helpful, correct and well written the response \
is. Think briefly, then end with a line "Rating: N", where N is a number from {low} (worst) to \
{high} (best).

[Prompt]
{prompt}

[Response]
{response}
"""
_PATTERN = r"(?i)rating\W{0,4}(-?\d+(?:\.\d+)?)"


class Rating:
    """The last rating in the model's answer.

    An answer without one, or with one out of range, is a failure and no number.

    Args:
        model: its name at the endpoint.
        template: what it is asked; {prompt}, {response}, {low}, {high} and the names of the
            prompt's fields are filled in.
        pattern: regular expression with one group, the number.
        low, high: the scale.
        system: a system message; "" is none.
        settings: further options, see `ChatSettings`.
    """

    distributions = ("aiohttp",)
    # The model's name decides, not where it is served: moving it must not make the reward another
    # one, which the member would refuse.
    undeciding = ("url", "key_variable", "timeout_s", "retries", "backoff_s", "cache")

    def __init__(
        self,
        model: str,
        template: str = _TEMPLATE,
        pattern: str = _PATTERN,
        low: float = 1.0,
        high: float = 10.0,
        system: str = "",
        **settings: Any,
    ) -> None:
        try:
            self.client = ChatClient(ChatSettings(model, **settings))
            self._pattern = re.compile(pattern)
        except TypeError as error:
            raise ValueError(f"an option of no judge: {error}") from None
        except re.error as error:
            raise ValueError(f"pattern is no regular expression: {error}") from None
        if self._pattern.groups != 1:
            raise ValueError(f"pattern has {self._pattern.groups} groups, expected 1, the number")
        if "{response}" not in template:
            raise ValueError("template does not hold {response}: the judge would not see it")
        if not low < high:
            raise ValueError(f"low is {low:g} and high {high:g}, expected low < high")
        self._template, self._system = template, system
        self._scale = (low, high)

    async def __call__(self, prompt: str, response: str, **fields: Any) -> float:
        """The rating of one response.

        Raises:
            ChatError: no answer.
            ValueError: no rating in it, or none of the scale.
        """
        low, high = self._scale
        # Fields first: a field called "prompt" must not take the prompt's place.
        given = {**fields, "low": f"{low:g}", "high": f"{high:g}"}
        asked = filled(self._template, {**given, "prompt": prompt, "response": response})
        messages = [{"role": "system", "content": self._system}] if self._system else []
        answer = await self.client.ask([*messages, {"role": "user", "content": asked}])
        found = self._pattern.findall(answer)
        if not found:
            raise ValueError(f"the judge gave no rating: {answer[-200:]!r}")
        # The last one: a judge that thinks aloud weighs other ratings before it.
        rating = float(found[-1])
        if not low <= rating <= high:
            raise ValueError(f"the judge's rating {rating:g} is not from {low:g} to {high:g}")
        return rating


def filled(template: str, values: dict[str, Any]) -> str:
    """The template with each {name} that is known replaced, once; other braces stay."""
    names = "|".join(map(re.escape, values))
    # In one pass, so that a prompt which holds "{response}" is not filled in itself; and not
    # str.format, which would stumble over any other brace.
    return re.sub(rf"\{{({names})\}}", lambda match: str(values[match[1]]), template)
