"""``nemo-warp pick``: publish the policy of a finished front at a KL to SFT."""

from __future__ import annotations

import argparse
import json

from nemo_warp import exit_codes
from nemo_warp.pipeline.commands.common import add_recipe, existing, in_words, queue_of
from nemo_warp.pipeline.commands.run import go
from nemo_warp.pipeline.disk.opening import present_pins, what_changes
from nemo_warp.pipeline.disk.state import Status, inspect
from nemo_warp.pipeline.recipe.load import Recipe
from nemo_warp.pipeline.recipe.plan import FINAL, FRONT, PICK, REPORT

EPILOG = """\
The points of the front that were measured bracket the budget; between them kappa is found by
measuring more points on the same prompts, until KL lies within the tolerance below the budget.
final/policy.nemo becomes that policy (the one before goes to superseded/), pick/chosen.json says
kappa, KL, reward and judges, and so does the record of final/. It is the same as front.final_kl in
the recipe. Repeat it with another budget as often as you like.

  nemo-warp pick runs/tiny --kl 10
  nemo-warp pick runs/gemma-7b --kl 60 --tolerance 1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.epilog = EPILOG
    add_recipe(parser)
    parser.add_argument("--kl", type=float, required=True, metavar="NATS", help="the budget")
    parser.add_argument(
        "--tolerance", type=float, metavar="NATS", help="[front.kl_tolerance of the recipe]"
    )


@in_words
def main(args: argparse.Namespace) -> int:
    """Search, publish and report; returns an exit code."""
    # repr: all digits, since the number is part of the stage's identity.
    args.overrides = [*args.overrides, f"front.final_kl={args.kl!r}"]
    if args.tolerance is not None:
        args.overrides.append(f"front.kl_tolerance={args.tolerance!r}")
    recipe = existing(args)
    front = inspect(recipe, queue_of(recipe))[FRONT]
    if front.status is not Status.DONE:
        raise ValueError(
            f"the front of {recipe.paths.root} is {front.status.value}, expected done: first "
            f"nemo-warp run {recipe.paths.root}"
        )
    _refuse_more(recipe)
    # Safe to redo by itself: `_refuse_more` has made sure that only the choice and what follows
    # change. Members are not made here, so another version of the code is allowed.
    code = go(recipe, redo=True, other_code=True)
    if code == exit_codes.DONE:
        print(chosen(recipe))
    return code


def _refuse_more(recipe: Recipe) -> None:
    """Raise ValueError if more than the choice would be made again."""
    changed = what_changes(recipe, present_pins(recipe)).redone
    more = [name for name in changed if name not in (PICK, FINAL, REPORT)]
    if more:
        raise ValueError(
            f"the recipe or an input has changed, which would redo {more[0]} ({changed[more[0]]}); "
            f"first: nemo-warp run {recipe.paths.root} --redo"
        )


def chosen(recipe: Recipe) -> str:
    """What was chosen, in a line."""
    found = json.loads(recipe.paths.stage(PICK).chosen.read_text())
    point = found["point"]
    judges = ", ".join(
        f"{name} {'failed' if value is None else format(value, '.3f')}"
        for name, value in (point.get("judges") or {}).items()
    )
    return (
        f"kappa {found['kappa']:g}: KL {found['kl']:.2f} of {found['budget']:g} nats, reward "
        f"{point['reward']:.3f}{f', {judges}' if judges else ''}"
    )
