"""One exchange with a reward server, over the protocol of `nemo_warp.rewards.triton`."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

import numpy as np

from nemo_warp.rewards.endpoint import Endpoint
from nemo_warp.rewards.errors import RewardError, RewardTimeoutError
from nemo_warp.rewards.scores import RewardScores

_CONNECT_TIMEOUT_S = 10.0


def _after_fork() -> None:
    """gevent, which tritonclient connects with, waits for ever in a forked process otherwise."""
    if "gevent" in sys.modules:
        import gevent

        gevent.reinit()


os.register_at_fork(after_in_child=_after_fork)


def check_ready(endpoint: Endpoint) -> None:
    """Return if the server is up and serves the endpoint's model.

    Raises:
        RewardError: it does not, or cannot be reached.
    """
    with _connected(endpoint, _CONNECT_TIMEOUT_S) as connection:
        ready = connection.is_server_ready() and connection.is_model_ready(endpoint.model_name)
    if not ready:
        raise RewardError(f"the server at {endpoint.address} does not serve {endpoint.model_name}")


@dataclass(frozen=True)
class Sample:
    """A text to be scored.

    Attributes:
        prompt, response: the text.
        fields: what else the prompt's line says.
        key: what the client calls it, unlike any other (63 bits).
    """

    prompt: str
    response: str
    fields: Mapping[str, Any]
    key: int


@dataclass(frozen=True)
class Reply:
    """A server's answer.

    Attributes:
        scores: of all samples; what is unfinished has failed in it.
        stalled: seconds [N] for which an unfinished sample has made no way; negative where it is
            finished.
    """

    scores: RewardScores
    stalled: np.ndarray


def infer(endpoint: Endpoint, samples: Sequence[Sample], timeout_s: float) -> Reply:
    """Ask about one batch, with as much as the server understands.

    Raises:
        RewardTimeoutError: no answer within ``timeout_s``.
        RewardError: no answer, or not one to this question.
    """
    from tritonclient.http import InferInput

    columns: dict[str, tuple[str, list[Any]]] = {
        "sentences": ("BYTES", [(s.prompt + s.response).encode() for s in samples]),
        # In characters, see serve._samples.
        "prompt_lengths": ("INT64", [len(s.prompt) for s in samples]),
        "fields": ("BYTES", [_taken(s.fields, endpoint.takes) for s in samples]),
        "keys": ("INT64", [s.key for s in samples]),
    }
    # Servers of earlier versions refuse inputs that they do not know.
    known = {"sentences", "prompt_lengths", *endpoint.inputs}
    if all(text == b"{}" for text in columns["fields"][1]):
        known.discard("fields")  # each tensor costs the server time
    inputs = []
    for name in columns.keys() & known:
        kind, values = columns[name]
        tensor = InferInput(name, [len(values), 1], kind)
        dtype = np.object_ if kind == "BYTES" else np.int64
        tensor.set_data_from_numpy(np.array(values, dtype).reshape(-1, 1))
        inputs.append(tensor)
    with _connected(endpoint, timeout_s) as connection:
        return _reply(connection.infer(endpoint.model_name, inputs), len(samples))


def problem_of(sample: Sample) -> str:
    """Why a sample cannot be sent; "" if it can."""
    try:
        (sample.prompt + sample.response).encode()
        if sample.fields:
            json.dumps(sample.fields)
    except UnicodeError as error:
        return f"not a text: {error}"
    except (TypeError, ValueError, RecursionError) as error:
        return f"the fields of its prompt are no JSON: {error}"
    return ""


def _taken(fields: Mapping[str, Any], names: Sequence[str] | None) -> bytes:
    if not fields or names == ():
        return b"{}"
    kept = fields if names is None else {n: fields[n] for n in names if n in fields}
    return json.dumps(kept).encode()


def _reply(result: Any, num_samples: int) -> Reply:
    values, reasons, stalled = map(result.as_numpy, ("rewards", "reasons", "stalled"))
    if values is None or values.shape != (num_samples, 1):
        shape = None if values is None else values.shape
        raise RewardError(f"the reward server returned rewards {shape} for {num_samples} samples")
    told = [""] * num_samples if reasons is None else [why.decode() for why in reasons[:, 0]]
    seconds = np.full(num_samples, -1.0) if stalled is None else stalled[:, 0]
    return Reply(RewardScores.of(values[:, 0], told), seconds)


@contextmanager
def _connected(endpoint: Endpoint, timeout_s: float) -> Iterator[Any]:
    """A connection to the server; whatever the transport raises becomes a RewardError."""
    from tritonclient.http import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    try:
        with InferenceServerClient(
            endpoint.address,
            # A connection of its own for each attempt: one that died half-way would answer the next
            # question with the last one's rest.
            connection_timeout=min(timeout_s, _CONNECT_TIMEOUT_S),
            network_timeout=timeout_s,
        ) as connection:
            yield connection
    # Before OSError, of which it is one: only a time-out makes the next request smaller.
    except TimeoutError as error:
        raise RewardTimeoutError(
            f"the server at {endpoint.address} did not answer in {timeout_s:g} s"
        ) from error
    except (InferenceServerException, OSError, HTTPException) as error:
        text = f"{type(error).__name__}: {error}".rstrip(": ")
        raise RewardError(
            f"the server at {endpoint.address} failed ({text}){_hint(endpoint)}"
        ) from error


def _hint(endpoint: Endpoint) -> str:
    if endpoint.host.startswith("127.") and endpoint.node != socket.gethostname():
        return f"; it listens only inside {endpoint.node}: start it with --host 0.0.0.0"
    return ""
