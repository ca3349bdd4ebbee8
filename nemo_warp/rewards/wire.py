"""One exchange with a reward server, over the protocol of `nemo_warp.rewards.triton`."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any

import numpy as np

from nemo_warp.rewards.endpoint import Endpoint
from nemo_warp.rewards.errors import RewardError
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


def infer(
    endpoint: Endpoint, prompts: list[str], responses: list[str], timeout_s: float
) -> RewardScores:
    """Score one batch.

    Raises:
        RewardError: no answer within ``timeout_s``, or not one to this question.
    """
    from tritonclient.http import InferInput

    texts = [(p + r).encode() for p, r in zip(prompts, responses, strict=True)]
    sentences = InferInput("sentences", [len(texts), 1], "BYTES")
    sentences.set_data_from_numpy(np.array(texts, np.object_).reshape(-1, 1))
    lengths = InferInput("prompt_lengths", [len(texts), 1], "INT64")
    lengths.set_data_from_numpy(np.array([[len(prompt)] for prompt in prompts], np.int64))
    with _connected(endpoint, timeout_s) as connection:
        result = connection.infer(endpoint.model_name, [sentences, lengths])
        return _scores_in(result, len(texts))


def _scores_in(result: Any, num_samples: int) -> RewardScores:
    values, reasons = result.as_numpy("rewards"), result.as_numpy("reasons")
    if values is None or values.shape != (num_samples, 1):
        shape = None if values is None else values.shape
        raise RewardError(f"the reward server returned rewards {shape} for {num_samples} samples")
    told = [""] * num_samples if reasons is None else [why.decode() for why in reasons[:, 0]]
    return RewardScores.of(values[:, 0], told)


@contextmanager
def _connected(endpoint: Endpoint, timeout_s: float) -> Iterator[Any]:
    """A connection to the server; whatever the transport raises becomes a RewardError."""
    from tritonclient.http import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    try:
        with InferenceServerClient(
            endpoint.address,
            connection_timeout=min(timeout_s, _CONNECT_TIMEOUT_S),
            network_timeout=timeout_s,
        ) as connection:
            yield connection
    except TimeoutError as error:
        raise RewardError(
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
