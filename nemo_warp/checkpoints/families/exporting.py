"""A NeMo checkpoint becomes a Hugging Face folder, streamed; no NeMo, no transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_warp.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_warp.checkpoints.containers.archive import open_archive
from nemo_warp.checkpoints.families.classifier import (
    classifier_config,
    is_reward_model,
    used_tensors,
    with_head,
)
from nemo_warp.checkpoints.families.configuration import nemo_keys, same_value
from nemo_warp.checkpoints.families.importing import ORIGIN
from nemo_warp.checkpoints.families.publishing import new_folder
from nemo_warp.checkpoints.families.streaming import Rows, check_complete, nbytes
from nemo_warp.checkpoints.families.tensors import Joined, megatron_tensors, taken_apart
from nemo_warp.checkpoints.families.tokenizer import (
    FAST,
    PIECES,
    carried_files,
    stored_tokenizer,
    write_files,
)
from nemo_warp.checkpoints.formats.safetensors import INDEX, SINGLE, make_header, read_hf_config
from nemo_warp.checkpoints.io.reading import FileCache
from nemo_warp.checkpoints.vocabulary import VOCABULARY_TENSORS

SHARD_BYTES = 5 * 10**9
_FREE = {"encoder_seq_length", "max_position_embeddings", "bias_activation_fusion", "name"}
"""Keys that may differ between a checkpoint and its family: lengths and kernels."""


def export_hf(
    source: Path,
    output: Path,
    like: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], Any] = int,
) -> None:
    """Write ``output``, a Hugging Face folder, from a NeMo checkpoint of any format.

    Args:
        source: a policy, a merge, any point of a front, or a reward model, which becomes a
            sequence classifier.
        output: must not exist.
        like: folder of the model that training began with, for config.json and tokenizer; by
            default what `import_hf` left in the checkpoint.
        shard_bytes: a file's size, about.
        progress: called with a number of bytes written.

    Raises:
        ValueError: the origin is not known, or is of another model; nothing is written.
        CheckpointError: the checkpoint is damaged or lacks a tensor.
    """
    checkpoint = open_checkpoint(source)
    if checkpoint.format == "safetensors":
        raise ValueError(f"{source} is a Hugging Face folder already")
    hf, files = _origin(checkpoint, like)
    # Every key is ignored here: what the import accepted, the user may have accepted with --ignore.
    keys = nemo_keys(hf, f"config.json of {like or source}", ignored=hf)
    _check_same_model(checkpoint, keys, hf)
    joined, tensors = taken_apart(megatron_tensors(keys)), checkpoint.tensors
    if is_reward_model(checkpoint):
        joined, tensors = with_head(checkpoint, joined), used_tensors(checkpoint)
        hf = classifier_config(checkpoint, hf)
    check_complete(joined, tensors, str(source), frozenset(VOCABULARY_TENSORS))
    dtypes = {tensors[one.runs[0].name].dtype for one in joined}
    if len(dtypes) == 1:
        name = "dtype" if "dtype" in hf else "torch_dtype"  # transformers renamed it in 4.56
        hf = {**hf, name: next(iter(dtypes)).name}
    with new_folder(output) as folder:
        _write_weights(checkpoint, joined, folder, shard_bytes, progress)
        write_files(folder, {**files, "config.json": hf})


def _origin(checkpoint: Checkpoint, like: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """``config.json``, and the other files that go along."""
    if like is not None:
        archive = open_archive(like)
        files = carried_files(archive)
        files |= {name: archive.read(name) for name in (PIECES, FAST) if name in archive.members}
        config = read_hf_config(archive.members, str(like))
        if not config:
            raise ValueError(f"--like {like} holds no config.json")
        return config, files
    origin = checkpoint.config.get(ORIGIN)
    if not isinstance(origin, dict):
        raise ValueError(
            f"{checkpoint.path} does not say which Hugging Face model it began as (it was not made "
            "by import_hf); pass --like with that model's folder"
        )
    return origin["config"], stored_tokenizer(checkpoint.archive, checkpoint.config, origin)


def _check_same_model(checkpoint: Checkpoint, keys: dict[str, Any], hf: dict[str, Any]) -> None:
    for key, expected in keys.items():
        found = checkpoint.config.get(key, expected)
        if key == "activation":
            found, expected = (str(one).removeprefix("fast-") for one in (found, expected))
        tied = key == "share_embeddings_and_output_weights" and is_reward_model(checkpoint)
        if key not in _FREE and not tied and not same_value(found, expected):
            raise ValueError(
                f"{checkpoint.path}: {key} is {found}, but {expected} in a {hf['model_type']} of "
                "its config.json; it is another model"
            )


def _write_weights(
    checkpoint: Checkpoint,
    joined: list[Joined],
    folder: Path,
    limit: int,
    progress: Callable[[int], object],
) -> None:
    tensors = checkpoint.tensors
    shards: list[list[Joined]] = [[]]
    for one in joined:
        # A shard has one tensor at least, however large.
        if shards[-1] and sum(nbytes(o, tensors) for o in (*shards[-1], one)) > limit:
            shards.append([])
        shards[-1].append(one)
    table: dict[str, str] = {}
    count = len(shards)
    with FileCache() as files:
        rows = Rows(tensors, files)
        for number, shard in enumerate(shards, 1):
            name = SINGLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            table |= {one.name: name for one in shard}
            with (folder / name).open("wb") as stream:
                described = [(o.name, tensors[o.runs[0].name].dtype, o.shape) for o in shard]
                stream.write(make_header(described, {"format": "pt"}))
                for one in shard:
                    for _, data in rows.portions(one):
                        stream.write(memoryview(data))
                        progress(data.nbytes)
        rows.check()
    if count > 1:
        total = sum(nbytes(one, tensors) for one in joined)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
