"""Code that is run against tests, each in a process with limits on time, memory and files.

    --callable nemo_warp.rewards.library.programs:PassesTests --concurrency 16

Programs have Python's standard library. The limits stop loops, large memories and full disks. They
are no jail for code that means harm: it reads what the server may read, reaches the network and may
start processes that outlive it. Where that matters run the server in a container, or give
``prefix``, such as [bwrap, --ro-bind, /, /, --bind, /tmp, /tmp, --unshare-all].
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_FENCED = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_MIB = 2**20

# The limits are set in the new process: preexec_fn is not safe in a server with threads. What the
# program prints last proves that it came to its end: sys.exit(0) before the tests is no success.
_RUNNER = """
import json, os, resource, sys
limits = json.loads(sys.argv[1])
word = sys.stdin.buffer.raw.readline().decode().strip()
for name, value in limits.items():
    try:
        resource.setrlimit(getattr(resource, name), (value, value))
    except ValueError:
        pass  # the server's own limit is lower
source = open(sys.argv[2]).read()
done = os.dup(2)
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
sys.stdout.flush()
os.write(done, word.encode())
"""


class PassesTests:
    """The share of the tests that the response's program passes, or whether it passes all.

    The program is the response's last block of Python between ``` fences; the whole response where
    there is none. The field ``tests`` holds texts of Python that raise if the program is wrong
    (``assert f(2) == 4``; a list, or one text), or a list of {"input", "output"}: what the program
    reads, and what it must then print (compared by lines, without spaces at their ends).

    Args:
        share: score the share of the tests passed, not 1 for all of them and else 0.
        seconds: of one test, by the clock; twice that of processor time.
        memory_mib: that one test may take.
        files_mib: size of any file that it may write, in a directory that is removed.
        prefix: words before the interpreter's, see above.
    """

    distributions = ()

    def __init__(
        self,
        share: bool = False,
        seconds: float = 10.0,
        memory_mib: int = 1024,
        files_mib: int = 16,
        prefix: Sequence[str] = (),
    ) -> None:
        if prefix and shutil.which(prefix[0]) is None:
            raise ValueError(f"prefix: there is no program {prefix[0]!r}")
        self._share = share
        self._seconds = seconds
        # -I and -S: no user site, no environment variables of Python, none of this server's
        # packages.
        self._words = [*prefix, sys.executable, "-I", "-S", "-c", _RUNNER]
        self._limits = {
            "RLIMIT_CPU": max(1, round(2 * seconds)),
            "RLIMIT_AS": memory_mib * _MIB,
            "RLIMIT_FSIZE": files_mib * _MIB,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
        }

        # Otherwise what keeps programs from running would be the score 0 of every response.
        if not self._passes("x = 1", "assert x == 1"):
            raise ValueError(
                "a program that must pass its test does not: check prefix, seconds and memory_mib "
                f"({' '.join(self._words[: len(prefix) + 1])}, {self._limits})"
            )

    def __call__(
        self,
        prompt: str,
        response: str,
        tests: str | Sequence[str | Mapping[str, Any]],
        language: str = "python",
    ) -> float:
        """The score of one response.

        Raises:
            ValueError: another language, or tests that are none.
            OSError: a process could not be started.
        """
        if language.lower() not in ("python", "python3", "py"):
            raise ValueError(f"language {language!r} cannot be run, only python")
        given = [tests] if isinstance(tests, str | Mapping) else list(tests)
        if not given or not all(map(_is_test, given)):
            raise ValueError("tests must be texts of Python, or tables of input and output")
        program = program_of(response)
        passed = 0
        for number, test in enumerate(given, 1):
            passed += self._passes(program, test)
            # One failure decides: the other tests need not run.
            if passed < number and not self._share:
                return 0.0
        return passed / len(given)

    def _passes(self, program: str, test: str | Mapping[str, Any]) -> bool:
        if isinstance(test, str):
            return self._run(f"{program}\n{test}\n", "") is not None
        printed = self._run(program, str(test["input"]))
        return printed is not None and _lines(printed) == _lines(str(test["output"]))

    def _run(self, source: str, given: str) -> str | None:
        """What the program prints; None if it fails, or passes a limit."""
        # Drawn for each test: a program that prints any fixed word would pass.
        word = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(prefix="tests-", ignore_cleanup_errors=True) as directory:
            file = Path(directory) / "program.py"
            file.write_text(source, encoding="utf-8", errors="replace")
            output = Path(directory) / "output"
            with output.open("wb") as stream:
                process = subprocess.Popen(
                    [*self._words, json.dumps(self._limits), str(file)],
                    stdin=subprocess.PIPE,
                    stdout=stream,  # a file: its size is limited, too
                    stderr=subprocess.PIPE,
                    cwd=directory,
                    env={"PATH": os.defpath, "HOME": directory, "PYTHONIOENCODING": "utf-8"},
                    start_new_session=True,
                )
            try:
                _, told = process.communicate(f"{word}\n{given}".encode(), self._seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                _kill(process)
            if process.returncode != 0 or told.decode(errors="replace") != word:
                return None
            return output.read_text(encoding="utf-8", errors="replace")


def program_of(response: str) -> str:
    """The last fenced block of Python; the whole text where there is none."""
    blocks = _FENCED.findall(response)
    return blocks[-1] if blocks else response


def _is_test(test: Any) -> bool:
    if isinstance(test, Mapping):
        return {"input", "output"} <= test.keys()
    return isinstance(test, str)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _kill(process: subprocess.Popen) -> None:
    """The program, and what it started in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stderr):
        if stream is not None:
            stream.close()
