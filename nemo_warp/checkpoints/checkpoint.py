"""Open any supported checkpoint as logical tensors.

    checkpoint = open_checkpoint(Path("policy.nemo"))
    checkpoint.tensors["decoder.layers.0.mlp.linear_fc1.weight"].shape

Opening reads headers and metadata only; every check that needs no tensor data happens here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from nemo_warp.checkpoints.containers.archive import Archive, open_archive
from nemo_warp.checkpoints.containers.configuration import read_configuration
from nemo_warp.checkpoints.containers.image import CheckpointImage, DtypeRule, FileImage
from nemo_warp.checkpoints.dtypes import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT8,
    UINT8,
    Dtype,
)
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.formats.rank_files import FILE, RankFileStore, rank_files
from nemo_warp.checkpoints.formats.safetensors import (
    SafetensorsStore,
    goes_along,
    is_safetensors,
    read_hf_config,
)
from nemo_warp.checkpoints.formats.torch_dist import TorchDistStore
from nemo_warp.checkpoints.formats.zarr import DESCRIPTION, ZarrStore
from nemo_warp.checkpoints.iterations import refuse_interrupted_save, tracked_iteration
from nemo_warp.checkpoints.logical import LogicalTensor
from nemo_warp.checkpoints.record import Record

MERGEABLE = (BFLOAT16, FLOAT16, FLOAT32, FLOAT64)
PROVENANCE = "warp_merge.json"
CARDS = ("README.md", "card.md")
"""What a merge says about itself to people, in a folder and in a tar; of its output alone."""

WEIGHTS = "model_weights"
# Megatron-Bridge has modelopt describe every model in modelopt_run_config.yaml, quantised or not;
# the state of one that is lies in modelopt_state (modelopt's mcore_dist_checkpointing.py).
_QUANTISED_STATE = re.compile(r"modelopt_(?!run_config\.yaml$)")
_QUANTISED = (INT8, UINT8)
_UNFINISHED, _LEVELS = "-unfinished", 3
_MEGATRONS_RANK_FILE = re.compile(
    r"(^|/)mp_rank_\d+(_\d+)*/(model_optim_rng|model_rng|distrib_optim)\.pt$"
    r"|(^|/)(mp_rank_\d+(_\d+)+|tp_rank_\d+_pp_rank_\d+_\w+)/model_weights\.ckpt$"
)
_EXPERT_RANK = re.compile(r"mp_rank_\d+_\d+_\d+/|mp_rank_\d+_\d+/model_weights|_pp_rank_\d+_")
_MARKS = ("model_config.yaml", "metadata.json", FILE)


class Store(Protocol):
    """The weights of one checkpoint, whatever their format."""

    tensors: dict[str, LogicalTensor]

    @property
    def foreign(self) -> list[str]:
        """Keys that are not the model's, such as those of an optimizer."""
        ...

    @property
    def others(self) -> dict[str, Dtype]:
        """Canonical name -> dtype of the model's tensors that are not floating."""
        ...

    def masters(self) -> dict[str, LogicalTensor]:
        """Canonical name -> fp32 copy in the optimizer state, where there is one."""
        ...

    def image(self, rule: DtypeRule, prefix: str) -> CheckpointImage:
        """Layout of an output like this store, with floating tensors at the rule's dtypes.

        Args:
            rule: output dtype of each stored dtype.
            prefix: goes before every file name.
        """
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        format: ``torch_dist``, ``zarr``, ``ranks``, ``single`` or ``safetensors``.
        weights: folder of the weights inside the archive, '' for a bare weights directory.
        config: parsed ``model_config.yaml`` (``config.json`` of safetensors), {} without one.
    """

    path: Path
    format: str
    archive: Archive
    weights: str
    store: Store
    config: dict[str, Any]

    @property
    def tensors(self) -> dict[str, LogicalTensor]:
        """Canonical name -> floating tensor of the model, one per layer."""
        return self.store.tensors

    def image(self, rule: DtypeRule) -> CheckpointImage:
        """Layout of an output like this checkpoint: weights, configuration and artifacts."""
        stored = self.store.image(rule, f"{self.weights}/" if self.weights else "")
        covered = self.archive.under(self.weights) if self.weights else {}
        # What the store lays out anew must not be copied as well.
        weights = {f"{self.weights}/{name}" for name in covered} | {f.name for f in stored.files}
        others = []
        for name, record in self.archive.members.items():
            if name not in weights and self._goes_along(name):
                others.append(FileImage(name))
                others[-1].append(record)
        own = (PROVENANCE, *CARDS)
        files = [file for file in others + stored.files if file.name not in own]
        return CheckpointImage(files, stored.tensors)

    def _goes_along(self, name: str) -> bool:
        """Whether a file that is not the store's belongs to the checkpoint.

        All files of a weights folder alone are the store's.
        """
        if self.format == "safetensors":
            return goes_along(name)
        return bool(self.weights) or self.format not in ("torch_dist", "zarr")


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a ``.nemo`` (tar or directory), a training checkpoint or a Hugging Face folder.

    A folder of Megatron-LM's or Megatron-Bridge's iterations is the one that its tracker names.

    Raises:
        CheckpointError: missing, unfinished, damaged, hostile, or of a kind that is not supported.
    """
    path = tracked_iteration(path)
    _refuse_unfinished(path)
    archive = open_archive(path)
    # Adapters and modelopt are told by their files, before the weights are looked at: their tensors
    # would pass for a small model, and for one of other numbers.
    names = {PurePosixPath(name).name for name in archive.members}
    if names & {"adapter_metadata.json", "adapter_config.json"}:
        raise CheckpointError(f"{path} holds an adapter, not a model; merge it into its base first")
    if any(_QUANTISED_STATE.match(part) for n in archive.members for part in n.split("/")):
        raise CheckpointError(f"{path} is quantised (modelopt); merge the policy before quantising")
    if is_safetensors(archive.members):
        config = read_hf_config(archive.members, str(path))
        hf_store = SafetensorsStore(archive.members, str(path))
        _refuse_unmergeable(path, hf_store)
        return Checkpoint(path, "safetensors", archive, "", hf_store, config)
    config = read_configuration(archive)
    kind, weights, store = _open_store(archive, config)
    refuse_interrupted_save(path, archive.members)
    _refuse_unmergeable(path, store)
    return Checkpoint(path, kind, archive, weights, store, config)


