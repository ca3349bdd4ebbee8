"""Write the policy as a distributed ``.nemo`` that stock NeMo restores.

Configuration and artifacts are the bytes of the checkpoint the member started from: the policy
differs from it in its weights only. (NeMo's own `save_to` would record this project's model class
and the training layout, and give the artifacts new random names.)
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import IO, Any, cast

import torch
from nemo.utils.callbacks.dist_ckpt_io import DistributedCheckpointIO

from nemo_warp.aligner.weights.masters import copy_masters, has_masters, reachable_masters
from nemo_warp.aligner.weights.sharded import ShardedWeights
from nemo_warp.records import fsync_directory

_WEIGHTS = "model_weights"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MASTER_PREFIX = "optimizer.state.fp32_param."


def export_policy(model: Any, source: Path, output: Path, dtype: str, checkpoint: Path) -> None:
    """Write ``output``. Collective; atomic: under its name the file is complete.

    Args:
        source: the ``.nemo`` that gives configuration and artifacts.
        dtype: ``same`` as the model's parameters, ``float32`` or ``bfloat16``. float32 comes from
            the optimizer's fp32 masters where it has them.
        checkpoint: the training checkpoint of this very step, which holds those masters.
    """
    # Beside the output: a rename is atomic only within one file system.
    folder = output.with_name(f".{output.name}.writing")
    if torch.distributed.get_rank() == 0:
        # What an attempt before this one left; Megatron-core 0.11 refuses to save into a folder
        # with files.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    # No rank may write before the folder exists.
    torch.distributed.barrier()
    # Synchronous: the file is packed right afterwards, and an async save would still be writing.
    writer = DistributedCheckpointIO.from_config(model.cfg, async_save=False)
    state = _state_in(model, dtype, checkpoint)
    writer.save_checkpoint(state, str(folder / _WEIGHTS))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        _pack(source, folder, output)
    torch.distributed.barrier()


def _state_in(model: Any, dtype: str, checkpoint: Path) -> dict[str, Any]:
    """The policy's sharded state in the dtype that is wanted."""
    if dtype == "same":
        return model.sharded_state_dict()
    if dtype == "float32" and reachable_masters(model):
        return copy_masters(model).sharded_state_dict("", torch.float32)
    # apex keeps its masters as 16-bit remainders inside its own buckets, which cannot be read from
    # here; its checkpoints hold them whole, so they are read back from the one just saved.
    weights = ShardedWeights(model)
    if dtype == "float32" and has_masters(model):
        _load_masters(model, weights, checkpoint)
    return weights.sharded_state_dict("", _DTYPES[dtype])


def _load_masters(model: Any, weights: ShardedWeights, checkpoint: Path) -> None:
    """Masters of apex, from the training checkpoint, where they lie as whole tensors."""
    template = weights.sharded_state_dict("")
    # Extra state belongs to layers, not to the optimizer: there is no master of it.
    template = {k: v for k, v in template.items() if not k.endswith("_extra_state")}
    for tensor in template.values():
        # NeMo saves masters as optimizer.state.fp32_param.<model key> (distributed_adam.py l.825).
        tensor.key = _MASTER_PREFIX + tensor.key
    loaded = model.trainer.strategy.checkpoint_io.load_checkpoint(
        str(checkpoint), sharded_state_dict={"masters": template}
    )
    weights.load_state_dict_(loaded["masters"], "", strict=False)


def _pack(source: Path, folder: Path, output: Path) -> None:
    """Put configuration, artifacts and the new weights into one uncompressed tar."""
    _forget_origin(folder / _WEIGHTS / ".metadata")
    packed = folder / output.name
    # Uncompressed, so that readers map the weights where they lie; member names begin with "./" as
    # NeMo's do (save_restore_connector.py l.588-592, arcname=".").
    with tarfile.open(packed, "w:", format=tarfile.GNU_FORMAT) as archive:
        for name, content in sorted(_configuration_and_artifacts(source).items()):
            _add(archive, f"./{name}", len(content), io.BytesIO(content))
        for path in sorted((folder / _WEIGHTS).iterdir()):
            with path.open("rb") as stream:
                _add(archive, f"./{_WEIGHTS}/{path.name}", path.stat().st_size, stream)
    with packed.open("rb") as stream:
        # Content first, then the name: after a power cut a complete name must not hold zeros.
        os.fsync(stream.fileno())
    packed.replace(output)
    shutil.rmtree(folder)
    fsync_directory(output.parent)


def _forget_origin(path: Path) -> None:
    """Take what no reader needs out of torch's metadata: folder, random id, writers' order."""
    # torch writes the folder's path and a random id there, and a dictionary in the order in which
    # ranks answered: the same weights would give other bytes in every run.
    metadata = pickle.loads(path.read_bytes())  # written by us a moment ago
    metadata.storage_meta = None
    metadata.storage_data = dict(sorted(metadata.storage_data.items(), key=lambda e: repr(e[0])))
    path.write_bytes(pickle.dumps(metadata))


def _add(archive: tarfile.TarFile, name: str, size: int, stream: Any) -> None:
    """A member whose header says nothing of when and by whom: same weights, same bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    archive.addfile(info, stream)


def _configuration_and_artifacts(source: Path) -> dict[str, bytes]:
    """Top-level files of a ``.nemo`` other than weights: name -> content."""
    if source.is_dir():
        return {
            path.name: path.read_bytes()
            for path in source.iterdir()
            if path.is_file() and _is_artifact(path.name)
        }
    with tarfile.open(source) as archive:
        return {
            member.name.removeprefix("./"): cast("IO[bytes]", archive.extractfile(member)).read()
            for member in archive.getmembers()
            if member.isfile() and _is_artifact(member.name.removeprefix("./"))
        }


def _is_artifact(name: str) -> bool:
    """Neither weights nor a record of how the source was made."""
    # warp_*.json tell how the source was merged; the policy that was trained from it was not.
    return "/" not in name and name != "model_weights.ckpt" and not name.startswith("warp_")
