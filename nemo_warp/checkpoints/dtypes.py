"""Element types of stored tensors, by torch's names. No torch.

To find, check and merge stored elements takes their names and sizes only. torch itself would be
most of a merge's start-up time, and more of its memory than Python and all else that it imports.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dtype:
    """An element type.

    Attributes:
        name: torch's, without ``torch.``.
        itemsize: bytes per element.
        is_floating_point: as torch has it; complex numbers are not.
    """

    name: str
    itemsize: int
    is_floating_point: bool = False

    def __str__(self) -> str:
        return f"torch.{self.name}"

    def of_torch(self) -> torch.dtype:
        """Torch's own, for code that makes tensors."""
        import torch

        return getattr(torch, self.name)


FLOAT64, FLOAT32 = Dtype("float64", 8, True), Dtype("float32", 4, True)
FLOAT16, BFLOAT16 = Dtype("float16", 2, True), Dtype("bfloat16", 2, True)
FLOAT8_E4M3FN, FLOAT8_E5M2 = Dtype("float8_e4m3fn", 1, True), Dtype("float8_e5m2", 1, True)
INT64, INT32, INT16, INT8 = (Dtype(f"int{8 * size}", size) for size in (8, 4, 2, 1))
UINT8, BOOL = Dtype("uint8", 1), Dtype("bool", 1)

DTYPES = {
    dtype.name: dtype
    for dtype in (
        *(FLOAT64, FLOAT32, FLOAT16, BFLOAT16, FLOAT8_E4M3FN, FLOAT8_E5M2),
        *(INT64, INT32, INT16, INT8, UINT8, BOOL),
        *(Dtype(name, 1, True) for name in ("float8_e4m3fnuz", "float8_e5m2fnuz")),
        *(Dtype(name, 1, True) for name in ("float8_e8m0fnu", "float4_e2m1fn_x2")),
        *(Dtype("complex64", 8), Dtype("complex128", 16)),
        *(Dtype("uint64", 8), Dtype("uint32", 4), Dtype("uint16", 2)),
    )
}
"""Name -> dtype, of all that a checkpoint may hold."""
