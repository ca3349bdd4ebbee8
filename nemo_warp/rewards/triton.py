"""A PyTriton server with NeMo-Aligner's reward protocol, on a free port, announced when ready.

Protocol (model inputs and outputs, batch first):

    sentences         bytes   [B, 1]  prompt and response as one UTF-8 text
    prompt_lengths    int64   [B, 1]  optional, ours: how many characters of it are the prompt
    fields            bytes   [B, 1]  optional, ours: what else the prompt's line says, JSON
    keys              int64   [B, 1]  optional, ours: what the client calls these samples. With them
                                      the answer comes at once, with what has been scored by then;
                                      asking again with the same keys gives the rest
    tokens            int64   [B, S]  instead of sentences, where the reward is a model
    sequence_lengths  int64   [B, 1]  with tokens
    rewards           float32 [B, 1]  NaN where a sample could not be scored
    reasons           bytes   [B, 1]  ours: why not; empty where it was scored
    stalled           float32 [B, 1]  ours, with keys: seconds for which an unfinished sample has
                                      made no way; negative where it is finished

The names, types and shapes are those of NeMo-Aligner 0.7.0 (algorithms/reward_server.py:61-66), so
its own client works here; what is marked "ours" it neither sends nor reads.
"""

from __future__ import annotations

import ctypes.util
import logging
import os
import signal
import socket
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_warp.ports import free_port
from nemo_warp.rewards.endpoint import Endpoint, served_name
from nemo_warp.rewards.errors import RewardError

log = logging.getLogger("nemo_warp.rewards")

# Samples; PyTriton's default of 4 would refuse larger requests. Its batcher waits 2 ms for requests
# of other ranks to be put beside this one.
_MAX_BATCH = 1 << 20
_QUEUE_DELAY_US = 2000
_PORT_ATTEMPTS = 3
_POLL_S = 0.5
_EXIT_TIMEOUT_S = 5
_STOP_PATIENCE_S = 8
_MAX_SOCKET_PATH = 107
_ANY_ADDRESS = "0.0.0.0"

Infer = Callable[..., dict[str, np.ndarray]]
"""Called with the inputs that were sent, by name; returns the outputs, see `answer`."""


@dataclass(frozen=True)
class Serving:
    """What a server is started with.

    Attributes:
        run_id: the run it belongs to.
        fingerprint: SHA-256 (hex) of what decides its scores.
        endpoint_file: written once ready, removed at the end.
        host: address to listen on; 0.0.0.0 listens on all and announces the node's name.
        port: 0 chooses a free one.
        token_inputs: also take ``tokens`` and ``sequence_lengths``.
        keyed: take ``fields`` and ``keys``.
        needs, takes: see `Endpoint`.
    """

    run_id: str
    fingerprint: str
    endpoint_file: Path
    host: str = "127.0.0.1"
    port: int = 0
    token_inputs: bool = False
    keyed: bool = False
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] | None = ()

    def __post_init__(self) -> None:
        served_name(self.run_id, self.fingerprint)
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port must be 0 (choose a free one) to 65535, got {self.port}")


