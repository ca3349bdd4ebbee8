"""Who does what: one process, or rank 0 leading the ranks of a launcher."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from nemo_warp.merge.plan import GroupPlan, MergePlan
from nemo_warp.merge.ranks import World
from nemo_warp.merge.results import MergeResult
from nemo_warp.merge.run import Run


def execute(plan: MergePlan, world: World) -> tuple[Run, MergeResult | None]:
    """Do this process's share; rank 0 returns with all outputs sealed but not published.

    Raises:
        CheckpointError: damaged or non-finite inputs; whatever was written is removed.
        ValueError: outputs exist, or the weights cannot be merged; likewise.
    """
    run = Run(plan, world)
    if world.rank == 0:
        return run, _lead(run)
    _follow(run)
    return run, None


def _lead(run: Run) -> MergeResult:
    run.check_targets()
    with _locked(run.outputs[0].folder):
        try:
            run.prepare()
            run.meeting.admit()
            _merge_share(run)
            run.meeting.wait_for_all()
            result = run.result()
            run.seal(result)
            return result
        except Exception:
            run.discard()
            raise


def _follow(run: Run) -> None:
    run.meeting.wait_until_prepared()
    try:
        _merge_share(run)
    except Exception as error:
        run.meeting.finish(error)
        raise
    run.meeting.finish()


def _merge_share(run: Run) -> None:
    if run.journal.is_sealed():  # a killed run had only names left to give
        return
    groups = share(run.plan.groups, run.world)
    total = sum(g.input_bytes + len(run.outputs) * g.output_bytes for g in groups)
    quiet = run.world.rank != 0
    with tqdm(
        total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="merge", disable=quiet
    ) as bar:
        run.merge_groups(groups, bar.update)


def share(groups: Iterable[GroupPlan], world: World) -> list[GroupPlan]:
    """This process's groups: the largest first, each to whoever has least so far."""
    groups = list(groups)
    loads, owner = [0] * world.size, {}
    for group in sorted(groups, key=lambda g: -g.input_bytes):
        rank = loads.index(min(loads))
        loads[rank] += group.input_bytes
        owner[group.name] = rank
    return [group for group in groups if owner[group.name] == world.rank]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make and hold the outputs' hidden folder: one merge per output at a time.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"another merge is at work in {folder}; wait for it or stop it") from None
    finally:
        os.close(descriptor)
