"""Everything that is decided before the first byte is written: groups, checks, layouts."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy

from nemo_warp.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_warp.checkpoints.containers.image import CheckpointImage, DtypeRule
from nemo_warp.checkpoints.dtypes import BFLOAT16, DTYPES
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.logical import LogicalTensor
from nemo_warp.checkpoints.meaning import check_same_meaning, meaning_of
from nemo_warp.checkpoints.names import group_of, group_order
from nemo_warp.checkpoints.vocabulary import VOCABULARY_TENSORS, true_vocab_size
from nemo_warp.merge.eta_scale import eta_factors
from nemo_warp.merge.options import MergeOptions
from nemo_warp.records import canonical_json, code_version


@dataclass(frozen=True)
class TensorPlan:
    """One logical tensor of a merge.

    Attributes:
        sources: the tensor in each input, in the order of `MergeOptions.inputs`.
        target: the tensor in the outputs.
        true_rows: rows that are merged and counted; rows after them are padding of the init.
        unit: what it shares its angle with.
    """

    name: str
    sources: tuple[LogicalTensor, ...]
    target: LogicalTensor
    true_rows: int
    unit: str


@dataclass(frozen=True)
class GroupPlan:
    """A layer, or a group outside the layers: what is in memory at one time."""

    name: str
    tensors: tuple[TensorPlan, ...]

    @property
    def input_bytes(self) -> int:
        """Bytes of this group in all inputs."""
        return sum(source.nbytes for tensor in self.tensors for source in tensor.sources)

    @property
    def output_bytes(self) -> int:
        """Bytes of this group in one output."""
        return sum(tensor.target.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class MergePlan:
    """A checked merge.

    Attributes:
        groups: in canonical order.
        image: the layout of every output.
        eta_factors: unit -> factor of its eta, where it is not 1 for all.
        notes: what the user should know before and after.
        files: path -> [size, time of change in ns] of every input file.
        versions: of the code and of the libraries that decide the outputs' bytes.
        identity: hash of everything that decides the outputs, input files' size and time included.
    """

    options: MergeOptions
    inputs: tuple[Checkpoint, ...]
    groups: tuple[GroupPlan, ...]
    image: CheckpointImage
    eta_factors: dict[str, float]
    notes: tuple[str, ...]
    files: dict[str, list[int]]
    versions: dict[str, str]
    identity: str

    @property
    def input_bytes(self) -> int:
        """Bytes read from all inputs in one pass."""
        return sum(group.input_bytes for group in self.groups)

    @property
    def output_bytes(self) -> int:
        """Size of one output."""
        return sum(file.size for file in self.image.files)

    def check_unchanged(self) -> None:
        """Raise if an input file is not what it was when the plan was made.

        Raises:
            CheckpointError: names the file.
        """
        now = _file_states(self.inputs)
        changed = [path for path, state in self.files.items() if now.get(path) != state]
        if changed:
            raise CheckpointError(
                f"{changed[0]} was changed while it was merged; merge again when it is complete"
            )


def open_inputs(options: MergeOptions) -> tuple[Checkpoint, ...]:
    """Open all inputs; a checkpoint given twice is opened once."""
    opened = {path: open_checkpoint(path) for path in dict.fromkeys(options.inputs)}
    return tuple(opened[path] for path in options.inputs)


def make_plan(options: MergeOptions, inputs: tuple[Checkpoint, ...]) -> MergePlan:
    """Match the inputs tensor by tensor and lay out the outputs.

    Args:
        options: what is asked for.
        inputs: opened `MergeOptions.inputs`.

    Raises:
        CheckpointError: the inputs are not the same model.
        ValueError: options that do not fit the inputs.
    """
    notes: list[str] = []
    _check_container(options, inputs[0])
    tables = _source_tables(options, inputs, notes)
    for other, table in zip(inputs[1:], tables[1:], strict=True):
        _check_same_names(inputs[0], other, tables[0], table)
    _check_meaning(options, inputs, notes)
    vocab_size = options.vocab_size or _vocab_size(inputs)
    image = inputs[0].image(dtype_rule(options))
    tensors = []
    # Sorted by name and not as stored: sums, notes and identity must not depend on the format.
    for name in sorted(tables[0]):
        sources = tuple(table[name] for table in tables)
        true_rows = sources[0].rows
        if name in VOCABULARY_TENSORS:
            true_rows = _true_rows(name, sources, vocab_size, notes)
        _check_shapes(name, sources, inputs, true_rows)
        unit = {"layer": group_of(name), "tensor": name, "model": "model"}[options.granularity]
        tensors.append(TensorPlan(name, sources, image.tensors[name], true_rows, unit))
    _check_rounding(options, tensors)
    groups: dict[str, list[TensorPlan]] = defaultdict(list)
    for tensor in tensors:
        groups[group_of(tensor.name)].append(tensor)
    names = sorted(groups, key=group_order)
    ordered = tuple(GroupPlan(name, tuple(groups[name])) for name in names)
    files, versions = _file_states(inputs), _versions()
    identity = _identity(options, inputs, files, tensors, versions)
    once = tuple(dict.fromkeys(notes))
    of_groups = eta_factors(options.eta_scale, names)
    factors = {t.unit: of_groups[group_of(t.name)] for t in tensors} if of_groups else {}
    return MergePlan(options, inputs, ordered, image, factors, once, files, versions, identity)


def _check_container(options: MergeOptions, init: Checkpoint) -> None:
    tars = [path for path in options.outputs.values() if path.suffix == ".nemo"]
    if tars and init.format == "safetensors":
        raise ValueError(
            f"{init.path} is a Hugging Face folder, and so are outputs like it: {tars[0]} cannot "
            "be a .nemo; name a folder, and convert it with tools/import_hf.py"
        )


def _source_tables(
    options: MergeOptions, inputs: tuple[Checkpoint, ...], notes: list[str]
) -> list[dict[str, LogicalTensor]]:
    """Per input, the tensors to read: the weights, or fp32 masters where asked for and present."""
    if options.source == "weights":
        return [checkpoint.tensors for checkpoint in inputs]
    tables, with_masters = [], 0
    for checkpoint in inputs:
        masters = checkpoint.store.masters()
        with_masters += bool(masters)
        if not masters:
            notes.append(f"{checkpoint.path} holds no fp32 masters; its weights are used")
        unknown = sorted(masters.keys() - checkpoint.tensors.keys())
        if unknown:
            raise CheckpointError(f"{checkpoint.path}: {unknown[0]} has a master but no weight")
        # Parameters that were trained in fp32 have no master; their weights are their own.
        tables.append({**checkpoint.tensors, **masters})
    if not with_masters:
        raise ValueError("--source masters, but none of the inputs is a checkpoint that has them")
    return tables


def _vocab_size(inputs: tuple[Checkpoint, ...]) -> int | None:
    found = {checkpoint.path: true_vocab_size(checkpoint) for checkpoint in inputs}
    sizes = {size for size in found.values() if size is not None}
    if len(sizes) > 1:
        listed = ", ".join(f"{path}: {size}" for path, size in found.items() if size)
        raise CheckpointError(f"the inputs have vocabularies of different size ({listed})")
    return next(iter(sizes), None)


def dtype_rule(options: MergeOptions) -> DtypeRule:
    """Output dtype as a function of the init's."""
    if options.dtype == "same":
        return lambda dtype: dtype
    wanted = DTYPES[options.dtype]
    return lambda dtype: wanted


