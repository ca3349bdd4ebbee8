"""Shared by all tests: one thread per process, and NeMo imported once where it is asked for."""

import logging
import os
import warnings
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: OpenMP does not survive a fork
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

_HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what uses the ``nemo`` fixture, and let upstream's warnings pass there (only)."""
    for item in items:
        if "nemo" in getattr(item, "fixturenames", ()):
            item.add_marker("nemo")
        if item.get_closest_marker("nemo"):
            item.add_marker(pytest.mark.filterwarnings("ignore"))
    if config.pluginmanager.hasplugin("xdist"):
        _group(items)


def _group(items: list[pytest.Item]) -> None:
    """What ``--dist loadgroup`` keeps on one worker, the longest first.

    Slurm's tests share a cluster and mostly wait. A worker that needs NeMo pays 12 s of CPU for
    its import and 1 GB: they are two, whose models are made by each. The rest goes file by file,
    for the sake of fixtures of a module.
    """
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group_of(item)))
    items.sort(key=lambda item: min(_group_of(item)[0], "9"))  # stable: files stay together


def _group_of(item: pytest.Item) -> str:
    path = item.path.relative_to(_HERE).as_posix()
    if path.startswith("slurm/"):
        return "1-slurm"
    if path.startswith("aligner/member/"):
        return "2-members"
    return "3-nemo" if item.get_closest_marker("nemo") else path


@pytest.fixture(scope="session")
def nemo():
    """NeMo, made usable on this machine; the report of what was replaced."""
    if find_spec("nemo") is None:
        pytest.skip("NeMo is not installed (make setup)")
    import torch

    from nemo_warp.aligner.compat import activate

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = activate()
    logging.getLogger("nemo_logger").setLevel(logging.ERROR)
    return report
