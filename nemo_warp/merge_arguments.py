"""The merger's arguments: parsed in milliseconds, before numba is imported.

Outside of `nemo_warp.merge`, because the driver checks a recipe's ``merge.arguments`` on login
nodes that have no torch. Standard library only.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

METHODS = ("slerp", "karcher", "lerp", "slerp-full")
GRANULARITIES = ("layer", "tensor", "model")
DTYPES = ("same", "float32", "bfloat16")
STOCHASTIC = "stochastic"
ROUNDINGS = ("nearest", STOCHASTIC)
SOURCES = ("weights", "masters")

_DRIVERS = ("--init", "--policies", "--output", "--eta", "--report", "--liti-towards", "--dry-run")
"""What the driver gives every merge itself."""

_EPILOG = """\
examples:
  # WARP's merge: SLERP of two policies per layer, then 30 % of the way from the init
  nemo-merge --init sft.nemo --policies a.nemo b.nemo --output next_init.nemo

  # the whole front in one read of the inputs
  nemo-merge --init sft.nemo --policies a.nemo b.nemo --eta 0 0.1 0.3 0.5 0.8 1 \\
      --output front/eta_{eta}.nemo --report front/report

  # four nodes share the layers; the result is the same, byte for byte
  srun --nodes 4 --ntasks-per-node 1 nemo-merge ... --workers 16

`python tools/merge_nemo.py` and `python -m nemo_warp.merge` are the same command.
"""


def build_parser(parser: argparse.ArgumentParser | None = None) -> argparse.ArgumentParser:
    """The command's arguments, added to ``parser`` or to a new one."""
    parser = parser or argparse.ArgumentParser(
        prog="nemo-merge",
        description="Merge checkpoints: SLERP of task vectors per layer, then interpolation "
        "towards the init (LITI), shard by shard, without a GPU, a model or NeMo.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--init", type=Path, required=True, help="theta_init; outputs take its format and layout")
    add("--policies", type=Path, nargs="+", required=True, help="theta_1 .. theta_M, in order")
    add("--output", required=True, help="a .nemo file or a folder; {eta} is replaced by each eta")
    add("--method", choices=METHODS, default="slerp", help="default: slerp, of task vectors")
    add("--granularity", choices=GRANULARITIES, default="layer", help="what shares one angle")
    add(
        "--weight",
        type=float,
        nargs="+",
        help="lambda of the second of two policies, or one share per policy (default: uniform)",
    )
    add("--eta", type=float, nargs="+", default=[0.3], help="LITI, -2 to 2 (default: 0.3)")
    add(
        "--eta-scale",
        nargs="+",
        metavar="FACTOR",
        help="times the eta of each layer: of the first and of the last, or a YAML file of "
        "layer: factor",
    )
    add("--liti-towards", type=Path, help="interpolate towards this checkpoint, not the init")
    add("--dtype", choices=DTYPES, default="same", help="of the outputs (default: the init's)")
    add("--rounding", choices=ROUNDINGS, default="nearest", help="stochastic keeps small updates")
    add("--seed", type=int, default=0, help="of stochastic rounding (default: 0)")
    add("--source", choices=SOURCES, default="weights", help="masters: fp32 optimizer copies")
    add("--vocab-size", type=int, help="true rows of the embedding (default: found in the inputs)")
    add("--allow-similar", action="store_true", help="accept policies with a cosine above 0.99")
    add(
        "--allow-different-configs",
        action="store_true",
        help="merge models with another rotary base, activation, norm, heads or tokenizer",
    )
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processors to use")
    add("--memory-gb", type=float, help="for layers, per process (default: most of what is free)")
    add("--report", type=Path, help="folder for report.json, table and pictures")
    add("--verify", nargs="?", const="sample", choices=("sample", "full"), help="reread and check")
    add("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    add("--overwrite", action="store_true", help="replace outputs that exist")
    return parser


def check_numbers(
    num_policies: int,
    weight: float | Sequence[float] | None,
    workers: int,
    vocab_size: int | None,
) -> None:
    """Refuse numbers that no merge can work with.

    Raises:
        ValueError: names the option.
    """
    check_weight(num_policies, one_weight(weight))
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, found {workers}")
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"--vocab-size must be positive, found {vocab_size}")


def check_eta_scale(words: Sequence[str] | None) -> None:
    """Refuse what is neither two numbers nor a file.

    Raises:
        ValueError: says what was found.
    """
    if words is None or (len(words) == 1 and Path(words[0]).is_file()):
        return
    try:
        first, last = map(float, words)
    except ValueError:
        first = last = math.nan
    if not (math.isfinite(first) and math.isfinite(last)):
        raise ValueError(
            "--eta-scale needs two numbers, or a YAML file of layer: factor that is there; found "
            f"{' '.join(words)}"
        )


def one_weight(
    weight: float | Sequence[float] | None,
) -> float | tuple[float, ...] | None:
    """``weight`` with a list of one number, as the command line gives it, as that number."""
    if weight is None or isinstance(weight, int | float):
        return weight
    return weight[0] if len(weight) == 1 else tuple(weight)


def check_weight(num_policies: int, weight: float | tuple[float, ...] | None) -> None:
    """Refuse a lambda or shares that do not fit the policies.

    Raises:
        ValueError: names the option.
    """
    if isinstance(weight, tuple):
        if len(weight) != num_policies or min(weight) < 0.0 or not 0.0 < sum(weight) < math.inf:
            raise ValueError(
                f"--weight needs one share >= 0 for each of {num_policies} policies, found "
                f"{' '.join(f'{share:g}' for share in weight)}"
            )
        return
    if weight is not None and num_policies != 2:
        raise ValueError(
            f"--weight needs exactly two policies, or one share per policy; found {num_policies}"
        )
    if weight is not None and not 0.0 <= weight <= 1.0:
        raise ValueError(f"--weight must lie in [0, 1], found {weight}")


def check_recipe_arguments(arguments: Sequence[object], num_policies: int) -> None:
    """Refuse a recipe's ``merge.arguments`` before any member has trained for the merge to fail.

    Raises:
        ValueError: says which argument, and why.
    """
    words = [str(word) for word in arguments]
    for word in words:
        if word.partition("=")[0] in _DRIVERS:
            raise ValueError(
                f"merge.arguments holds {word}, which the driver gives every merge itself; use the "
                "recipe's own keys (merge.eta, merge.towards, evaluation.etas)"
            )
    parser = build_parser(_Parser(prog="merge.arguments", add_help=False, allow_abbrev=False))
    given = ["--init", "i", "--policies", *["p"] * num_policies, "--output", "{eta}"]
    try:
        parsed = parser.parse_args([*given, *words])
        check_numbers(num_policies, parsed.weight, parsed.workers, parsed.vocab_size)
        check_eta_scale(parsed.eta_scale)
    except ValueError as error:
        raise ValueError(f"merge.arguments: {error}") from None


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)
