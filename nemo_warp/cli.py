"""The command ``nemo-warp``: one subcommand per module, imported only when it is called.

A subcommand is a row of `COMMANDS` and a module with two functions::

    def add_arguments(parser: argparse.ArgumentParser) -> None: ...
    def main(args: argparse.Namespace) -> int: ...   # an exit code, see nemo_warp.exit_codes

Its docstring is the text of ``--help``. A `ValueError` or `RecordError` it raises becomes one
line, ``error: ...``, and so does what a file system refuses; anything else is a bug and keeps its
stack trace.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import nemo_warp
from nemo_warp import exit_codes

COMMANDS = {
    "run": ("nemo_warp.pipeline.commands.run", "start a recipe, or go on with it"),
    "plan": ("nemo_warp.pipeline.commands.plan", "what would run, where, and what it costs"),
    "status": ("nemo_warp.pipeline.commands.status", "what is done, running, failed, and next"),
    "resume": ("nemo_warp.pipeline.commands.resume", "go on after a stop or a failure"),
    "stop": ("nemo_warp.pipeline.commands.stop", "let members save, start nothing more"),
    "pick": ("nemo_warp.pipeline.commands.pick", "publish the policy of a front at a KL"),
    "report": ("nemo_warp.reporting.report", "one page of everything a run has measured"),
    "compare": ("nemo_warp.reporting.compare", "two policies side by side, or runs over seeds"),
    "study": ("nemo_warp.study.command", "variants of a recipe times seeds, and what they show"),
    "keys": ("nemo_warp.keys", "every configuration key: type, default, range, meaning"),
    "logs": ("nemo_warp.pipeline.commands.logs", "what a stage printed; -f follows it"),
    "clean": ("nemo_warp.pipeline.commands.clean", "remove what a run needs no more"),
    "doctor": ("nemo_warp.doctor", "what is installed, what is missing and how to get it"),
}
"""Subcommand -> the module that implements it and its line in ``nemo-warp --help``."""

_EPILOG = """\
examples:
  nemo-warp doctor                              is this machine ready?
  nemo-warp COMMAND --help                      everything about one command
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; the process's exit code."""
    if sys.version_info < (3, 10):  # noqa: UP036 (an older Python gets here)
        found = ".".join(map(str, sys.version_info[:2]))
        print(f"error: Python 3.10 to 3.12 is needed, this is {found}", file=sys.stderr)
        return exit_codes.MISCONFIGURED
    from nemo_warp.disk_errors import in_a_sentence
    from nemo_warp.records import RecordError  # needs that Python

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser(arguments)
    args, rest = parser.parse_known_args(arguments)
    # argparse takes no more key=value after an option that follows the first of them
    if not hasattr(args, "overrides") or any(w.startswith("-") or "=" not in w for w in rest):
        args = parser.parse_args(arguments)
    else:
        args.overrides = [*args.overrides, *rest]
    try:
        return args.main(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.MISCONFIGURED
    except RecordError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.FAILED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `nemo-warp status | head`
        sys.stderr.close()
        return exit_codes.DONE
    except OSError as error:
        sentence = in_a_sentence(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return exit_codes.FAILED


class _Version(argparse.Action):
    """Asks git, so only when it is asked itself."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from nemo_warp.records import code_version

        print(f"nemo-warp {code_version()}")
        parser.exit()


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The whole parser; only the subcommand that is asked for is imported and filled in."""
    parser = argparse.ArgumentParser(
        prog="nemo-warp",
        description=nemo_warp.__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="version and commit")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, (module_name, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == wanted:
            module = importlib.import_module(module_name)
            subparser.description = module.__doc__
            module.add_arguments(subparser)
            subparser.set_defaults(main=module.main)
    return parser


if __name__ == "__main__":
    sys.exit(main())