def answer(
    scores: np.ndarray, reasons: list[str], stalled: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The outputs of the protocol from scores [B] (float32, NaN = failed) and reasons."""
    encoded = np.array([reason.encode() for reason in reasons], dtype=np.object_)
    seconds = np.full(len(reasons), -1.0) if stalled is None else stalled
    return {
        "rewards": scores.reshape(-1, 1).astype(np.float32),
        "reasons": encoded.reshape(-1, 1),
        "stalled": seconds.reshape(-1, 1).astype(np.float32),
    }


def serve(
    infer: Infer,
    serving: Serving,
    broken: threading.Event | None = None,
    on_stop: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, in the main thread. The endpoint file exists meanwhile.

    Args:
        infer: answers one batch; called in another thread, one call at a time.
        serving: where, as whom.
        broken: set by ``infer`` when it can answer no more.
        on_stop: called when the server is to end: ``infer`` must then return soon.

    Raises:
        RewardError: the server did not start, ended by itself, or is broken.
    """
    stop, broken = threading.Event(), broken or threading.Event()
    # Signals first: a SIGTERM while Triton starts must end in its clean-up.
    with _stopping_on_signals(stop), _started(infer, serving) as (triton, port):
        host = socket.gethostname() if serving.host == _ANY_ADDRESS else serving.host
        endpoint = Endpoint.of_this_process(
            host,
            port,
            serving.run_id,
            serving.fingerprint,
            inputs=tuple(tensor.name for tensor in _inputs(serving)),
            needs=serving.needs,
            takes=serving.takes,
        )
        serving.endpoint_file.parent.mkdir(parents=True, exist_ok=True)
        # Last: clients that see the file send requests at once.
        endpoint.write(serving.endpoint_file)
        log.info("ready at %s:%d as %s", host, port, endpoint.model_name)
        try:
            while not stop.wait(_POLL_S):
                if broken.is_set():
                    raise RewardError("the reward can answer no more: see the log above")
                if not triton.is_alive():
                    raise RewardError(
                        "the Triton server ended by itself: its output above says why"
                    )
        finally:
            # First of all, so that no client is sent here while the server ends.
            endpoint.withdraw(serving.endpoint_file)
            log.info("stopping")
            if on_stop is not None:
                on_stop()


@contextmanager
def _stopping_on_signals(stop: threading.Event) -> Iterator[None]:
    signals = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _started(infer: Infer, serving: Serving) -> Iterator[tuple[Any, int]]:
    """A running Triton and its port; a port of our choice that was taken meanwhile is replaced."""
    _find_libpython()
    # Not PyTriton's default workspace under $HOME: slow on a network file system, and the path of
    # a Unix socket in it may be longer than the 107 bytes allowed.
    with tempfile.TemporaryDirectory(prefix="reward-", ignore_cleanup_errors=True) as scratch:
        _check_length(Path(scratch))
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            port = serving.port or free_port(serving.host)
            _check_port(serving.host, port)
            triton = _prepared(infer, serving, port, Path(scratch) / str(attempt))
            try:
                if _runs(triton):
                    yield triton, port
                    return
            finally:
                _stop(triton)
            if serving.port:
                break
    raise RewardError(
        f"the Triton server did not start on port {port}: the output above says why; "
        "PyTriton needs a temporary directory that allows execution (TMPDIR)"
    )


def _prepared(infer: Infer, serving: Serving, port: int, workspace: Path) -> Any:
    from pytriton.model_config import DynamicBatcher, ModelConfig
    from pytriton.triton import Triton, TritonConfig

    logging.getLogger("pytriton").setLevel(logging.WARNING)
    config = TritonConfig(
        http_address=serving.host,
        http_port=port,
        # One port less each: servers of several runs share a node, and fixed ports collide
        # (NeMo-Aligner's are 5555 and 5567).
        allow_grpc=False,
        allow_metrics=False,
        exit_timeout_secs=_EXIT_TIMEOUT_S,
    )
    triton = Triton(config=config, workspace=workspace)
    triton.bind(
        model_name=served_name(serving.run_id, serving.fingerprint),
        infer_func=_batched(infer),
        inputs=_inputs(serving),
        outputs=_outputs(),
        config=ModelConfig(
            max_batch_size=_MAX_BATCH,
            batcher=DynamicBatcher(max_queue_delay_microseconds=_QUEUE_DELAY_US),
        ),
    )
    return triton


def _runs(triton: Any) -> bool:
    """Start it and wait until the model answers; False if it ended or never answered."""
    from tritonclient.utils import InferenceServerException

    try:
        triton.run()
    except (OSError, InferenceServerException) as error:
        log.error("%s", error)
        return False
    return triton.is_alive()  # not if another server holds the port and answered in its place


def _stop(triton: Any) -> None:
    """Stop Triton, but wait only so long for a reward that hangs."""
    # Triton.stop waits for the call under way, which a stranger's code may never end.
    stopping = threading.Thread(target=triton.stop, daemon=True)
    stopping.start()
    stopping.join(_STOP_PATIENCE_S)
    if stopping.is_alive():
        log.warning("a request still hangs after %d s; leaving it behind", _STOP_PATIENCE_S)


def _batched(infer: Infer) -> Any:
    from pytriton.decorators import batch, group_by_keys

    # group_by_keys: requests with different optional inputs cannot be stacked into one array.
    return group_by_keys(batch(lambda **inputs: infer(**inputs)))


def _inputs(serving: Serving) -> list[Any]:
    from pytriton.model_config import Tensor

    text = [
        Tensor(name="sentences", shape=(1,), dtype=bytes, optional=serving.token_inputs),
        Tensor(name="prompt_lengths", shape=(1,), dtype=np.int64, optional=True),
    ]
    if serving.keyed:
        text += [
            Tensor(name="fields", shape=(1,), dtype=bytes, optional=True),
            Tensor(name="keys", shape=(1,), dtype=np.int64, optional=True),
        ]
    if not serving.token_inputs:
        return text
    return [
        *text,
        Tensor(name="tokens", shape=(-1,), dtype=np.int64, optional=True),
        Tensor(name="sequence_lengths", shape=(-1,), dtype=np.int64, optional=True),
    ]


def _outputs() -> list[Any]:
    from pytriton.model_config import Tensor

    return [
        Tensor(name="rewards", shape=(1,), dtype=np.float32),
        Tensor(name="reasons", shape=(1,), dtype=bytes),
        Tensor(name="stalled", shape=(1,), dtype=np.float32),
    ]


def _check_port(host: str, port: int) -> None:
    """Refuse a port in use before Triton's slow start.

    Raises:
        RewardError: something else listens there, or ``host`` is not this machine's.
    """
    with socket.socket() as probe:
        # As Triton does: a port whose last connections are in TIME_WAIT is free to it.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise RewardError(
                f"cannot listen on {host}:{port} ({error.strerror}); "
                "use --port 0 for a free port and a --host of this machine"
            ) from error


