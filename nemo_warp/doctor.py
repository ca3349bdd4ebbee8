"""Look at this machine: what is installed, what is stood in for, what is missing.

Every line says what was found, what the project was tested with and, where something is to be
done, the command that does it. Standard library only, so that it runs where nothing else does.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from nemo_warp import exit_codes
from nemo_warp.health import Check, Status, checks_of_machine, checks_of_packages, imports_nemo

PROFILES = ("merge", "train", "slurm")

_EPILOG = """\
profiles:
  merge   merging checkpoints and drawing fronts (torch, no NeMo)
  train   members, reward servers, evaluation (NeMo, NeMo-Aligner, Megatron-core)
  slurm   submitting and watching iterations from a login node (no torch)

exit code: 0 if the profile can be used, 1 if something it requires is missing.

examples:
  nemo-warp doctor                        everything a member needs
  nemo-warp doctor --profile slurm        on a login node
  nemo-warp doctor --deep                 also import NeMo and list what is replaced (15 s)
  nemo-warp doctor --profile slurm --run-directory recipes/gemma_7b    # before the first run
  nemo-warp doctor --json | jq .checks
"""

_MARKS = {
    Status.OK: "ok",
    Status.DIFFERS: "differs",
    Status.STOOD_IN: "stood in",
    Status.OPTIONAL: "absent",
    Status.MISSING: "MISSING",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``nemo-warp doctor``."""
    parser.epilog = _EPILOG
    parser.add_argument("--profile", choices=PROFILES, default="train", help="default: train")
    parser.add_argument(
        "--run-directory", type=Path, metavar="RECIPE|DIRECTORY",
        help="also try what a run needs there: locks (between two nodes under srun), space, and "
        "what sbatch --test-only says of every kind of job",
    )  # fmt: skip
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of the recipe of --run-directory"
    )
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object")
    parser.add_argument("--deep", action="store_true", help="import NeMo as an entry point does")


def main(args: argparse.Namespace) -> int:
    """Print the report; 0 if the profile's requirements are met."""
    checks = [*checks_of_packages(args.profile), *checks_of_machine(args.profile)]
    if args.run_directory is not None:
        checks += checks_of_place(args.run_directory, args.overrides)
    if args.deep:
        checks.append(imports_nemo())
    usable = all(check.status is not Status.MISSING for check in checks)
    print(_as_json(args.profile, usable, checks) if args.json else _as_table(args.profile, checks))
    return exit_codes.DONE if usable else exit_codes.FAILED


def checks_of_place(place: Path, overrides: Sequence[str] = ()) -> list[Check]:
    """What a run needs of ``place``; that takes the driver, and with it OmegaConf."""
    try:
        from nemo_warp.pipeline.commands.readiness import checks_of_run
    except ImportError as error:
        found = f"not tried: {error}"
        return [Check("run directory", Status.MISSING, found, advice="first the packages above")]
    return list(checks_of_run(place, overrides))


def _as_json(profile: str, usable: bool, checks: Sequence[Check]) -> str:
    rows = [{**asdict(check), "status": check.status.name.lower()} for check in checks]
    return json.dumps({"profile": profile, "usable": usable, "checks": rows}, indent=2)


def _as_table(profile: str, checks: Sequence[Check]) -> str:
    width = max(len(check.name) for check in checks)
    found_width = min(44, max(len(check.found) for check in checks))
    lines, said = [], ""
    for check in checks:
        tested = f"  (tested: {check.tested})" if check.status is Status.DIFFERS else ""
        found = f"{check.found:<{found_width}}"
        lines.append(f"{_MARKS[check.status]:<9}{check.name:<{width}}  {found}{tested}".rstrip())
        if check.advice not in ("", said):  # the same command for ten packages is said once
            lines.append(f"{'':<{9 + width}}  -> {check.advice}")
        said = check.advice
    return "\n".join([*lines, "", _conclusion(profile, checks)])


def _conclusion(profile: str, checks: Sequence[Check]) -> str:
    missing = [check.name for check in checks if check.status is Status.MISSING]
    if missing:
        return f"Not ready for {profile!r}: {', '.join(missing)}."
    differing = sum(check.status is Status.DIFFERS for check in checks)
    note = f" {differing} differ from what was tested." if differing else ""
    return f"Ready for {profile!r}.{note}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
