"""WARP's merge in plain float64 on whole vectors, written from the paper's equations.

Independent of the code under test: no Gram matrices, no blocks, no shards.
"""

from __future__ import annotations

import numpy as np
import torch


def group(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:3]) if ".layers." in name else ".".join(parts[:2])


def slerp(a: np.ndarray, b: np.ndarray, weight: float) -> np.ndarray:
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    if norms == 0.0:
        return (1 - weight) * a + weight * b
    omega = np.arccos(np.clip(a @ b / norms, -1, 1))
    if omega < 1e-6:
        return (1 - weight) * a + weight * b
    return (np.sin((1 - weight) * omega) * a + np.sin(weight * omega) * b) / np.sin(omega)


def slerpm(vectors: list[np.ndarray], weight: float | None) -> np.ndarray:
    merged = vectors[0]
    for m, vector in enumerate(vectors[1:], start=2):
        merged = slerp(merged, vector, 1 / m if weight is None else weight)
    return merged


def merge(init, policies, eta, *, method="slerp", weight=None, unit=group, anchor=None):
    """Name -> float64 merged tensor."""
    units: dict[str, list[str]] = {}
    for name in sorted(init):
        units.setdefault(unit(name), []).append(name)
    result = {}
    for names in units.values():
        flat = [np.concatenate([w[n].double().numpy().ravel() for n in names]) for w in policies]
        start = np.concatenate([init[n].double().numpy().ravel() for n in names])
        if method == "lerp":
            w = [1 / len(flat)] * len(flat) if weight is None else [1 - weight, weight]
            merged = sum(c * f for c, f in zip(w, flat, strict=True))
        elif method == "slerp-full":
            merged = slerpm(flat, weight)
        else:
            merged = start + slerpm([f - start for f in flat], weight)
        towards = start
        if anchor is not None:
            towards = np.concatenate([anchor[n].double().numpy().ravel() for n in names])
        values = (1 - eta) * towards + eta * merged
        offset = 0
        for name in names:
            count = init[name].numel()
            result[name] = torch.from_numpy(values[offset : offset + count]).view(init[name].shape)
            offset += count
    return result


def assert_close(found: torch.Tensor, exact: torch.Tensor, name: str) -> None:
    """At least 99.9 % equal to the rounded reference, the rest one unit in the last place off."""
    expected = exact.to(found.dtype)
    different = found != expected
    allowed = max(1, found.numel() // 1000)  # one element may always fall on a tie
    assert int(different.sum()) <= allowed, f"{name}: {int(different.sum())} of {found.numel()}"
    bits = {2: torch.int16, 4: torch.int32}[found.element_size()]
    ulps = (found.view(bits).long() - expected.view(bits).long()).abs()[different]
    assert (ulps <= 1).all(), f"{name}: {ulps.max()} units off"


def unstack(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stored keys -> canonical per-layer names, for comparing outputs of either kind."""
    result = {}
    for key, tensor in stored.items():
        name = key.removeprefix("model.")
        if ".layers." in name and not name.split(".")[2].isdigit():
            head, rest = name.split(".layers.")
            for i, layer in enumerate(tensor):
                result[f"{head}.layers.{i}.{rest}"] = layer
        else:
            result[name] = tensor
    return result
