"""The King James Bible, one verse a line, from Debian's ``bible-kjv`` packages.

Nothing is installed: the two packages are downloaded with apt, unpacked into a cache directory, and
their own ``bible`` program prints the text. When apt has no package lists (a fresh container), or
may not touch the system's (no root), it is given private ones inside the cache.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

PACKAGES = ("bible-kjv", "bible-kjv-text")
NUM_VERSES = 31102
TEXT_SHA256 = "9a503270e649168ef3235337e73de9084094a0958ead10c90d4539dfdd81b329"
"""SHA-256 of the verses of bible-kjv-text 4.38 as `verses` returns them, joined by newlines."""

_BY_HAND = (
    "either install them (`apt-get install bible-kjv`) and rerun, or give any English text, one "
    "sentence or verse a line, with --text FILE"
)


def verses(cache: Path) -> list[str]:
    """The 31 102 verses in order, without their references and with single spaces.

    Raises:
        ValueError: the packages cannot be fetched or unpacked, or the text is not the one expected.
    """
    program, library = _installed() or _unpacked(cache)
    text = _run_bible(program, library, cache)
    found = [" ".join(line.split()[1:]) for line in text.splitlines()]
    if len(found) != NUM_VERSES:
        raise ValueError(f"{program} printed {len(found)} verses, not {NUM_VERSES}; {_BY_HAND}")
    if hashlib.sha256("\n".join(found).encode()).hexdigest() != TEXT_SHA256:
        print(
            "note: this King James text differs from bible-kjv-text 4.38, so results will not "
            "equal the documented ones exactly",
            file=sys.stderr,
        )
    return found


def _installed() -> tuple[Path, Path] | None:
    """The system's own ``bible`` and its data directory, when the packages are installed."""
    program, library = Path("/usr/bin/bible"), Path("/usr/lib")
    return (program, library) if program.exists() and (library / "bible.data").exists() else None


def _unpacked(cache: Path) -> tuple[Path, Path]:
    """``bible`` and its data directory, unpacked below ``cache`` (downloaded once)."""
    root = cache / "root"
    if not (root / "usr/lib/bible.data").exists() or not (root / "usr/bin/bible").exists():
        for package in PACKAGES:
            _download_and_unpack(package, cache, root)
    return root / "usr/bin/bible", root / "usr/lib"


def _download_and_unpack(package: str, cache: Path, root: Path) -> None:
    debs = cache / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    deb = _find_deb(debs, package)
    if deb is None:
        _apt_download(package, cache, debs)
        deb = _find_deb(debs, package)
    if deb is None:
        raise ValueError(f"apt downloaded no {package} package into {debs}; {_BY_HAND}")
    unpack = subprocess.run(
        ["dpkg-deb", "-x", str(deb), str(root)], capture_output=True, text=True, check=False
    )
    if unpack.returncode != 0:
        deb.unlink()  # most likely truncated: the next run fetches it again
        raise ValueError(f"{deb} cannot be unpacked ({unpack.stderr.strip()}); rerun to fetch it")


def _find_deb(debs: Path, package: str) -> Path | None:
    return next(iter(sorted(debs.glob(f"{package}_*.deb"))), None)


def _apt_download(package: str, cache: Path, debs: Path) -> None:
    """Download one package with the system's lists or, failing that, with fresh private ones."""
    if _apt(["download", package], debs).returncode == 0:
        return
    private = _private_apt_options(cache)
    update = _apt([*private, "update"], debs)
    download = _apt([*private, "download", package], debs)
    if download.returncode != 0:
        reason = (download.stderr or update.stderr).strip().splitlines()[-1:]
        raise ValueError(f"apt cannot download {package} ({' '.join(reason)}); {_BY_HAND}")


def _private_apt_options(cache: Path) -> list[str]:
    state, archives = (cache / "apt/state").resolve(), (cache / "apt/cache").resolve()
    (state / "lists/partial").mkdir(parents=True, exist_ok=True)
    (archives / "archives/partial").mkdir(parents=True, exist_ok=True)
    options = {
        "Dir::State": state,
        "Dir::State::status": "/var/lib/dpkg/status",
        "Dir::Cache": archives,
    }
    return [part for key, value in options.items() for part in ("-o", f"{key}={value}")]


def _apt(arguments: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    # The sandbox user of a root apt cannot write below a private directory.
    user = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    try:
        return subprocess.run(
            ["apt-get", *user, *arguments],
            cwd=directory,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise ValueError(f"the packages {PACKAGES} need Debian's apt-get; {_BY_HAND}") from None


def _run_bible(program: Path, library: Path, cache: Path) -> str:
    """All verses as ``bible`` prints them: ``Ge1:1 In the beginning ...``."""
    result = _bible(program, library, cache)
    if "shared libraries" in result.stderr:  # a slim container may lack readline
        _download_and_unpack(_readline_package(program, cache), cache, cache / "root")
        result = _bible(program, library, cache)
    if result.returncode != 0:
        raise ValueError(f"{program} failed ({result.stderr.strip()}); {_BY_HAND}")
    return result.stdout


def _bible(program: Path, library: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    directories = sorted({str(path.parent) for path in (cache / "root").rglob("lib*.so.*")})
    environment = {**os.environ, "LC_ALL": "C"}
    if directories:
        environment["LD_LIBRARY_PATH"] = ":".join(directories)
    return subprocess.run(
        [str(program), "-f", "-p", str(library), "gen1:1-rev22:21"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def _readline_package(program: Path, cache: Path) -> str:
    """The name of the readline library's package, from the dependencies of ``bible-kjv``."""
    deb = _find_deb(cache / "debs", "bible-kjv")
    fields = ["dpkg-deb", "-f", str(deb), "Depends"]
    depends = subprocess.run(fields, capture_output=True, text=True, check=False).stdout
    names = [entry.split()[0] for entry in depends.split(",") if entry.strip()]
    readline = next((name for name in names if name.startswith("libreadline")), None)
    if readline is None:
        raise ValueError(f"{program} misses a shared library; {_BY_HAND}")
    return readline
