"""Merge policies: SLERP of task vectors per layer, then LITI, on distributed checkpoints.

from nemo_warp.merge import merge
result = merge(init="sft.nemo", policies=["a.nemo", "b.nemo"], output="merged.nemo", eta=[0.3])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_warp.merge.api import merge
    from nemo_warp.merge.options import MergeOptions
    from nemo_warp.merge.results import MergeResult

__all__ = ["MergeOptions", "MergeResult", "merge"]


def __getattr__(name: str) -> Any:
    """Import numba only where it is needed: not for a typo on the command line."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nemo_warp.merge import api

    return getattr(api, name)