def _check_same_names(init: Checkpoint, other: Checkpoint, expected: dict, found: dict) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        which = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which the init lacks"
        raise CheckpointError(
            f"{other.path} {which} ({len(missing)} missing, {len(extra)} extra against "
            f"{init.path}); the checkpoints are not the same model"
        )


def _check_meaning(options: MergeOptions, inputs: tuple[Checkpoint, ...], notes: list[str]) -> None:
    models: dict[str | Path, dict[str, Any]]
    models = {checkpoint.path: meaning_of(checkpoint.archive) for checkpoint in inputs}
    try:
        check_same_meaning(models, "pass --allow-different-configs to merge them all the same")
    except ValueError as error:
        if not options.allow_different_configs:
            raise
        notes.append(f"merged all the same: {error}")


def _check_shapes(
    name: str,
    sources: Sequence[LogicalTensor],
    inputs: tuple[Checkpoint, ...],
    true_rows: int,
) -> None:
    for source, checkpoint in zip(sources, inputs, strict=True):
        same = source.shape == sources[0].shape
        if name in VOCABULARY_TENSORS:  # padding may differ
            # Rows depend on the writer's TP (megatron_base_model.py l.616-628): policies of
            # different layouts differ in padding.
            same = source.shape[1:] == sources[0].shape[1:] and source.rows >= true_rows
        if not same:
            raise CheckpointError(
                f"{checkpoint.path}: {name} has shape {list(source.shape)}, the init "
                f"{list(sources[0].shape)}; the checkpoints are not the same model"
            )


def _true_rows(
    name: str, sources: Sequence[LogicalTensor], vocab_size: int | None, notes: list[str]
) -> int:
    smallest = min(source.rows for source in sources)
    if vocab_size is None:
        notes.append(
            "the true vocabulary size is unknown (no override_vocab_size and no tokenizer that "
            f"could be counted): the {smallest} rows that all inputs store are merged, padding "
            "included; pass --vocab-size to leave it out"
        )
        return smallest
    if vocab_size > smallest:
        raise ValueError(
            f"the vocabulary has {vocab_size} tokens but {name} stores only {smallest} rows in one "
            "of the inputs; check --vocab-size and that all inputs share a tokenizer"
        )
    return vocab_size


def _check_rounding(options: MergeOptions, tensors: list[TensorPlan]) -> None:
    if options.rounding == "nearest":
        return
    other = next((t for t in tensors if t.target.dtype != BFLOAT16), None)
    if other is not None:
        raise ValueError(
            f"--rounding stochastic is for bfloat16, but {other.name} is written as "
            f"{other.target.dtype}; add --dtype bfloat16 or use nearest"
        )


def _file_states(inputs: tuple[Checkpoint, ...]) -> dict[str, list[int]]:
    records = (record for one in inputs for record in one.archive.members.values())
    paths = sorted({record.path.resolve() for record in records})
    # Size and time of change, not contents: a plan must not read 400 GB.
    states = {path: path.stat() for path in paths}
    return {str(path): [state.st_size, state.st_mtime_ns] for path, state in states.items()}


def _versions() -> dict[str, str]:
    libraries = {library.__name__: library.__version__ for library in (numba, numpy)}
    return {"nemo_warp": code_version(), **libraries}


def _identity(
    options: MergeOptions,
    inputs: tuple[Checkpoint, ...],
    files: dict[str, list[int]],
    tensors: list[TensorPlan],
    versions: dict[str, str],
) -> str:
    names = [[t.name, t.true_rows, t.unit, str(t.target.dtype)] for t in tensors]
    outputs = {repr(eta): str(path.resolve()) for eta, path in options.outputs.items()}
    roles = [[str(one.path.resolve()), one.path.name] for one in inputs]  # init and policies
    text = canonical_json([options.recorded(), roles, files, names, outputs, versions])
    return hashlib.sha256(text.encode()).hexdigest()
