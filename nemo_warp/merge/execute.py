"""Who does what: one process, or rank 0 leading the ranks of a launcher."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from nemo_warp.checkpoints.checkpoint import CARDS, PROVENANCE
from nemo_warp.checkpoints.io.open_files import OpenFiles
from nemo_warp.merge.plan import GroupPlan, MergePlan
from nemo_warp.merge.publish.output import Output
from nemo_warp.merge.publish.provenance import provenance_bytes
from nemo_warp.merge.publish.targets import check_space, check_target
from nemo_warp.merge.publish.tracker import megatron_reads, track
from nemo_warp.merge.publish.transaction import Transaction, contents_of, hidden_folder
from nemo_warp.merge.ranks import Meeting, World
from nemo_warp.merge.report.card import card
from nemo_warp.merge.report.meter import Meter
from nemo_warp.merge.report.report import write_report
from nemo_warp.merge.results import GroupResult, MergeResult
from nemo_warp.merge.share import merge_groups
from nemo_warp.merge.similarity import refuse_similar
from nemo_warp.progress import progress

logger = logging.getLogger(__name__)


def execute(plan: MergePlan, world: World) -> MergeResult | None:
    """Do this process's share; rank 0 returns when the outputs have their names.

    Raises:
        CheckpointError: damaged or non-finite inputs; whatever was written is removed.
        ValueError: outputs exist, or the weights cannot be merged; likewise.
    """
    finals = _finals(plan)
    notes = hidden_folder(finals[0])
    # Beside the first output: the one place that all ranks of a merge can see.
    meeting = Meeting(notes.with_name(f"{notes.name}.ranks"), world, plan.identity)
    if world.rank == 0:
        return _lead(plan, meeting)
    _follow(plan, meeting)
    return None


def check_outputs(plan: MergePlan) -> None:
    """What a dry run can know about the outputs.

    Raises:
        ValueError: an output exists and may not be replaced.
        OSError: the outputs do not fit on the disk.
    """
    for final in _finals(plan):
        check_target(final, plan.options.overwrite, _file_names(plan))
    _check_space(plan)


def _lead(plan: MergePlan, meeting: Meeting) -> MergeResult:
    options, meter = plan.options, Meter(plan)
    finals = _finals(plan)
    known = _file_names(plan)
    transaction = Transaction(finals, plan.identity, options.overwrite, known, options.verify)
    with transaction:
        # Sealed by a merge that was killed later: only the names are missing, and the other ranks
        # are not needed.
        if transaction.sealed_measures is None:
            try:
                transaction.begin()
                groups = _build(plan, transaction, meeting)
            finally:
                meeting.close()
            # The measures go into the seal, so that a merge which only gives names can still write
            # its report.
            transaction.seal([group.to_json() for group in groups])
        assert transaction.sealed_measures is not None
        sealed = [GroupResult.from_json(raw) for raw in transaction.sealed_measures]
        result = MergeResult(plan, sealed)
        transaction.publish()
        for final in finals if megatron_reads(plan) else ():
            track(final, [*options.inputs, *(one.path for one in plan.inputs)])
        result.timing = meter.read()
        if options.report is not None:
            write_report(result, options.report, result.timing)
        transaction.finish()
    return result


def _build(plan: MergePlan, transaction: Transaction, meeting: Meeting) -> list[GroupResult]:
    """Bring all outputs to disk, complete and verified; returns the groups in canonical order."""
    _check_space(plan)
    tokens = meeting.gather()
    with OpenFiles(os.O_RDWR) as files:
        outputs = _outputs(plan, transaction.attempt, files)
        for output in outputs:
            output.create()
        meeting.start(transaction.attempt, tokens)
        # Rank 0 merges its share before it waits for the others': it would have nothing to do
        # meanwhile.
        known = {group.name: group for group in _merge_share(plan, outputs, meeting.world)}
        for of_rank in meeting.results(tokens):
            known |= {raw["group"]: GroupResult.from_json(raw) for raw in of_rank}
        result = MergeResult(plan, [known[group.name] for group in plan.groups])
        # Over the whole model, after everything was written and before anything has its name: the
        # early look sees four layers of this rank only.
        refuse_similar(plan, [unit.gram for unit in result.units.values()])
        for index, output in enumerate(outputs):
            parts = [part for group in result.groups for part in group.parts[index]]
            output.complete(parts, _notes(result, index, output.is_tar))
    if plan.options.verify is not None:
        # Only now: it computes with torch, which takes more memory than all else that is imported.
        from nemo_warp.merge.publish.verify import verify_outputs

        written = dict(zip(plan.options.etas, transaction.contents, strict=True))
        count = verify_outputs(plan, result.units, written, plan.options.verify)
        logger.info("verified %d tensors per output against a recomputation", count)
    return result.groups


def _notes(result: MergeResult, index: int, in_tar: bool) -> dict[str, bytes]:
    """Name -> contents of what an output says about itself."""
    in_folder, in_a_tar = CARDS
    eta = result.plan.options.etas[index]
    return {
        PROVENANCE: provenance_bytes(result.plan, result.groups, eta),
        in_a_tar if in_tar else in_folder: card(result, index),
    }


def _follow(plan: MergePlan, meeting: Meeting) -> None:
    attempt = meeting.join()
    try:
        with OpenFiles(os.O_RDWR) as files:
            groups = _merge_share(plan, _outputs(plan, attempt, files), meeting.world)
    except Exception as error:
        # Told first, since rank 0 would wait half an hour for a rank that ended without a word.
        meeting.finish(error=error)
        raise
    meeting.finish([group.to_json() for group in groups])


def _merge_share(plan: MergePlan, outputs: list[Output], world: World) -> list[GroupResult]:
    """Merge this process's groups into all outputs; durable when it returns."""
    groups = share(plan.groups, world)
    total = sum(g.input_bytes + len(outputs) * g.output_bytes for g in groups)
    quiet = world.rank != 0
    with progress(
        total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="merge", disable=quiet
    ) as bar:
        found = merge_groups(plan, groups, outputs, bar.update)
    for output in outputs:
        output.sync()
    # After reading: an input that was overwritten meanwhile would be half old and half new.
    plan.check_unchanged()
    return found


def share(groups: Iterable[GroupPlan], world: World) -> list[GroupPlan]:
    """This process's groups: the largest first, each to whoever has least so far."""
    groups = list(groups)
    loads, owner = [0] * world.size, {}
    # Largest first (longest processing time): the slowest rank is at most 4/3 of the best split.
    for group in sorted(groups, key=lambda g: -g.input_bytes):
        rank = loads.index(min(loads))
        loads[rank] += group.input_bytes
        owner[group.name] = rank
    return [group for group in groups if owner[group.name] == world.rank]


def _file_names(plan: MergePlan) -> frozenset[str]:
    return frozenset(file.name for file in plan.image.files)


def _finals(plan: MergePlan) -> list[Path]:
    return [plan.options.outputs[eta] for eta in plan.options.etas]


def _outputs(plan: MergePlan, attempt: str, files: OpenFiles) -> list[Output]:
    finals = _finals(plan)
    return [
        Output(content, plan.image, final.suffix == ".nemo", files)
        for final, content in zip(finals, contents_of(finals, attempt), strict=True)
    ]


def _check_space(plan: MergePlan) -> None:
    sizes = []
    for final in _finals(plan):
        # The output's own folder need not exist yet.
        folder = next(path for path in final.absolute().parents if path.is_dir())
        sizes.append((folder, plan.output_bytes))
    check_space(sizes)
