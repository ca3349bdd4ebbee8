"""What pyproject.toml cannot say: a wheel carries the repository's folders, and its commit."""

import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

_ROOT = Path(__file__).resolve().parent
_SHIPPED = ("conf", "recipes", "slurm", "tools")


class BuildWithShipped(build_py):
    """Copies the folders to ``nemo_warp/shipped``, see `nemo_warp.places`."""

    def run(self) -> None:
        """Build, then add; nothing is added to an editable installation."""
        super().run()
        if self.editable_mode:
            return
        shipped = Path(self.build_lib) / "nemo_warp" / "shipped"
        shutil.rmtree(shipped, ignore_errors=True)  # left by an earlier build
        for name in _SHIPPED:
            shutil.copytree(
                _ROOT / name, shipped / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
            )
        (shipped / "commit").write_text(_commit())


def _commit() -> str:
    """Of the checkout, or as the source distribution was given it; "" where nobody knows."""
    if not (_ROOT / ".git").exists():
        given = _ROOT / "nemo_warp" / "shipped" / "commit"
        return given.read_text() if given.exists() else ""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty=.dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


setup(cmdclass={"build_py": BuildWithShipped})
