"""How much of the inputs may be in memory, and which groups are too large for it.

A group that fits is read once. One that does not is read twice, slab by slab: to measure its
angles, and to merge it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from nemo_warp.checkpoints.io.slabs import Slab, slabs_of
from nemo_warp.merge.compute.kernel import room_bytes
from nemo_warp.merge.plan import GroupPlan, MergePlan, TensorPlan

SHARE = 0.8
"""Of the memory that is free now; the rest is for Python, merged pieces and others."""

_RANKS_HERE = ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE")
_CGROUPS = Path("/sys/fs/cgroup")


def merged_slabs(group: GroupPlan) -> Iterator[tuple[TensorPlan, Slab]]:
    """What of a group is read, measured and merged, in order."""
    for tensor in group.tensors:
        for slab in slabs_of(0, tensor.true_rows, tensor.target.cols):
            yield tensor, slab


def group_bytes(group: GroupPlan) -> int:
    """Memory that a group of all inputs takes."""
    return sum(room_bytes(*place) for place in merged_slabs(group))


def memory_for_groups(plan: MergePlan) -> int:
    """Bytes that this process may take for groups: ``memory_gb``, or its share of what is free."""
    if plan.options.memory_gb is not None:
        return int(plan.options.memory_gb * 1e9)
    # Ranks of one node share its memory; a value that is no number is ignored.
    found = [os.environ[name] for name in _RANKS_HERE if os.environ.get(name, "").isdecimal()]
    return int(SHARE * free_memory() / max(1, *map(int, found), 1))


def too_large(plan: MergePlan) -> dict[str, int]:
    """Group -> its bytes, for those that do not fit."""
    limit = memory_for_groups(plan)
    sizes = {group.name: group_bytes(group) for group in plan.groups}
    return {name: size for name, size in sizes.items() if size > limit}


def free_memory() -> int:
    """Bytes that this process can get: of the machine, and of its control group (Slurm's limit)."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return min([1024 * int(fields["MemAvailable"].split()[0]), *_left_in_cgroups()])


def _left_in_cgroups() -> Iterator[int]:
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            place = _CGROUPS / controllers / path.lstrip("/")
            # A limit on any level above counts as well: Slurm sets it on the job, systemd on the
            # user.
            for folder in (place, *place.parents):
                # cgroup 2 and 1. Used is what cannot be dropped ("anon", "total_rss"): the page
                # cache in a group's usage makes room by itself.
                yield from _left(folder, "memory.max", "anon ")
                yield from _left(folder, "memory.limit_in_bytes", "total_rss ")


def _left(folder: Path, limit: str, used: str) -> Iterator[int]:
    with suppress(OSError, ValueError):  # no such file, or "max"
        size = int((folder / limit).read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
        yield max(0, size - sum(int(x.split()[1]) for x in lines if x.startswith(used)))
