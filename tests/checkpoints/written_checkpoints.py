"""What other writers wrote (tools/make_written.py), unpacked, merged, and what must come out."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import torch
import written_weights as known

WRITTEN = Path(__file__).with_name("written")
ETA = 0.3


def model_of(name: str) -> str:
    """``dense`` or ``moe``."""
    return name.partition("_")[0]


def policy_of(name: str) -> str:
    """Whose weights a case holds."""
    return name.split("_")[1]


def unpack(name: str, folder: Path) -> Path:
    """The checkpoint of a case, as an ``iter_...`` folder with a tracker beside it."""
    place = folder / name / f"iter_{known.ITERATION:07d}"
    if not place.exists():
        with tarfile.open(WRITTEN / f"{name}.tar.xz") as tar:
            tar.extractall(place, filter="data")
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
    options = {"eta": ETA, "dtype": "float32", "vocab_size": known.VOCABULARY, "workers": 1}
    merge(init, policies, str(output), **options)


def expected_merge(name: str) -> dict[str, torch.Tensor]:
    """The same in float64 on the known weights: canonical name -> tensor."""
    names = [name, *others_of(name)]
    shapes = known.shapes(model_of(name) == "moe")
    weights = [{n: _stored(case, n, s) for n, s in shapes.items()} for case in names]
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
            value = (init + ETA * step)[start : start + size].reshape(shapes[n])
            merged[n] = torch.from_numpy(value.astype(np.float32))
            start += size
    return merged


def stored_dtype(name: str) -> torch.dtype:
    """Checkpoints with an optimizer are of bfloat16, the others of float32."""
    return torch.bfloat16 if name in ("moe_a", "moe_b") else torch.float32


def _stored(case: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    value = torch.from_numpy(known.weight(policy_of(case), name, shape))
    return value.to(stored_dtype(case)).double().numpy()


def _slerp(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    omega = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return np.sin(omega / 2) / np.sin(omega) * (a + b)


def _group(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:3] if ".layers." in name else parts[:2])
