"""A Hugging Face sequence classifier as reward model, on a GPU or a CPU.

    --callable nemo_warp.rewards.library.classifier:Classifier --batch-size 64
    --options '{"model": "/models/Skywork-Reward", "form": "chat"}'

Its texts are made anew from the prompt and the response, with its own tokenizer and chat template.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_warp.records import hash_file

FORMS = ("text", "pair", "chat")
_FORMS_HELP = "text (prompt and response as one), pair (two segments) or chat (its template)"


class Classifier:
    """The classifier's logit of a label, or its probability.

    A text longer than the classifier reads is a failure: half a text has another score.

    Args:
        model: directory of the model and its tokenizer; nothing is fetched.
        form: what it reads: ``text``, ``pair``, or ``chat``: the conversation in the field
            ``messages`` (or else the prompt as the user's one message), and the response.
        label: name or number of the label that counts; null where the model has one output.
        probability: score its probability (softmax over labels, sigmoid of a single one), not the
            logit.
        device: torch's; null is the GPU if there is one.
        dtype: torch's; null is bfloat16 on a GPU and float32 on a CPU.
        micro_batch_size: texts in one forward pass; they are sorted by length first.
        max_tokens: longer texts fail; null is what tokenizer and model say.
    """

    distributions = ("transformers", "torch")
    undeciding = ("device", "micro_batch_size")
    takes_lists = True

    def __init__(
        self,
        model: str,
        form: str = "text",
        label: str | int | None = None,
        probability: bool = False,
        device: str | None = None,
        dtype: str | None = None,
        micro_batch_size: int = 16,
        max_tokens: int | None = None,
    ) -> None:
        _check(model, form, micro_batch_size)
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        kind = dtype or ("bfloat16" if self._device.startswith("cuda") else "float32")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
            self._model = AutoModelForSequenceClassification.from_pretrained(
                model, local_files_only=True, torch_dtype=getattr(torch, kind)
            )
        except (OSError, ValueError, KeyError, AttributeError) as error:
            told = str(error).partition("\n")[0]
            raise ValueError(f"{model} cannot be loaded as a sequence classifier: {told}") from None
        self._model.to(self._device).eval()
        self._form, self._probability, self._size = form, probability, micro_batch_size
        self._label = _label(self._model.config, label, model)
        self._max_tokens = max_tokens or _longest(self._tokenizer, self._model.config)
        self._inputs = inspect.signature(self._model.forward).parameters
        self._lock = threading.Lock()
        # Of all its files: the same directory with other weights is another reward.
        self.identity = hash_file(Path(model)).sha256

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        messages: Sequence[Sequence[Mapping[str, str]] | None] | None = None,
    ) -> list[float | Exception]:
        """Scores [B], an exception in place of one that cannot be had."""
        given = messages or [None] * len(prompts)
        encoded = [self._encode(*one) for one in zip(prompts, responses, given, strict=True)]
        problems = [self._problem(one) for one in encoded]
        scores: list[float | Exception] = [ValueError(problem) for problem in problems]
        good = [place for place, problem in enumerate(problems) if not problem]
        # Texts of about one length together: padding costs as much as text.
        good.sort(key=lambda place: len(encoded[place]["input_ids"]))
        with self._lock:  # one model
            for places in self._batches(good, encoded):
                values = self._forward([encoded[place] for place in places])
                for place, value in zip(places, values, strict=True):
                    scores[place] = value
        return scores

    def _encode(
        self, prompt: str, response: str, messages: Sequence[Mapping[str, str]] | None
    ) -> dict[str, list[int]]:
        if self._form != "chat":
            texts = (prompt, response) if self._form == "pair" else (prompt + response,)
            encoded = self._tokenizer(*texts)
            # Tokenizers of one kind make segment numbers, also for models that know none.
            return {name: encoded[name] for name in self._inputs if name in encoded}
        talk = [*(messages or [{"role": "user", "content": prompt}])]
        ids = self._tokenizer.apply_chat_template(
            [*talk, {"role": "assistant", "content": response}]
        )
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def _problem(self, encoded: Mapping[str, list[int]]) -> str:
        """Why a text is not scored; "" if it is."""
        length = len(encoded["input_ids"])
        if length == 0:
            return "the text is empty"
        if length > self._max_tokens:
            return f"the text has {length} tokens, the classifier reads {self._max_tokens}"
        return ""

    def _batches(
        self, places: list[int], encoded: Sequence[Mapping[str, list[int]]]
    ) -> list[list[int]]:
        """Micro batches; a text that holds the padding token itself is alone.

        A decoder's score is read before its first padding token (transformers' Llama and others),
        which is in the midst of a conversation where the end token pads as well.
        """
        pad = self._tokenizer.pad_token_id
        alone = [i for i in places if pad is None or pad in encoded[i]["input_ids"]]
        others = [i for i in places if i not in set(alone)]
        batches = [others[i : i + self._size] for i in range(0, len(others), self._size)]
        return [*batches, *([place] for place in alone)]

    def _forward(self, encoded: list[dict[str, list[int]]]) -> list[float]:
        import torch

        if len(encoded) == 1:
            # transformers looks for the padding to find the last token; a single text has none.
            self._model.config.pad_token_id = None
            batch = {name: torch.tensor([ids]) for name, ids in encoded[0].items()}
        else:
            self._model.config.pad_token_id = self._tokenizer.pad_token_id
            batch = self._tokenizer.pad(encoded, return_tensors="pt").data
        with torch.inference_mode():
            # float32: bf16 logits near 8 come in steps of 1/16, and equal scores give no gradient.
            logits = self._model(**{k: v.to(self._device) for k, v in batch.items()}).logits.float()
        if self._probability:
            logits = logits.sigmoid() if logits.size(1) == 1 else logits.softmax(-1)
        return logits[:, self._label].tolist()


def _check(model: str, form: str, micro_batch_size: int) -> None:
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("it needs transformers: pip install 'nemo-warp[classifier]'")
    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"model: {model} holds no config.json; give a Hugging Face directory")
    if form not in FORMS:
        raise ValueError(f"form is {form!r}, expected {_FORMS_HELP}")
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size must be at least 1, got {micro_batch_size}")


def _label(config: Any, label: str | int | None, model: str) -> int:
    names = {number: str(name) for number, name in config.id2label.items()}
    if label is None and len(names) == 1:
        return 0
    for number, name in names.items():
        if label is not None and label in (number, name):
            return number
    known = ", ".join(f"{number} ({name})" for number, name in names.items())
    raise ValueError(f"label is {label!r}, but {model} has the labels {known}: name one")


def _longest(tokenizer: Any, config: Any) -> int:
    positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
    return min(positions, tokenizer.model_max_length)