def _check_length(scratch: Path) -> None:
    """Refuse a temporary directory too deep for Triton's sockets.

    Raises:
        RewardError: a socket's path in it would be too long.
    """
    longest = scratch / "1" / f"{served_name('any', '0' * 64)}_0_0-server.sock"
    if len(os.fsencode(longest)) > _MAX_SOCKET_PATH:
        raise RewardError(
            f"the temporary directory {scratch.parent} is too deep for Triton's sockets "
            f"({longest} has more than {_MAX_SOCKET_PATH} bytes): set TMPDIR to a shorter path"
        )


def _find_libpython() -> None:
    """Let Triton's Python stub, a separate program, load the libpython of this interpreter.

    Raises:
        RewardError: this interpreter has no shared libpython.
    """
    # The stub is linked to libpythonX.Y.so, which uv's and conda's interpreters keep in a folder
    # that the loader does not search.
    library, directory = (sysconfig.get_config_var(name) for name in ("INSTSONAME", "LIBDIR"))
    if directory and library and (Path(directory) / library).exists():
        present = os.environ.get("LD_LIBRARY_PATH")
        os.environ["LD_LIBRARY_PATH"] = f"{directory}:{present}" if present else directory
    elif ctypes.util.find_library(f"python{sysconfig.get_python_version()}") is None:
        version = sysconfig.get_python_version()
        raise RewardError(
            f"PyTriton needs the shared library libpython{version}.so, and this Python has none: "
            f"install it (Debian: apt-get install libpython{version}) or use a Python built with "
            "--enable-shared"
        )
