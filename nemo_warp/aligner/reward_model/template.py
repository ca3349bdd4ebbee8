"""A reward model's own chat template: conversations become the texts that it was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

Message = Mapping[str, str]


class ChatTemplate:
    """A template as Hugging Face's tokenizers have them.

    Args:
        source: its text (Jinja).
        tokens: texts of special tokens by the names that templates use (``bos_token``, ...).

    Raises:
        ValueError: it is no template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        # Blocks' lines vanish, as in transformers (utils/chat_template_utils.py).
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"the chat template cannot be read: {error}") from None
        self._tokens = dict(tokens)

    def text(self, messages: Sequence[Message], response: str) -> str:
        """The conversation with the response as the assistant's last message.

        Raises:
            ValueError: the messages are none, or the template refuses them.
        """
        if not messages or not all(isinstance(m, Mapping) and "content" in m for m in messages):
            raise ValueError("the prompt's field 'messages' holds no messages {role, content}")
        talk = [*messages, {"role": "assistant", "content": response}]
        try:
            return self._template.render(messages=talk, add_generation_prompt=False, **self._tokens)
        except Exception as error:  # templates raise what their authors like
            raise ValueError(f"the chat template says: {error}") from None


def template_source(path: Path) -> str:
    """Of a file of Jinja, or a Hugging Face ``tokenizer_config.json``.

    Raises:
        ValueError: there is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found: Any = json.loads(text)["chat_template"] if path.suffix == ".json" else text
    except FileNotFoundError:
        raise ValueError(f"no chat template {path}") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} holds no chat template ({error!r})") from None
    if not isinstance(found, str) or not found.strip():
        raise ValueError(f"{path} holds no chat template")
    return found


def special_tokens(tokenizer: Any) -> dict[str, str]:
    """Texts of a NeMo tokenizer's special tokens, where its texts may hold any."""
    inner = getattr(tokenizer, "tokenizer", None)
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    return {name: str(getattr(inner, name, None) or "") for name in names}


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
