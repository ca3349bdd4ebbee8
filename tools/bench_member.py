#!/usr/bin/env python3
"""What a member's step costs, against unmodified NeMo-Aligner: paired, in one run.

Both train the same model (built through NeMo at start) on the same machine, taking turns step by
step, so that whatever else the machine does hits both; the numbers are medians of the ratios of
the pairs, with the smallest and largest. The CPU column is the same ratio in CPU seconds of rank 0,
which a busy machine disturbs less; it says nothing where a GPU does the work.

  step          generation, rewards, log-probabilities of policy and reference, one optimizer step
                (and the EMA update of ours), at data-parallel size 1
  train, DP 2   the training phase per distinct sample, on two ranks: NeMo-Aligner trains every rank
                on the whole batch. Both take ONE optimizer step per batch here; with its own
                defaults NeMo-Aligner would take two.
  EMA update    as a share of our step
  swap          putting the reference's weights in and taking them out again
  anchor bytes  permanent, per rank

The same for both: prompts per step, number, length and micro batch of generations (the end of
sequence is forbidden), forward micro batch, training micro batch 1 (NeMo-Aligner works with no
other), gradient clipping, optimizer, and a reward computed in this process (no server).
Different, and part of what is compared: ours moves an EMA anchor, tempers log-probabilities, leaves
out the padded vocabulary and seeds every micro batch. Left out of NeMo-Aligner's time: its logging
and one of its two garbage collections.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

import _bench_member as pairs  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from _bench_common import Size, write_tokenizer  # noqa: E402

EPILOG = """examples:
  python tools/bench_member.py                                  # 2 CPU cores, a few minutes
  python tools/bench_member.py --repetitions 20 --json bench.json
  python tools/bench_member.py --hidden 2048 --layers 24 --heads 16 --vocabulary 32000 \\
      --response 256 --set trainer.precision=bf16 model.megatron_amp_O2=true     # on a GPU
