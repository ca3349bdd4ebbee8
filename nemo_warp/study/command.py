"""Run a study: a recipe's variants under several seeds; and show what they measured.

  nemo-warp study recipes/study/tiny.yaml --dry-run       which runs, and which are done
  nemo-warp study recipes/study/tiny.yaml                 make the others, one by one
  nemo-warp study recipes/study/tiny.yaml --only warp     of some variants only
  nemo-warp study recipes/study/tiny.yaml --report OUT    results.json, compare.md and pictures

May be stopped and started as often as you like: a run that is done is not made again, one that was
begun goes on. --results FILE draws from a results.json of another machine, without any run.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from nemo_warp import exit_codes
from nemo_warp.schema.study import Study
from nemo_warp.study.load import Run, load_study, runs_of
from nemo_warp.study.start import command, make


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``nemo-warp study``."""
    parser.add_argument("study", type=Path, help="the study's YAML file")
    parser.add_argument("--directory", type=Path, help="of the runs [the file's]")
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT", help="these variants")
    parser.add_argument("--dry-run", action="store_true", help="show the commands, start nothing")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write what was measured")
    parser.add_argument("--results", type=Path, help="with --report: a results.json to draw from")


def main(args: argparse.Namespace) -> int:
    """Make the runs, or report on them; an exit code of `nemo_warp.exit_codes`."""
    study = load_study(args.study, args.directory)
    runs = runs_of(study, args.only)
    if args.results and not args.report:
        raise ValueError("--results is drawn from, so it needs --report DIR")
    if args.report:
        return _report(study, runs, args.results, args.report)
    if args.dry_run:
        for run in runs:
            taken = f"  # members of {run.members_from}" if run.members_from else ""
            words = "done" if run.is_done else shlex.join(command(run)[3:]) + taken
            print(f"{run.name}: {words}")
        return exit_codes.DONE
    codes = make(runs)
    done = sum(run.is_done for run in runs)
    print(f"{done} of {len(runs)} runs of {study.name} are done")
    failed = [code for code in codes.values() if code != exit_codes.DONE]
    return failed[0] if failed else exit_codes.DONE


def _report(study: Study, runs: list[Run], results: Path | None, output: Path) -> int:
    # here, because numpy, scipy and matplotlib take seconds that --help need not wait for
    from nemo_warp.study.report import write_study
    from nemo_warp.study.results import FILE, collect, read_results, write_results

    found = collect(runs) if results is None else read_results(results)
    files = write_study(study, found, output)
    if results is None:
        files.append(output / FILE)
        write_results(found, files[-1])
    print("\n".join(map(str, files)))
    return exit_codes.DONE
