"""The command line's entry, and the doctor in good and in broken environments."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from nemo_warp import exit_codes, health, surroundings
from nemo_warp.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parent.parent
BARE = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from nemo_warp.cli import main;"


def _doctor(capsys, *options):
    code = main(["doctor", "--json", *options])
    report = json.loads(capsys.readouterr().out)
    return code, report, {check["name"]: check for check in report["checks"]}


def test_found_versions_are_those_installed(capsys):
    code, report, checks = _doctor(capsys, "--profile", "merge")
    assert (code, report["usable"]) == (exit_codes.DONE, True)
    assert checks["numpy"]["found"] == version("numpy")
    assert checks["import torch"]["found"].startswith(version("torch"))
    assert "nemo-toolkit" not in checks


def test_another_version_is_named_but_usable(capsys, monkeypatch):
    monkeypatch.setitem(health.TESTED, "tqdm", ("0.0.1",))
    code, _, checks = _doctor(capsys, "--profile", "merge")
    assert code == exit_codes.DONE
    assert checks["tqdm"]["status"] == "differs"
    assert (checks["tqdm"]["found"], checks["tqdm"]["tested"]) == (version("tqdm"), "0.0.1")


def test_login_node_without_slurm_is_not_usable(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main(["doctor", "--profile", "slurm"]) == exit_codes.FAILED
    out = capsys.readouterr().out
    assert "apt-get install slurm-client" in out
    assert out.endswith("Not ready for 'slurm': Slurm.\n")


@pytest.mark.parametrize("profile", ["merge", "train", "slurm"])
def test_without_any_package_it_still_reports(profile):
    """``-S``: no site-packages, so nothing but the standard library is there."""
    program = f"{BARE} sys.exit(main(['doctor', '--json', '--profile', {profile!r}]))"
    command = [sys.executable, "-I", "-S", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (exit_codes.FAILED, "")
    report = json.loads(result.stdout)
    missing = {check["name"]: check for check in report["checks"] if check["status"] == "missing"}
    assert set(health.REQUIRED[profile]) <= set(missing)
    assert all(check["advice"] for check in missing.values())


def test_stand_ins_are_those_of_compat(capsys):
    stand_ins = importlib.import_module("nemo_warp.aligner.compat.stand_ins")
    assert tuple(health.STAND_INS) == stand_ins.PACKAGES
    _, _, checks = _doctor(capsys)
    stood_in = {name for name in health.STAND_INS if checks[name]["status"] == "stood_in"}
    assert stood_in == set(stand_ins.absent())


def test_tested_versions_are_those_of_the_lock():
    lock: dict[str, set[str]] = {}
    for line in (ROOT / "constraints" / "cpu.txt").read_text().splitlines():
        if match := re.match(r"([\w.-]+)==(\S+)", line):
            lock.setdefault(match[1].lower().replace("_", "-"), set()).add(match[2])
    tested = {name.lower(): set(versions) for name, versions in health.TESTED.items()}
    assert tested == {name: lock.get(name) for name in tested}


def test_lock_names_no_machine():
    text = (ROOT / "constraints" / "cpu.txt").read_text()
    entries = [line for line in text.splitlines() if line and not line.startswith("#")]
    pattern = r'[\w.-]+==[\w.]+( ; python_version (<|>=) "3\.1[12]")?'
    assert [line for line in entries if not re.fullmatch(pattern, line)] == []


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_commands_need_no_torch_and_start_in_a_second(command):
    heavy = "{'torch', 'numpy', 'nemo', 'megatron', 'lightning'} & set(sys.modules)"
    program = (
        "import atexit, sys; from nemo_warp.cli import main;"
        f"atexit.register(lambda: {heavy} and print('imported', {heavy}));"
        f"main([{command!r}, '--help'])"
    )
    begin = os.times()
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    end = os.times()
    assert "usage: nemo-warp" in result.stdout
    assert "imported" not in result.stdout
    # of CPU, which does not depend on what else the machine does
    assert end.children_user + end.children_system - begin.children_user - begin.children_system < 1


def test_users_mistakes_are_one_line(capsys, monkeypatch):
    module = importlib.import_module(COMMANDS["doctor"][0])

    def refuse(args):
        raise ValueError("eta is 3, it must be between 0 and 2")

    monkeypatch.setattr(module, "main", refuse)
    assert main(["doctor"]) == exit_codes.MISCONFIGURED
    assert capsys.readouterr().err == "error: eta is 3, it must be between 0 and 2\n"


def test_help_of_make_lists_its_targets():
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    result = subprocess.run(
        ["make", "help"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    for target in ("setup", "doctor", "demo", "test", "lint", "clean"):
        assert f"make {target} " in result.stdout


class Place:
    """Where the doctor believes to be."""

    def __init__(self, container: bool, checkout: bool, root: bool) -> None:
        self.container, self.checkout, self.root = container, checkout, root

    def take(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(surroundings, "in_container", lambda: self.container)
        monkeypatch.setattr(surroundings, "has_checkout", lambda: self.checkout)
        monkeypatch.setattr(os, "geteuid", lambda: 0 if self.root else 1000)


CONTAINER, CHECKOUT = Place(True, False, True), Place(False, True, False)
WHEEL = Place(False, False, False)


@pytest.mark.parametrize(
    ("place", "install", "broken", "system"),
    [
        (CONTAINER, "python -m pip install --no-deps numba==0.61.0", "container's own Python",
         "apt-get install libpython"),
        (CHECKOUT, "make setup   (or run in", "rm -rf .venv && make setup",
         "sudo apt-get install libpython"),
        (WHEEL, "python -m pip install numba==0.61.0", "--force-reinstall torch==",
         "sudo apt-get install libpython"),
    ],
    ids=["container", "checkout", "wheel"],
)  # fmt: skip
def test_advice_is_what_works_there(place, install, broken, system, monkeypatch, capsys):
    place.take(monkeypatch)
    monkeypatch.setattr(health, "version", _without("numba", "isal"))
    monkeypatch.setattr(health, "_run", lambda _: subprocess.CompletedProcess([], 1, "", "no"))
    monkeypatch.setattr(health.ctypes.util, "find_library", lambda _: None)
    monkeypatch.setattr(health.sysconfig, "get_config_var", lambda _: "/nowhere")
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/usr/bin/apt-get")
    code, _, checks = _doctor(capsys, "--profile", "train")
    assert code == exit_codes.FAILED
    assert checks["numba"]["status"] == "missing"
    assert checks["numba"]["advice"].startswith(install)
    assert (checks["isal"]["status"], "zlib" in checks["isal"]["found"]) == ("optional", True)
    assert broken in checks["import torch"]["advice"]
    assert checks["libpython"]["advice"].startswith(system)
    assert ("NeMo's container" in checks["place"]["found"]) == place.container
    assert checks["PyYAML"]["status"] in ("ok", "differs")
    told = "\n".join(check["advice"] for check in checks.values())
    assert ("make setup" in told) == place.checkout
    assert ("run in the NeMo" in told) == (not place.container)


def test_a_python_that_debian_has_not(monkeypatch):
    """Debian 13 comes with 3.13 only; uv gets another one without root."""
    CHECKOUT.take(monkeypatch)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    advice = surroundings.get_python()
    assert (
        "uv python install 3.11 && PYTHON=$(~/.local/bin/uv python find 3.11) make setup" in advice
    )
    assert "apt-get" not in advice
    monkeypatch.setattr(
        shutil, "which", lambda name: "/usr/bin/python3.12" if "12" in name else None
    )
    assert surroundings.get_python() == "PYTHON=/usr/bin/python3.12 make setup"


def _without(*absent):
    def found(name):
        if name in absent:
            raise PackageNotFoundError(name)
        return version(name)

    return found
