"""The arithmetic on one block: Gram matrices and merged values, in float64, rounded once.

Each worker thread owns one `Scratch`. Operations are small matrix products on arrays of fixed
shape and alignment, so equal inputs give equal bits on a given machine.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from nemo_warp.merge.blocks import BLOCK

STOCHASTIC = "stochastic"
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Scratch:
    """Working memory of one thread.

    Args:
        num_inputs: models read, the init included.
        num_outputs: outputs written.
    """

    def __init__(self, num_inputs: int, num_outputs: int):
        self.inputs = torch.zeros(num_inputs, BLOCK, dtype=torch.float64)
        self.outputs = torch.zeros(num_outputs + 1, BLOCK, dtype=torch.float64)
        self._gram = torch.zeros(num_inputs, num_inputs, dtype=torch.float64)
        self._projections = torch.zeros(num_outputs, dtype=torch.float64)
        self._differs = np.zeros(BLOCK, dtype=bool)

    def load(self, sources: list[torch.Tensor]) -> int:
        """Convert 1-d ``sources``, one per model, into the scratch; returns their length."""
        length = sources[0].numel()
        for row, source in zip(self.inputs, sources, strict=True):
            row[:length].copy_(source)
        if length < BLOCK:
            self.inputs[:, length:] = 0.0
        return length

    def gram(self, sources: list[torch.Tensor]) -> np.ndarray:
        """[N, N] Gram matrix of (theta_init, delta_1 ..) over one block."""
        self.load(sources)
        self.inputs[1:] -= self.inputs[0]
        torch.mm(self.inputs, self.inputs.t(), out=self._gram)
        return self._gram.numpy().copy()

    def merge(self, sources: list[torch.Tensor], coefficients: torch.Tensor) -> None:
        """Fill ``outputs`` with the linear combinations of one block.

        Args:
            sources: one 1-d tensor per model.
            coefficients: [K + 1, N] float64; the last row is the merged task vector.
        """
        self.load(sources)
        torch.mm(coefficients, self.inputs, out=self.outputs)

    def measure(self, init: torch.Tensor, rounded: list[torch.Tensor]) -> tuple[np.ndarray, list]:
        """Statistics of the rounded outputs of the block last merged; overwrites ``outputs``.

        Args:
            init: the block of theta_init as stored.
            rounded: the block of every output as stored.

        Returns:
            [K] inner products of the rounded outputs with the merged task vector, and [K] counts
            of elements that differ from theta_init.
        """
        length, changed = init.numel(), []
        for row, values in zip(self.outputs, rounded, strict=False):
            row[:length].copy_(values)
            changed.append(self._count_changed(init, values, row[:length]))
        torch.mv(self.outputs[:-1], self.outputs[-1], out=self._projections)
        return self._projections.numpy().copy(), changed

    def _count_changed(self, init: torch.Tensor, values: torch.Tensor, exact: torch.Tensor) -> int:
        differs = self._differs[: init.numel()]
        if values.dtype == init.dtype:  # comparing bits is several times faster
            bits = _BITS[init.element_size()]
            np.not_equal(values.view(bits).numpy(), init.view(bits).numpy(), out=differs)
        else:
            np.not_equal(exact.numpy(), self.inputs[0, : init.numel()].numpy(), out=differs)
        return int(np.count_nonzero(differs))


def round_to(target: torch.Tensor, values: torch.Tensor, rng: np.random.Generator | None) -> None:
    """Round float64 ``values`` into ``target``: to nearest even, or stochastically to bfloat16.

    Stochastic rounding adds 16 uniform random bits below bfloat16's last place to the float32
    pattern and truncates: the expectation is the value itself. Zeros stay zeros.
    """
    if rng is None:
        target.copy_(values)
        return
    bits = values.to(torch.float32).numpy().view(np.uint32)
    noise = rng.integers(0, 1 << 16, size=bits.shape, dtype=np.uint32)
    upper = ((bits + noise) >> 16).astype(np.uint16).view(np.int16)
    target.view(torch.int16).copy_(torch.from_numpy(upper))


def block_rng(seed: int, name: str, eta: float, start: int) -> np.random.Generator:
    """Random bits of one block: a function of the seed and the block's place, nothing else."""
    text = f"{seed}/{name}/{eta!r}/{start}".encode()
    key = int.from_bytes(hashlib.sha256(text).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))
