"""Open any supported checkpoint as logical tensors.

    checkpoint = open_checkpoint(Path("policy.nemo"))
    checkpoint.tensors["decoder.layers.0.mlp.linear_fc1.weight"].shape

Opening reads headers and metadata only; every check that needs no tensor data happens here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
import yaml

from nemo_warp.checkpoints.archive import Archive, open_archive
from nemo_warp.checkpoints.errors import CheckpointError
from nemo_warp.checkpoints.image import CheckpointImage, DtypeRule, FileImage
from nemo_warp.checkpoints.logical import LogicalTensor
from nemo_warp.checkpoints.torch_dist import TorchDistStore

_YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MERGEABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
CONFIG = "model_config.yaml"
PROVENANCE = "warp_merge.json"
WEIGHTS = "model_weights"


class Store(Protocol):
    """The weights of one checkpoint, whatever their format."""

    tensors: dict[str, LogicalTensor]
    foreign: list[str]

    def image(self, rule: DtypeRule, prefix: str, keep_foreign: bool) -> CheckpointImage:
        """Layout of an output like this store, with floating tensors at the rule's dtypes.

        Files are named ``prefix`` + their name here; ``keep_foreign`` keeps entries that are not
        the model's.
        """
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        format: ``torch_dist``, ``zarr``, ``ranks`` or ``single``.
        weights: folder of the weights inside the archive, '' for a bare weights directory.
        config: parsed ``model_config.yaml``, {} without one.
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
        prefix = f"{self.weights}/" if self.weights else ""
        stored = self.store.image(rule, prefix, keep_foreign=bool(prefix))
        names = {file.name for file in stored.files} | {PROVENANCE}
        others = []
        for name, record in self.archive.members.items():
            if name not in names and prefix and not name.startswith(prefix):
                others.append(FileImage(name))
                others[-1].append(record)
        return CheckpointImage(others + stored.files, stored.tensors)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a ``.nemo`` (tar or directory) or a training checkpoint directory.

    Raises:
        CheckpointError: missing, unfinished, damaged, hostile, or of a kind that is not supported.
    """
    _refuse_unfinished(path)
    archive = open_archive(path)
    if "adapter_metadata.json" in {PurePosixPath(name).name for name in archive.members}:
        raise CheckpointError(f"{path} holds an adapter, not a model; merge it into its base first")
    kind, weights, store = _open_store(archive)
    _refuse_unmergeable(path, store.tensors)
    return Checkpoint(path, kind, archive, weights, store, _config(archive))


def _open_store(archive: Archive) -> tuple[str, str, Store]:
    where = str(archive.path)
    for weights in (WEIGHTS, "weights", ""):
        members = archive.under(weights)
        if "metadata.json" in members or ".metadata" in members:
            if "metadata.json" not in members:
                raise CheckpointError(
                    f"{where} holds no metadata.json, which is written last: "
                    "its save was interrupted"
                )
            if ".metadata" in members:
                return "torch_dist", weights, TorchDistStore(members, where)
    raise CheckpointError(
        f"{where} holds no weights that can be read; expected model_weights/ (torch_dist or zarr), "
        "model_weights.ckpt, or mp_rank_XX or tp_rank_XX_pp_rank_XXX folders"
    )


def _refuse_unfinished(path: Path) -> None:
    for name in (path.name, path.stem):
        marker = path.with_name(f"{name}-unfinished")
        if marker.exists():
            raise CheckpointError(f"{path} is unfinished: {marker.name} exists beside it")


def _refuse_unmergeable(path: Path, tensors: dict[str, LogicalTensor]) -> None:
    if not tensors:
        raise CheckpointError(f"{path} holds no floating-point model tensors")
    for name, tensor in tensors.items():
        if "adapter_layer" in name:
            raise CheckpointError(
                f"{path} holds adapter weights ({name}); merge them into the base"
            )
        if tensor.dtype not in MERGEABLE:
            raise CheckpointError(
                f"{path}: {name} is stored as {tensor.dtype}; quantised weights cannot be merged, "
                "export the policy in bfloat16 or float32"
            )


def _config(archive: Archive) -> dict[str, Any]:
    if CONFIG not in archive.members:
        return {}
    try:
        config = yaml.load(archive.read(CONFIG, limit=1 << 22), Loader=_YamlLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{archive.path}: {CONFIG} is not readable YAML ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{archive.path}: {CONFIG} is not a mapping")
    return config
