"""The single checks behind ``nemo-warp doctor``. Standard library only, and nothing raises."""

from __future__ import annotations

import ctypes.util
import enum
import locale
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from nemo_warp import surroundings

_GIB = 1 << 30
_FREE_DISK_GIB = 10
_IMPORT_TIMEOUT_S = 300

TESTED = {
    "torch": ("2.13.0",),
    "numpy": ("1.26.4",),
    "omegaconf": ("2.3.0",),
    "PyYAML": ("6.0.3",),
    "numba": ("0.61.0",),
    "isal": ("1.9.1",),
    "tqdm": ("4.70.1",),
    "matplotlib": ("3.11.2", "3.10.9"),
    "nemo-toolkit": ("2.2.1",),
    "nemo-aligner": ("0.7.0",),
    "megatron-core": ("0.11.0",),
    "lightning": ("2.4.0",),
    "transformers": ("4.48.3",),
    "sentencepiece": ("0.2.3",),
    "nvidia-pytriton": ("0.5.14",),
    "tensorboard": ("2.20.0",),
    "vaderSentiment": ("3.3.2",),
    "textblob": ("0.20.1",),
}
"""Distribution -> versions in ``constraints/cpu.txt`` (a test keeps the two equal)."""

_CORE = ("omegaconf", "PyYAML")
_MERGE = (*_CORE, "torch", "numpy", "numba", "tqdm", "matplotlib")
_TRAIN = (
    *_MERGE,
    *("nemo-toolkit", "nemo-aligner", "megatron-core", "lightning", "transformers"),
    *("sentencepiece", "nvidia-pytriton", "tensorboard"),
)
REQUIRED = {"slurm": _CORE, "merge": _MERGE, "train": _TRAIN}
"""Profile -> the distributions it cannot do without."""

OPTIONAL = {
    "slurm": {},
    "merge": {"isal": "zlib's CRC-32, 10 to 20 times slower"},
    "train": {
        "isal": "zlib's CRC-32, 10 to 20 times slower",
        "vaderSentiment": "no reward vader_compound (recipes/tiny)",
        "textblob": "no judge by textblob (recipes/tiny)",
    },
}
"""Profile -> the distributions it can do without, and what there is without them."""

STAND_INS = {
    "apex": "plain torch in NeMo's way of a Megatron-core GPT",
    "transformer_engine": "Megatron-core's local layers, same checkpoints",
    "tensorrt_llm": "NeMo's own generation (rollout.trt_llm.enable=false)",
}
"""Import name of an NVIDIA package -> what `nemo_warp.aligner.compat` uses in its place."""

_SLURM_COMMANDS = ("sbatch", "squeue", "scontrol", "sacct", "srun")


_TORCH = f"torch=={TESTED['torch'][0]}"


class Status(enum.Enum):
    """What a check came to; only MISSING makes a profile unusable."""

    OK = enum.auto()
    DIFFERS = enum.auto()
    STOOD_IN = enum.auto()
    OPTIONAL = enum.auto()
    MISSING = enum.auto()


@dataclass(frozen=True)
class Check:
    """One line of the report; ``advice`` is a command where there is one."""

    name: str
    status: Status
    found: str
    tested: str = ""
    advice: str = ""


def checks_of_packages(profile: str) -> Iterator[Check]:
    """Python itself, the required and optional packages, the NVIDIA packages stood in for."""
    yield Check("place", Status.OK, surroundings.where())
    yield _python()
    required = REQUIRED[profile]
    for name in required:
        yield _package(name)
    for name, without in OPTIONAL[profile].items():
        yield _package(name, without)
    if profile == "train":
        for name, instead in STAND_INS.items():
            yield _nvidia_package(name, instead)
    if "torch" in required:
        yield _torch_imports()


def checks_of_machine(profile: str) -> Iterator[Check]:
    """Device, libraries, tools, disk and names that the profile relies on."""
    yield _gpu()
    if profile == "train":
        yield _libpython()
        yield _host_name()
    yield _slurm(required=profile == "slurm")
    yield _disk()
    yield _locale()


# ------------------------------------------------------------------------------------ packages


def _python() -> Check:
    found = f"{platform.python_version()} ({sys.executable})"
    if (3, 10) <= sys.version_info[:2] <= (3, 12):
        return Check("python", Status.OK, found, "3.10-3.12")
    return Check("python", Status.MISSING, found, "3.10-3.12", surroundings.get_python())


def _package(name: str, without: str | None = None) -> Check:
    """A distribution; ``without`` is what there is in the place of one that is optional."""
    requirement = f"{name}=={TESTED[name][0]}"
    tested = " or ".join(TESTED[name])
    try:
        found = version(name)
    except PackageNotFoundError:
        status = Status.MISSING if without is None else Status.OPTIONAL
        found = "not installed" + (f": {without}" if without else "")
        return Check(name, status, found, tested, surroundings.install(requirement))
    same = found.partition("+")[0] in TESTED[name]
    advice = "" if same else surroundings.other_version(requirement)
    return Check(name, Status.OK if same else Status.DIFFERS, found, tested, advice)


