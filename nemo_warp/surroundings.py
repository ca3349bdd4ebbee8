"""Where the doctor runs, and what can be done about a finding there. Standard library only.

The same finding asks for other commands in NVIDIA's container (whose packages fit each other and
stay), in a checkout (``make setup``), beside an installed wheel, and without root.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nemo_warp.places import PACKAGE

CONTAINER = "run in the NeMo 25.02 container"
_PYTHONS = ("python3.11", "python3.12", "python3.10")
_GET_UV = "curl -LsSf https://astral.sh/uv/install.sh | sh"


def in_container() -> bool:
    """Whether this is one of NVIDIA's images with NeMo in it."""
    return Path("/opt/NeMo").is_dir() or "NVIDIA_BUILD_ID" in os.environ


def has_checkout() -> bool:
    """Whether ``make setup`` is there; a wheel has none."""
    return (PACKAGE.parent / "constraints" / "cpu.txt").exists()


def where() -> str:
    """For people."""
    place = "a checkout" if has_checkout() else "an installed package"
    inside = "NeMo's container" if in_container() else "no NeMo container"
    return f"{place} ({PACKAGE.parent}), {inside}, {'root' if os.geteuid() == 0 else 'not root'}"


def install(requirement: str) -> str:
    """Get a Python package."""
    if in_container():
        return f"python -m pip install --no-deps {requirement}"
    if has_checkout():
        return f"make setup   (or {CONTAINER})"
    return f"python -m pip install {requirement}   (or {CONTAINER})"


def other_version(requirement: str) -> str:
    """A package is there in a version that was not tested."""
    if in_container():
        return "fine: the container's packages fit each other, leave them as they are"
    command = "make setup" if has_checkout() else f"python -m pip install {requirement}"
    return f"fine if it works; what was tested is installed by: {command}"


def install_anew(requirement: str) -> str:
    """A package is there and cannot be imported."""
    if in_container():
        return "use the container's own Python (which -a python); a virtual environment hides it"
    if has_checkout():
        return "rm -rf .venv && make setup"
    return f"python -m pip install --force-reinstall {requirement}"


def install_in_system(package: str) -> str:
    """Get a Debian package."""
    if not Path("/usr/bin/apt-get").exists():
        return f"install what Debian calls {package} with this system's package manager"
    if os.geteuid() == 0:
        return f"apt-get install {package}"
    return f"sudo apt-get install {package}   (without root: ask who runs this machine)"


def get_python() -> str:
    """Get a Python that NeMo runs with: Debian 13 has none, and it needs no root."""
    found = next((path for name in _PYTHONS if (path := shutil.which(name))), None)
    if found is None:
        get, uv = ("", "uv") if shutil.which("uv") else (f"{_GET_UV} && ", "~/.local/bin/uv")
        return f"{get}{uv} python install 3.11 && {_set_up_with(f'$({uv} python find 3.11)')}"
    return _set_up_with(found)


def _set_up_with(python: str) -> str:
    if has_checkout():
        return f"PYTHON={python} make setup"
    return f"{python} -m venv .venv && .venv/bin/pip install nemo-warp"
