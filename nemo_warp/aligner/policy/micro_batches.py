"""Which sequences go through the model together: alike in length, cut to the longest of them.

No NeMo. The choice does not change results. It decides how much padding is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class MicroBatch:
    """Rows of a local batch, and how many input tokens of each are read."""

    rows: list[int]
    width: int

    def cut(self, tokens: Tensor, others: Mapping[str, Tensor], pad: int) -> dict[str, Tensor]:
        """This micro batch's inputs.

        Args:
            tokens: int64 [B, S].
            others: [B, S-1, ...], of the predicted positions; 0 where they are padded.
            pad: token.

        Returns:
            ``inputs`` and ``targets`` int64 [b, width], and ``others`` [b, width, ...].
        """
        rows = torch.tensor(self.rows, device=tokens.device)
        parts = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], **others}
        fill = {"inputs": pad, "targets": pad}
        return {
            name: _to_width(part.index_select(0, rows), self.width, fill.get(name, 0))
            for name, part in parts.items()
        }


def needed_inputs(mask: Tensor) -> list[int]:
    """Input tokens up to the last position that counts, of each row of ``mask`` [B, S-1]."""
    position = torch.arange(1, mask.size(1) + 1, device=mask.device)
    return (position * (mask != 0)).amax(1).tolist()


def plan_micro_batches(
    lengths: list[int], size: int, tokens: int | None = None, multiple: int = 1
) -> list[MicroBatch]:
    """Put rows together, the longest first, so that memory peaks at the beginning.

    Args:
        lengths: input tokens that each row needs.
        size: rows of each micro batch; not used with ``tokens``.
        tokens: rows are added until a micro batch would hold more, padding included; one that is
            longer stands alone.
        multiple: widths are rounded up to it (sequence parallelism: TP).
    """
    # sorted is stable: rows of equal length keep their order, so that a run can be repeated
    # exactly.
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    planned: list[MicroBatch] = []
    rows: list[int] = []
    for row in order:
        width = _rounded(lengths[rows[0]] if rows else lengths[row], multiple)
        full = len(rows) == size if tokens is None else (len(rows) + 1) * width > tokens
        if rows and full:
            planned.append(MicroBatch(rows, width))
            rows = []
        rows.append(row)
    if rows:
        planned.append(MicroBatch(rows, _rounded(lengths[rows[0]], multiple)))
    return planned


def _rounded(length: int, multiple: int) -> int:
    # At least one token: a row without a position that counts still goes through the model with its
    # micro batch.
    return -(-max(length, 1) // multiple) * multiple


def _to_width(rows: Tensor, width: int, fill: int) -> Tensor:
    behind = (0, 0) * (rows.dim() - 2)
    return functional.pad(rows[:, :width], (*behind, 0, max(0, width - rows.size(1))), value=fill)
