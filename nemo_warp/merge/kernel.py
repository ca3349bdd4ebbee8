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
Block = torch.Tensor | list[torch.Tensor]
"""A block in every model: [N, length], or a list of [length] where dtypes or places differ."""

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
        self._filled = 0
        self._gram = torch.zeros(num_inputs, num_inputs, dtype=torch.float64)
        self._projections = torch.zeros(num_outputs, dtype=torch.float64)

    def gram(self, block: Block) -> np.ndarray:
        """[N, N] Gram matrix of (theta_init, delta_1 ..) over one block."""
        self._load(block)
        self.inputs[1:] -= self.inputs[0]
        torch.mm(self.inputs, self.inputs.t(), out=self._gram)
        return self._gram.numpy().copy()

    def merge(self, block: Block, coefficients: torch.Tensor) -> torch.Tensor:
        """Linear combinations of one block.

        Args:
            block: the block in every model.
            coefficients: [K + 1, N] float64; the last row is the merged task vector.

        Returns:
            [K, length] float64 merged values, a view of scratch that `project` uses up.
        """
        length = self._load(block)
        torch.mm(coefficients, self.inputs, out=self.outputs)
        return self.outputs[:-1, :length]

    def project(self, rounded: torch.Tensor) -> np.ndarray:
        """[K] inner products of the rounded outputs [K, length] with the merged task vector."""
        self.outputs[:-1, : rounded.shape[1]].copy_(rounded)
        torch.mv(self.outputs[:-1], self.outputs[-1], out=self._projections)
        return self._projections.numpy()

    def _load(self, block: Block) -> int:
        """Convert a block to float64, zeros after its end; returns its length."""
        length = block[0].numel()
        if isinstance(block, torch.Tensor):
            self.inputs[:, :length].copy_(block)
        else:
            for row, source in zip(self.inputs, block, strict=True):
                row[:length].copy_(source)
        if length < self._filled:
            self.inputs[:, length : self._filled] = 0.0
        self._filled = length
        return length


def count_changed(init: torch.Tensor, rounded: torch.Tensor) -> list[int]:
    """[K] numbers of elements of ``rounded`` [K, length] that differ from ``init`` [length]."""
    if rounded.dtype != init.dtype:
        init = init.to(torch.promote_types(init.dtype, rounded.dtype))
        return [int(torch.count_nonzero(values != init)) for values in rounded]
    bits = _BITS[init.element_size()]  # comparing bits is several times faster
    before, after = init.view(bits).numpy(), rounded.view(bits).numpy()
    return [int(np.count_nonzero(values != before)) for values in after]


def round_stochastically(
    target: torch.Tensor, values: torch.Tensor, rng: np.random.Generator
) -> None:
    """Round float64 ``values`` into bfloat16 ``target``, up or down at random.

    16 uniform random bits below bfloat16's last place are added to the float32 pattern, which is
    then truncated: the expectation is the value itself. Zeros stay zeros.
    """
    bits = values.to(torch.float32).numpy().view(np.uint32)
    noise = rng.integers(0, 1 << 16, size=bits.shape, dtype=np.uint32)
    upper = ((bits + noise) >> 16).astype(np.uint16).view(np.int16)
    target.view(torch.int16).copy_(torch.from_numpy(upper))


def block_rng(seed: int, name: str, eta: float, start: int) -> np.random.Generator:
    """Random bits of one block: a function of the seed and the block's place, nothing else."""
    text = f"{seed}/{name}/{eta!r}/{start}".encode()
    key = int.from_bytes(hashlib.sha256(text).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))