def _nvidia_package(name: str, instead: str) -> Check:
    if _is_importable(name):
        return Check(name, Status.OK, _version_of_module(name))
    advice = f"for the real one: {surroundings.CONTAINER}"
    if surroundings.in_container():
        advice = "this image has none; nvcr.io/nvidia/nemo:25.02 has"
    return Check(name, Status.STOOD_IN, f"absent; instead: {instead}", advice=advice)


def _is_importable(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _version_of_module(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "installed"


def _torch_imports() -> Check:
    """Whether torch can be imported: PyPI's build fails without the CUDA libraries beside it."""
    program = "import torch; print(torch.__version__, torch.cuda.is_available())"
    if not _is_importable("torch"):
        advice = surroundings.install(_TORCH)
        return Check("import torch", Status.MISSING, "not installed", advice=advice)
    result = _run([sys.executable, "-c", program])
    if result.returncode == 0:
        number, cuda = result.stdout.split()
        return Check(
            "import torch", Status.OK, f"{number}, CUDA {'' if cuda == 'True' else 'not '}usable"
        )
    reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
    advice = surroundings.install_anew(_TORCH)
    return Check("import torch", Status.MISSING, reason, advice=advice)


def imports_nemo() -> Check:
    """Import NeMo in a fresh process, as an entry point does, and say what was replaced."""
    program = (
        "from nemo_warp.aligner.compat import activate; r = activate();"
        "import nemo_aligner.algorithms.reinforce;"
        "print(*r.summary(), sep='; ', end='')"
    )
    result = _run([sys.executable, "-W", "ignore", "-c", program])
    if result.returncode == 0:
        lines = [line for line in result.stdout.splitlines() if "replaced" in line]
        return Check("import NeMo", Status.OK, lines[-1] if lines else "nothing replaced")
    reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
    advice = surroundings.install_anew("nemo-warp[train]")
    return Check("import NeMo", Status.MISSING, reason, advice=advice)


# ------------------------------------------------------------------------------------- machine


def _gpu() -> Check:
    result = _run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    names = result.stdout.strip().splitlines() if result.returncode == 0 else []
    if not names:
        found = f"none; CUDA calls run on the CPU ({os.cpu_count()} cores)"
        return Check("GPU", Status.STOOD_IN, found)
    kinds = ", ".join(f"{names.count(kind)} x {kind}" for kind in dict.fromkeys(names))
    return Check("GPU", Status.OK, kinds)


def _libpython() -> Check:
    """PyTriton's Python stub loads the shared library of the interpreter that serves."""
    short = f"python{sys.version_info.major}.{sys.version_info.minor}"
    directory = sysconfig.get_config_var("LIBDIR") or ""
    inside = Path(directory) / f"lib{short}.so.1.0"
    found = str(inside) if inside.exists() else ctypes.util.find_library(short)
    if found:
        return Check("libpython", Status.OK, found)
    advice = surroundings.install_in_system(f"lib{short}")
    advice += "   (or a Python built with --enable-shared, as uv's are)"
    return Check("libpython", Status.MISSING, f"lib{short}.so not found", advice=advice)


def _host_name() -> Check:
    """Gloo and NCCL find each other through the host's name."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        advice = "export GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo   (one machine)"
        if os.geteuid() == 0:
            advice = f"echo '127.0.1.1 {name}' >> /etc/hosts   (or export GLOO_SOCKET_IFNAME=lo)"
        return Check("host name", Status.DIFFERS, f"{name} does not resolve", "resolves", advice)
    return Check("host name", Status.OK, name)


def _slurm(required: bool) -> Check:
    missing = [name for name in _SLURM_COMMANDS if shutil.which(name) is None]
    if not missing:
        result = _run(["sbatch", "--version"])
        return Check("Slurm", Status.OK, result.stdout.strip() or "installed")
    status = Status.MISSING if required else Status.OPTIONAL
    advice = (
        f"use a login node of the cluster, or: {surroundings.install_in_system('slurm-client')}"
    )
    if surroundings.in_container():
        advice = "images have no Slurm: run the driver outside, on a login node"
    return Check("Slurm", status, f"no {', '.join(missing)}", advice=advice)


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / _GIB
    found = f"{free:.0f} GiB free in {Path.cwd()}"
    if free >= _FREE_DISK_GIB:
        return Check("disk", Status.OK, found)
    advice = "a tiny run needs about 2 GiB, a 7B iteration with two members about 250 GiB"
    return Check("disk", Status.DIFFERS, found, f">= {_FREE_DISK_GIB} GiB", advice)


def _locale() -> Check:
    encoding = locale.getpreferredencoding(False)
    if encoding.upper().replace("-", "") == "UTF8":
        return Check("locale", Status.OK, encoding)
    return Check("locale", Status.DIFFERS, encoding, "UTF-8", "export LC_ALL=C.UTF-8 PYTHONUTF8=1")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command; one that is not there or hangs looks like one that failed."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_IMPORT_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))
