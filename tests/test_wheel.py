"""A wheel, installed where nothing of the repository is, works from any directory."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_checkpoints import tiny_weights, write_nemo, write_torch_dist

from nemo_warp import exit_codes

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("nemo_warp", "conf", "recipes", "slurm", "tools")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder the wheel was unpacked to; its libraries come from this interpreter."""
    source, wheels = (tmp_path_factory.mktemp(name) for name in ("source", "wheels"))
    for name in SOURCES:  # a copy: building leaves its traces beside the sources
        ignored = shutil.ignore_patterns("__pycache__", "shipped")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, source)
    (source / "nemo_warp" / "shipped").mkdir()  # as in a source distribution
    (source / "nemo_warp" / "shipped" / "commit").write_text("0123456789ab")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    alone = ["--no-deps", "--no-index", "-q"]
    build = [*pip, "wheel", *alone, "--no-build-isolation", "-w", str(wheels), str(source)]
    subprocess.run(build, check=True)
    target = tmp_path_factory.mktemp("installed")
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", *alone, "--target", str(target), str(wheel)], check=True)
    shutil.rmtree(source)
    return target


def _run(installed: Path, directory: Path, command: str, *words: object):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    line = [sys.executable, str(installed / "bin" / command), *map(str, words)]
    return subprocess.run(
        line, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


def test_it_plans_merges_and_inspects_elsewhere(installed, tmp_path):
    version = _run(installed, tmp_path, "nemo-warp", "--version").stdout
    assert re.fullmatch(r"nemo-warp [\d.]+\+g0123456789ab\n", version)

    named = _run(installed, tmp_path, "nemo-warp", "plan", "length_penalty")
    assert "run would refuse this here: sft: no such file" in named.stdout
    assert f"{installed}/nemo_warp/shipped/slurm/task.sh" in named.stdout
    assert (installed / "nemo_warp/shipped/slurm/task.sh").stat().st_mode & 0o111

    init = tiny_weights(0)
    weights = {"init": init} | {n: tiny_weights(ord(n), around=init) for n in "ab"}
    for name, one in weights.items():
        write_nemo(tmp_path / f"{name}.nemo", lambda folder, w=one: write_torch_dist(folder, w))
    words = ["--init", "init.nemo", "--policies", "a.nemo", "b.nemo", "--output", "out.nemo"]
    merged = _run(installed, tmp_path, "nemo-merge", *words)
    assert merged.returncode == exit_codes.DONE, merged.stderr

    shown = _run(installed, tmp_path, "nemo-inspect", "out.nemo", "--diff", "init.nemo")
    assert shown.returncode == exit_codes.DONE, shown.stderr
    assert "{" not in shown.stdout, "a table for people"
    assert re.search(r"^group +parameters +\|difference\|", shown.stdout, re.MULTILINE)
    raw = json.loads(_run(installed, tmp_path, "nemo-inspect", "out.nemo", "--json").stdout)
    total = sum(group["parameters"] for group in raw["groups"].values())
    assert f"{'parameters':<18}{total:,}\n" in shown.stdout


@pytest.mark.parametrize("command", ["nemo-inspect", "nemo-merge"])
def test_an_input_that_is_not_there_is_the_users_mistake(installed, tmp_path, command):
    words = ["no.nemo"]
    if command == "nemo-merge":
        words = ["--init", "no.nemo", "--policies", "a.nemo", "b.nemo", "--output", "out.nemo"]
    result = _run(installed, tmp_path, command, *words)
    assert result.returncode == exit_codes.MISCONFIGURED
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "no.nemo" in result.stderr
