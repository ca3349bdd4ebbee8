"""Versions of the packages whose behaviour a result rests on; part of every completion record."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("torch", "nemo-toolkit", "nemo-aligner", "megatron-core", "transformer-engine")


def package_versions() -> dict[str, str]:
    """Versions of what trains and evaluates, as installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            # Not installed is no error: Transformer Engine exists in the container only.
            continue
    return found