def _open_store(archive: Archive, config: dict[str, Any]) -> tuple[str, str, Store]:
    where = str(archive.path)
    for weights in (WEIGHTS, "weights", ""):
        members = archive.under(weights)
        described = any(name.endswith(f"/{DESCRIPTION}") for name in members)
        if not described and ".metadata" not in members and "metadata.json" not in members:
            continue
        # Megatron-core writes it last (dist_checkpointing/serialization.py l.386-392): without it
        # the save was cut off.
        if "metadata.json" not in members:
            raise CheckpointError(_without_marker(where, members))
        if described:
            return "zarr", weights, ZarrStore(members, where)
        return "torch_dist", weights, TorchDistStore(members, where)
    _refuse_megatrons_rank_files(where, archive.members)
    if files := rank_files(archive.members):
        kind = "ranks" if len(files) > 1 or FILE not in archive.members else "single"
        members = {name: archive.members[name] for name in files.values()}
        return kind, "", RankFileStore(members, config, where)
    raise CheckpointError(
        f"{where} holds no weights that can be read; expected model_weights/ (torch_dist or zarr), "
        "model_weights.ckpt, or mp_rank_XX or tp_rank_XX_pp_rank_XXX folders"
        f"{_checkpoint_below(archive)}"
    )


def _refuse_megatrons_rank_files(where: str, members: dict[str, Record]) -> None:
    """Raise on the ``torch`` format of Megatron-LM and on ranks of experts, and say the way out."""
    found = next((name for name in members if _MEGATRONS_RANK_FILE.search(name)), None)
    if found is not None:
        experts = " of expert-parallel ranks" if _EXPERT_RANK.search(found) else ""
        raise CheckpointError(
            f"{where} holds rank files{experts} ({found}), whose experts and optimizer are laid "
            "out by the job that wrote them; load them in that job with --ckpt-convert-format "
            "torch_dist --ckpt-convert-save DIR (Megatron-LM), or save a torch_dist checkpoint, "
            "and merge that"
        )


def _without_marker(where: str, members: dict[str, Any]) -> str:
    if "common.pt" not in members and ".metadata" in members:
        return (
            f"{where} is a plain torch.distributed.checkpoint: it has neither common.pt nor "
            "metadata.json, and does not say how Megatron's layers are stored in it; save the "
            "model with Megatron-core's dist_checkpointing (torch_dist)"
        )
    return f"{where} holds no metadata.json, which is written last: its save was interrupted"


def _checkpoint_below(archive: Archive) -> str:
    """A hint for who named a folder of checkpoints."""
    for name in archive.members:
        parent, _, file = name.rpartition("/")
        folder = parent.removesuffix("/model_weights").removesuffix("/weights")
        found = name if file.endswith(".nemo") else folder if file in _MARKS and folder else None
        if found:
            return f"; did you mean {archive.path / found}?"
    return ""


def _refuse_unfinished(path: Path) -> None:
    """Raise if a save's marker is there still, whatever name or part of it was given."""
    whole = path.resolve()
    # NeMo puts "<name>-unfinished" beside "<name>.ckpt" or "<name>/" (nemo_model_checkpoint.py l.44
    # and l.438); the path given may be a folder inside, or a link.
    for place in dict.fromkeys([path.absolute(), whole, *list(whole.parents)[:_LEVELS]]):
        for name in {place.name, place.stem} - {""}:
            marker = place.with_name(f"{name}{_UNFINISHED}")
            if marker.exists():
                raise CheckpointError(f"{path} is unfinished: {marker} exists")


def _refuse_unmergeable(path: Path, store: Store) -> None:
    if not store.tensors:
        raise CheckpointError(f"{path} holds no floating-point model tensors")
    for name in store.tensors:
        if "adapter_layer" in name:
            raise CheckpointError(
                f"{path} holds adapter weights ({name}); merge them into the base"
            )
    dtypes = {name: tensor.dtype for name, tensor in store.tensors.items()}
    for name, dtype in {**dtypes, **store.others}.items():
        # int64 buffers (positions) are no weights and are copied; bytes may be quantised weights.
        bad = dtype in _QUANTISED if name in store.others else dtype not in MERGEABLE
        if bad and "_extra_state" not in name:  # Transformer Engine's is bytes
            raise CheckpointError(
                f"{path}: {name} is stored as {dtype}; quantised weights cannot be merged, "
                "export the policy in bfloat16 or float32"
            )
