"""What other writers wrote (tools/make_written.py), unpacked, merged, and what must come out."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import torch
import written_weights as known

WRITTEN = Path(__file__).with_name("written")
ETA = 0.3
VOCABULARY_TENSORS = ("embedding.word_embeddings.weight", "output_layer.weight")


def model_of(name: str) -> str:
    """``dense``, ``moe`` or ``bridge`` (dense as well)."""
    return name.partition("_")[0]


def policy_of(name: str) -> str:
    """Whose weights a case holds."""
    return name.split("_")[1]


def is_bridges(name: str) -> bool:
    """Whether Megatron-Bridge wrote it, and not Megatron-core alone."""
    return model_of(name) == "bridge"


def iteration_of(name: str) -> int:
    """A converted model's is 0."""
    return 0 if name == "bridge_init" else known.ITERATION


def unpack(name: str, folder: Path) -> Path:
    """The checkpoint of a case, as an ``iter_...`` folder with a tracker beside it."""
    place = folder / name / f"iter_{iteration_of(name):07d}"
    if not place.exists():
        with tarfile.open(WRITTEN / f"{name}.tar.xz") as tar:
            # Megatron-Bridge's have their own trackers.
            tar.extractall(place.parent if is_bridges(name) else place, filter="data")
    if not is_bridges(name):
        (place.parent / "latest_checkpointed_iteration.txt").write_text(f"{known.ITERATION}\n")
    return place


def others_of(name: str) -> list[str]:
    """The cases of the two other policies of the same model."""
    cases = {f"{model_of(name)}_{policy}": policy for policy in known.POLICIES}
    return [case for case, policy in cases.items() if policy != policy_of(name)]


def merge_written(name: str, folder: Path, output: Path) -> None:
    """Merge the two other policies around a case, whose layout the output takes."""
    from nemo_warp.merge import merge

    init, *policies = (unpack(case, folder).parent for case in (name, *others_of(name)))
    options = {"eta": ETA, "dtype": "float32", "workers": 1}
    if not is_bridges(name):  # whose configuration tells it
        options["vocab_size"] = known.VOCABULARY
    merge(init, policies, str(output), **options)


def expected_merge(name: str) -> dict[str, torch.Tensor]:
    """The same in float64 on the known weights: canonical name -> tensor."""
    names = [name, *others_of(name)]
    shapes = known.shapes(model_of(name) == "moe")
    weights = [{n: _stored(case, n, s) for n, s in shapes.items()} for case in names]
    padding = {n: weights[0][n][known.TOKENS :].copy() for n in VOCABULARY_TENSORS}
    if is_bridges(name):
        for one in weights:  # in no angle
            one |= {n: one[n][: known.TOKENS] for n in VOCABULARY_TENSORS}
    groups: dict[str, list[str]] = {}
    for tensor in shapes:
        groups.setdefault(_group(tensor), []).append(tensor)
    merged = {}
    for tensors in groups.values():
        init, a, b = (np.concatenate([w[n].ravel() for n in tensors]) for w in weights)
        step = _slerp(a - init, b - init)
        start = 0
        for n in tensors:
            size = weights[0][n].size
            value = (init + ETA * step)[start : start + size].reshape(weights[0][n].shape)
            if is_bridges(name) and n in VOCABULARY_TENSORS:
                value = np.concatenate([value, padding[n]])
            merged[n] = torch.from_numpy(value.astype(np.float32))
            start += size
    return merged


_WITH_OPTIMIZER = ("moe_a", "moe_b", "bridge_a", "bridge_b")


def stored_dtype(name: str) -> torch.dtype:
    """Checkpoints with an optimizer are of bfloat16, the others of float32."""
    return torch.bfloat16 if name in _WITH_OPTIMIZER else torch.float32


def _stored(case: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    value = torch.from_numpy(known.weight(policy_of(case), name, shape))
    return value.to(stored_dtype(case)).double().numpy()


def _slerp(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    omega = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return np.sin(omega / 2) / np.sin(omega) * (a + b)


def _group(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:3] if ".layers." in name else parts[:2])