"""


def main() -> int:
    """Measure and print."""
    args = _parse()
    from ranks import run_ranks

    from nemo_warp.aligner.compat import activate

    warnings.simplefilter("ignore")  # upstream's, on every step
    activate()
    logging.getLogger("nemo_logger").setLevel(logging.ERROR)
    size = Size(
        vocabulary=args.vocabulary,
        prompts=args.prompts,
        samples=args.samples,
        prompt=args.prompt,
        response=args.response,
        micro_batch=args.micro_batch,
        repetitions=args.repetitions,
        also=tuple(args.set),
    )
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(prefix="warp-bench-") as directory:
        checkpoint = Path(directory) / "model.nemo"
        run_ranks(_save_model, 1, checkpoint, args)
        one = run_ranks(pairs.run, 1, checkpoint, 1, size, timeout=args.timeout)[0]
        two = None
        if not torch.cuda.is_available() or torch.cuda.device_count() > 1:
            two = run_ranks(pairs.run, 2, checkpoint, 2, size, timeout=args.timeout)
    load.append(os.getloadavg()[0])
    rows = _compare(one, two)
    _print(rows, one["parameters"], size, load)
    if args.json:
        record = {"arguments": vars(args), "load": load, "rows": rows, "dp1": one, "dp2": two}
        args.json.write_text(json.dumps(record, indent=1, default=str) + "\n")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--repetitions", type=int, default=8, help="pairs of steps that count (default: 8)")
    add("--hidden", type=int, default=256, help="hidden size (256)")
    add("--layers", type=int, default=4, help="transformer layers (4)")
    add("--heads", type=int, default=4, help="attention heads (4)")
    add("--vocabulary", type=int, default=2000, help="tokens; padded to a multiple of 128 (2000)")
    add("--prompts", type=int, default=16, help="prompts per step (16)")
    add("--samples", type=int, default=2, help="responses per prompt (2)")
    add("--prompt", type=int, default=16, help="tokens per prompt (16)")
    add("--response", type=int, default=32, help="tokens per response (32)")
    add("--micro-batch", type=int, default=4, help="of generation and log-probabilities (4)")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of conf/member.yaml")
    add("--timeout", type=float, default=3600, help="seconds per data-parallel size (3600)")
    add("--json", type=Path, help="write every measurement there")
    args = parser.parse_args()
    if args.prompts % (2 * args.micro_batch) or args.repetitions < 1:
        parser.error(
            f"--prompts {args.prompts} must be a multiple of twice --micro-batch "
            f"{args.micro_batch} (two ranks), and --repetitions at least 1"
        )
    if args.hidden % args.heads:
        parser.error(f"--hidden {args.hidden} must be a multiple of --heads {args.heads}")
    return args


def _save_model(path: Path, args: argparse.Namespace) -> None:
    import tiny_models

    tokenizer = write_tokenizer(path.parent, args.vocabulary)
    length = args.prompt + args.response
    tiny_models.save_tiny_nemo(
        path,
        tokenizer,
        num_layers=args.layers,
        hidden_size=args.hidden,
        ffn_hidden_size=4 * args.hidden,
        num_attention_heads=args.heads,
        num_query_groups=args.heads,
        make_vocab_size_divisible_by=128,
        share_embeddings_and_output_weights=True,
        encoder_seq_length=length,
        max_position_embeddings=length,
    )


def _compare(one: dict[str, Any], two: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    ema = _ratio(one["times"]["ema_update"]["ours"], one["times"]["step"]["ours"])
    rows = [
        _row("step, DP 1: ours / theirs", _paired(one, "step"), "<= 1.02"),
        _row("training phase, DP 1: ours / theirs", _paired(one, "train")),
        _row("EMA update, DP 1: share of our step", ema, "<= 0.01"),
        _row("swap, DP 1: ours / theirs", _paired(one, "swap"), "< 1"),
        _bytes_row("anchor bytes per local parameter, DP 1", [one], 1),
    ]
    if two is not None:
        # Both batches hold the same number of distinct samples.
        speed = _paired(two[0], "train", ours_over_theirs=False)
        rows += [
            _row("training speed per distinct sample, DP 2: ours / theirs", speed, ">= 1.7"),
            _row("step, DP 2: ours / theirs", _paired(two[0], "step")),
            _row("swap, DP 2: ours / theirs", _paired(two[0], "swap")),
            _bytes_row("anchor bytes per local parameter, DP 2", two, 2),
        ]
    return rows


def _paired(run: dict[str, Any], phase: str, ours_over_theirs: bool = True) -> list[list[float]]:
    sides = run["times"][phase]
    ours, theirs = sides["ours"], sides["theirs"]
    return _ratio(ours, theirs) if ours_over_theirs else _ratio(theirs, ours)


def _ratio(upper: list, lower: list) -> list[list[float]]:
    """[wall, CPU] ratio of each pair."""
    return (np.array(upper) / np.maximum(lower, 1e-9)).tolist()


def _row(name: str, ratios: list[list[float]], goal: str = "") -> dict[str, Any]:
    wall, cpu = zip(*ratios, strict=True)
    median = statistics.median(wall)
    spread = {"median": median, "min": min(wall), "max": max(wall), "cpu": statistics.median(cpu)}
    return {"name": name, **spread, "goal": goal, "met": _met(median, goal)}


def _bytes_row(name: str, ranks: list[dict[str, Any]], data: int) -> dict[str, Any]:
    values = [rank["anchor_bytes"] / rank["parameters"] for rank in ranks]
    met = all(r["anchor_bytes"] == 4 * -(-r["parameters"] // data) for r in ranks)
    spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {"name": name, **spread, "cpu": None, "goal": f"4/{data}, rounded up", "met": met}


def _met(value: float, goal: str) -> bool | None:
    if not goal:
        return None
    relation, bound = goal.split()
    return {"<=": value <= float(bound), "<": value < float(bound), ">=": value >= float(bound)}[
        relation
    ]


def _print(rows: list[dict], parameters: int, size: Size, load: list[float]) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"\n{parameters / 1e6:.1f} M parameters on {device}; {size.batch} responses of "
        f"{size.response} tokens a step; {size.repetitions} pairs; load {load[0]:.1f} to "
        f"{load[1]:.1f} on {os.cpu_count()} cores\n"
    )
    print(f"{'':56}{'median':>8}{'min':>8}{'max':>8}{'CPU':>8}  goal")
    verdicts = {None: "", True: "met", False: "MISSED"}
    for row in rows:
        numbers = [row[key] for key in ("median", "min", "max", "cpu")]
        columns = "".join(f"{n:8.3f}" if n is not None else f"{'':8}" for n in numbers)
        print(f"{row['name']:56}{columns}  {row['goal']:10} {verdicts[row['met']]}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
