"""Asking a language model behind an OpenAI-compatible endpoint (vLLM, NIM, hosted models).

One POST to ``URL/chat/completions`` per question: retried where that may help, and never asked
again once its answer is on disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_warp.records import write_json_atomically
from nemo_warp.rewards.errors import RewardError

URL_VARIABLE, KEY_VARIABLE = "OPENAI_BASE_URL", "OPENAI_API_KEY"
# 409 and 425: conflicts and "too early" of gateways; 529: overloaded, of some hosted models.
_WORTH_A_RETRY = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_LONGEST_WAIT_S = 60.0

Message = Mapping[str, str]


class ChatError(RewardError):
    """The model gave no answer."""


@dataclass(frozen=True)
class ChatSettings:
    """Whom to ask, and how.

    Attributes:
        model: its name at the endpoint.
        url: the endpoint up to ``/v1``; "" is the environment's OPENAI_BASE_URL.
        key_variable: the environment's variable that holds the key; a key is no option, since
            options are on record.
        temperature, max_tokens, more: of the request (``more``: any further key of its body).
        timeout_s: of one attempt.
        retries: further attempts after a lost connection, a time-out, and the statuses that say
            "later" (408, 429, 5xx).
        backoff_s: wait before the first of them; doubles each time, +-50 %; what the server asks
            for in ``Retry-After`` counts instead.
        cache: directory of answers, shared by whoever names it; "" is none.
    """

    model: str
    url: str = ""
    key_variable: str = KEY_VARIABLE
    temperature: float = 0.0
    max_tokens: int = 512
    timeout_s: float = 60.0
    retries: int = 4
    backoff_s: float = 1.0
    cache: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if importlib.util.find_spec("aiohttp") is None:
            raise ValueError("it needs aiohttp: pip install 'nemo-warp[judge]'")
        if not self.address.startswith(("http://", "https://")):
            raise ValueError(
                f"url is {self.address!r}, expected http://HOST:PORT/v1; give it as an option, or "
                f"set {URL_VARIABLE}"
            )
        if not (self.model and self.timeout_s > 0 and self.retries >= 0 and self.backoff_s >= 0):
            raise ValueError("a judge needs a model, timeout_s > 0, retries and backoff_s >= 0")

    @property
    def address(self) -> str:
        """Where to ask."""
        return (self.url or os.environ.get(URL_VARIABLE, "")).rstrip("/")


class ChatClient:
    """Asks; usable from any event loop."""

    def __init__(self, settings: ChatSettings) -> None:
        self.settings = settings
        self.asked = 0
        self.from_cache = 0

    async def ask(self, messages: Sequence[Message]) -> str:
        """The model's answer.

        Raises:
            ChatError: none after all attempts, or a refusal that no attempt would change.
        """
        body = {
            "model": self.settings.model,
            "messages": [dict(message) for message in messages],
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
            **self.settings.more,
        }
        # The name is the hash of the whole request: another temperature or template is another
        # question.
        file = self._file(body)
        known = _cached(file) if file else None
        if known is not None:
            self.from_cache += 1
            return known
        text = await self._ask(body)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            # Atomic: many servers share the directory, and write the same answers.
            write_json_atomically(file, {"request": body, "answer": text})
        return text

    async def _ask(self, body: Mapping[str, Any]) -> str:
        attempt = 0
        while True:
            try:
                return await self._attempt(body)
            except _LaterError as later:
                attempt += 1
                if attempt > self.settings.retries:
                    raise ChatError(f"{later} ({attempt} attempts)") from None
                # Not time.sleep: the other questions go on meanwhile.
                await asyncio.sleep(self._wait(attempt, later.seconds))

    async def _attempt(self, body: Mapping[str, Any]) -> str:
        import aiohttp

        self.asked += 1
        key = os.environ.get(self.settings.key_variable, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = aiohttp.ClientTimeout(total=self.settings.timeout_s)
        address = f"{self.settings.address}/chat/completions"
        try:
            async with (
                # trust_env: proxies, as other clients of this protocol know them.
                aiohttp.ClientSession(timeout=timeout, trust_env=True) as session,
                session.post(address, json=body, headers=headers) as response,
            ):
                text = await response.text(errors="replace")
                if response.status in _WORTH_A_RETRY:
                    seconds = _seconds(response.headers.get("Retry-After"))
                    raise _LaterError(f"{address} answered {response.status}", seconds)
        except asyncio.TimeoutError:  # in Python 3.10 not the built-in one
            took = f"no answer within {self.settings.timeout_s:g} s"
            raise _LaterError(f"{address} gave {took}") from None
        except aiohttp.ClientError as error:
            told = f"{type(error).__name__}: {error}"
            raise _LaterError(f"{address} could not be asked ({told})") from None
        # Any other status (a wrong key, a model that is not there) would be the same again.
        if response.status != 200:
            raise ChatError(f"{address} answered {response.status}: {text[:200]!r}")
        return _content(text, address)

    def _wait(self, attempt: int, asked_for: float | None) -> float:
        wait = self.settings.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
        # Bounded: a server that asks for an hour would hold up the whole training step.
        return min(_LONGEST_WAIT_S, wait if asked_for is None else asked_for)

    def _file(self, body: Mapping[str, Any]) -> Path | None:
        if not self.settings.cache:
            return None
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        return Path(self.settings.cache) / digest[:2] / f"{digest}.json"


class _LaterError(Exception):
    """No answer now; ``seconds`` after which to ask again, where the server said so."""

    def __init__(self, message: str, seconds: float | None = None) -> None:
        super().__init__(message)
        self.seconds = seconds


def _content(text: str, address: str) -> str:
    try:
        content = json.loads(text)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        content = None
    if not isinstance(content, str):
        raise ChatError(f"{address} answered with no choices[0].message.content: {text[:200]!r}")
    return content


def _cached(file: Path) -> str | None:
    try:
        answer = json.loads(file.read_text(encoding="utf-8"))["answer"]
    except (OSError, ValueError, LookupError, TypeError):  # a damaged file is asked anew
        return None
    return answer if isinstance(answer, str) else None


def _seconds(header: str | None) -> float | None:
    """Of ``Retry-After``; its other form, a date, is left to the client's own waiting."""
    try:
        return max(0.0, float(header)) if header else None
    except ValueError:
        return None
