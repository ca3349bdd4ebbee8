"""CUDA calls answered by the CPU, for machines without a GPU.

NeMo and Megatron-core call ``torch.cuda`` and ask for ``device="cuda"`` unconditionally. Here
each such call becomes its CPU equivalent or does nothing. Only functions that make or move
tensors are wrapped: a `TorchFunctionMode` would tax every operation, and only in the thread
that entered it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import pickle
import queue
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from nemo_warp.aligner.compat.replacements import Replacements

CPU = torch.device("cpu")

_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like"),
    *("linspace", "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like"),
    *("randperm", "tensor", "tril_indices", "triu_indices", "zeros", "zeros_like"),
)
_TENSOR_FACTORIES = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")
_TENSOR_TYPES = ("Bool", "Byte", "Double", "Float", "Half", "Int", "Long")


def replace_before_nemo(replacements: Replacements) -> None:
    """What must be in place before NeMo and Megatron-core are imported."""
    _switch_compiler_off(replacements)
    _replace_device_calls(replacements)
    _replace_random_state(replacements)
    _replace_streams(replacements)
    _replace_tensor_making(replacements)
    _replace_collectives(replacements)


def replace_in_nemo(replacements: Replacements) -> None:
    """What has to be set in NeMo's and Megatron's own modules (imports them)."""
    from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin
    from lightning.pytorch.accelerators import CUDAAccelerator
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel import random
    from nemo.core.classes import ModelPT

    # Lightning asks only this to choose between "cuda" and "cpu", and with it NCCL or gloo.
    unavailable = staticmethod(lambda: False)
    replacements.set(
        CUDAAccelerator, "is_available", unavailable, "accelerator=auto is the CPU, with gloo"
    )
    # Both define cuda() themselves, so that Module's replacement below does not reach them.
    for module_class in (_DeviceDtypeModuleMixin, ModelPT):
        replacements.set(module_class, "cuda", _unmoved, "the CPU")
    replacements.set(random, "_set_cuda_rng_state", _set_random_state, "the CPU's generator")
    replacements.set(
        filesystem_async,
        # Megatron-core 0.11, dist_checkpointing/strategies/filesystem_async.py.
        "_get_write_results_queue",
        _Results,
        "a file: no fresh interpreter is needed to save a checkpoint",
    )


def _switch_compiler_off(replacements: Replacements) -> None:
    # First of all: torch._dynamo makes a table of torch's own functions when it is imported.
    config: Any = importlib.import_module("torch._dynamo.config")
    config.disable = True
    replacements.record("torch.compile", "off: Megatron's fused functions run eagerly")


# ----------------------------------------------------------------------------- torch.cuda calls


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Take the place of a call that has no meaning on a CPU."""


def _unmoved(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self


def _replace_device_calls(replacements: Replacements) -> None:
    # A torch.device instead of an index: Megatron and NeMo only pass it on as `device=`.
    replacements.set(torch.cuda, "current_device", lambda: CPU, "the CPU")
    replacements.set(torch.cuda, "device_count", lambda: 1, "1, or NeMo would not seed")
    replacements.set(torch.cuda, "mem_get_info", _memory_in_bytes, "the machine's memory")
    # On a CPU these would raise "no NVIDIA driver".
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        replacements.set(torch.cuda, name, _nothing, "nothing")
    for name in ("range_push", "range_pop"):
        replacements.set(torch.cuda.nvtx, name, _nothing, "nothing")
    # NeMo makes tensors as torch.cuda.LongTensor([...]); BFloat16 it only names, see _type_on_cuda.
    for name in _TENSOR_TYPES:
        kind = f"{name}Tensor"
        replacements.set(torch.cuda, kind, getattr(torch, kind), f"torch.{kind}")


def _memory_in_bytes(*args: Any) -> tuple[int, int]:
    import psutil

    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _get_random_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_random_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _replace_random_state(replacements: Replacements) -> None:
    # not torch.manual_seed, which calls back into torch.cuda
    seed = torch.default_generator.manual_seed
    # torch.cuda has imported the functions from torch.cuda.random: two names each, both are used.
    for module in (torch.cuda, torch.cuda.random):
        replacements.set(module, "get_rng_state", _get_random_state, "the CPU's generator")
        replacements.set(module, "set_rng_state", _set_random_state, "the CPU's generator")
        replacements.set(module, "manual_seed", seed, "the CPU's generator")


class _Stream:
    """The CPU's only stream, or an event on it: everything before has happened already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = CPU

    record = synchronize = wait = wait_event = wait_stream = _nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Stream) -> float:
        return 0.0


def _replace_streams(replacements: Replacements) -> None:
    for name in ("Stream", "Event", "current_stream", "default_stream"):
        replacements.set(torch.cuda, name, _Stream, "everything is synchronous")
    replacements.set(
        torch.cuda, "stream", lambda stream: contextlib.nullcontext(), "everything is synchronous"
    )
    replacements.set(torch.cuda, "is_current_stream_capturing", lambda: False, "False")


# ------------------------------------------------------------------------------ device="cuda"


def _is_cuda(device: Any) -> bool:
    if type(device) is str:
        return device.startswith("cuda")
    return type(device) is torch.device and device.type == "cuda"


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """``factory`` with a CUDA ``device`` keyword read as the CPU."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    # so that it pickles by reference, as the function it stands for does
    make.__module__, make.__qualname__ = "torch", factory.__name__
    return make


def _moved_to_cpu(move: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor.to`` with a CUDA device, by position or keyword, read as the CPU."""

    @functools.wraps(move)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        elif "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        return move(self, *args, **kwargs)

    return to


def _type_on_cuda(type_: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor.type``: without arguments it names the CUDA type; such a name means the CPU's.

    NeMo and Megatron-core tell bf16 from fp32 parameters by ``param.type()`` and the names of CUDA
    types only (optimizer_with_main_params.py l.311, Megatron's optimizer/optimizer.py).
    """

    @functools.wraps(type_)
    def named(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs:
            return type_(self).replace("torch.", "torch.cuda.", 1)
        if args and isinstance(args[0], str):
            args = (args[0].replace("torch.cuda.", "torch."), *args[1:])
        return type_(self, *args, **kwargs)

    return named


def _replace_tensor_making(replacements: Replacements) -> None:
    builtins = importlib.import_module("torch.jit._builtins")
    # Wrapped one by one, since a default device would not win over an explicit device="cuda".
    for name in _FACTORIES:
        factory = getattr(torch, name)
        wrapped = _on_cpu(factory)
        operator = builtins._find_builtin(factory)
        if operator is not None:  # so that torch.jit.script still knows the function
            builtins._register_builtin(wrapped, operator)
        replacements.set(torch, name, wrapped, 'device="cuda" is the CPU')
    for name in _TENSOR_FACTORIES:
        wrapped = _on_cpu(getattr(torch.Tensor, name))
        replacements.set(torch.Tensor, name, wrapped, 'device="cuda" is the CPU')
    replacements.set(torch.Tensor, "to", _moved_to_cpu(torch.Tensor.to), '"cuda" is the CPU')
    replacements.set(torch.Tensor, "cuda", _unmoved, "the CPU")
    replacements.set(torch.Tensor, "type", _type_on_cuda(torch.Tensor.type), "says torch.cuda")
    replacements.set(torch.nn.Module, "cuda", _unmoved, "the CPU")


# ------------------------------------------------------------------------- processes and ranks


def _replace_collectives(replacements: Replacements) -> None:
    all_gather = torch.distributed.all_gather_into_tensor

    @functools.wraps(all_gather)
    def all_gather_into_tensor(
        output: torch.Tensor, tensor: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        return all_gather(output, torch.atleast_1d(tensor), *args, **kwargs)

    replacements.set(
        torch.distributed,
        "all_gather_into_tensor",
        all_gather_into_tensor,
        "a 0-d input is made 1-d, which gloo asks for and NCCL does not",
    )
    all_reduce = torch.distributed.all_reduce

    @functools.wraps(all_reduce)
    def all_reduce_in_order(*args: Any, **kwargs: Any) -> Any:
        work = all_reduce(*args, **kwargs)
        if work is not None:
            work.wait()
        return work

    replacements.set(
        torch.distributed,
        "all_reduce",
        all_reduce_in_order,
        "async_op waits: on a GPU the stream keeps the order (NeMo's fp32 masters rely on it, "
        "optimizer_with_main_params.py l.355), gloo has none",
    )


class _Results:
    """Megatron's queue for the results of a checkpoint's writers, as an unlinked file.

    The original starts a server in a fresh interpreter on every rank, which costs seconds and
    outlives a rank that is killed. Forked writers share the file.
    """

    def __init__(self) -> None:
        # Unbuffered: writers are forked, and a buffer that was copied by a fork is written twice.
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (open as long as self)
        self._offset = 0

    def __del__(self) -> None:
        self._file.close()

    def put(self, item: Any) -> None:
        self._file.seek(0, io.SEEK_END)
        self._file.write(pickle.dumps(item))

    def get_nowait(self) -> Any:
        # Forked processes share one file position, so every read and write says where.
        self._file.seek(self._offset)
        # A writer puts one small pickle with a single write(2) and is joined before results are
        # read, so there is never half of one.
        stream = io.BytesIO(self._file.read())
        if not stream.getbuffer():
            raise queue.Empty
        item = pickle.load(stream)
        self._offset += stream.tell()
        return item
