#!/usr/bin/env python3
"""What the three logit paths hold at their peak, and how long they take: plain against chunked.

Log-probabilities, a training pass (log-probabilities and their gradients) and the exact KL, of one
micro batch. Plain is NeMo-Aligner's way with a tempered law, as it was here before: logits of every
position, copies of them in fp32. Chunked is `nemo_warp.aligner.policy.log_probs`.

The peak is of tensors that live, counted by torch's MemTracker; hidden states and weights, which
both are given, are left out. On a GPU it is what the allocator says. Bytes per logit are over the
logits of all positions, [sequences, length, vocabulary].
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

TEMPERATURE = 0.9
EPILOG = """examples:
  python tools/bench_logits.py                                         # CPU, half a minute
  python tools/bench_logits.py --dtype bfloat16 --vocabulary 256000 --sequences 16 --length 1024 \\
      --prompt 512 --hidden 3072 --device cuda         # plain: more than 80 GB
"""


def main() -> int:
    """Measure and print."""
    args = _parse()
    warnings.simplefilter("ignore")
    from nemo_warp.aligner.compat import activate

    activate()
    _join()
    torch.manual_seed(0)
    task = Task(args)
    sides = {"plain": task.plain(), "chunked": task.chunked()}
    rows = [
        {"path": path, "side": side, **_measure(work, task.given, args)}
        for path in ("log-probabilities", "training", "exact KL")
        for side, paths in sides.items()
        for work in (paths[path],)
    ]
    _print(rows, args)
    if args.json:
        args.json.write_text(json.dumps({"arguments": vars(args), "rows": rows}, default=str))
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sequences", type=int, default=4, help="in the micro batch (4)")
    add("--length", type=int, default=256, help="tokens of each (256)")
    add("--prompt", type=int, default=64, help="of them the prompt's (64)")
    add("--vocabulary", type=int, default=32000, help="tokens (32000)")
    add("--hidden", type=int, default=256, help="hidden size (256)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model")
    add("--device", default="cpu", help="cpu or cuda (cpu)")
    add("--repetitions", type=int, default=3, help="timed runs of each (3)")
    add("--chunk", type=int, help="logits in a chunk; default: that of the recipe")
    add("--json", type=Path, help="write every measurement there")
    args = parser.parse_args()
    if not 0 < args.prompt < args.length:
        parser.error(f"--prompt {args.prompt} must be between 0 and --length {args.length}")
    return args


def _join() -> None:
    from megatron.core import parallel_state

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


class Task:
    """Hidden states [S, b, H] and an output layer, and the three paths over them on both sides."""

    def __init__(self, args: argparse.Namespace) -> None:
        from nemo_warp.aligner.policy import log_probs

        if args.chunk:
            log_probs.CHUNK_LOGITS = args.chunk
        like = {"dtype": getattr(torch, args.dtype), "device": args.device}
        shape = args.length, args.sequences, args.hidden
        self.states = torch.randn(*shape, **like).requires_grad_()
        self.weight = (torch.randn(args.vocabulary, args.hidden, **like) / 16).requires_grad_()
        self.other = (self.weight + torch.randn_like(self.weight) / 160).detach()
        tokens = args.sequences, args.length
        self.tokens = torch.randint(args.vocabulary, tokens, device=args.device)
        self.mask = torch.zeros(args.sequences, args.length - 1, device=args.device)
        self.mask[:, args.prompt - 1 :] = 1
        self.given = self.states, self.weight, self.other

    def plain(self) -> dict[str, Callable[[], object]]:
        """The paths with all logits."""
        from nemo_aligner.utils.distributed import (
            _compute_distributed_log_softmax,
            from_parallel_logits_to_logprobs,
        )

        def logits(weight: Tensor) -> Tensor:
            whole = torch.matmul(self.states, weight.t()).transpose(0, 1).contiguous()
            return whole.float() / TEMPERATURE

        def score(inference_only: bool = True) -> Tensor:
            return from_parallel_logits_to_logprobs(
                logits(self.weight), self.tokens, inference_only, higher_stability=True
            )

        def kl() -> Tensor:
            ours = _compute_distributed_log_softmax(logits(self.weight))[:, :-1]
            theirs = _compute_distributed_log_softmax(logits(self.other))[:, :-1]
            return (ours.exp() * (ours - theirs)).sum(-1) * self.mask

        return self._paths(score, lambda: score(False), kl)

    def chunked(self) -> dict[str, Callable[[], object]]:
        """The paths of the recipe."""
        from nemo_warp.aligner.policy.log_probs import (
            FinalStates,
            OutputLayer,
            exact_kl,
            target_log_probs,
        )

        where = self.mask != 0
        sequence, position = where.nonzero(as_tuple=True)
        index = position * len(where) + sequence
        size, dtype = len(self.weight), self.weight.dtype
        layer = OutputLayer(self.weight, 0, size, TEMPERATURE, 0.0, dtype)

        def score() -> Tensor:
            targets = self.tokens[:, 1:][where]
            return target_log_probs(self.states.flatten(0, 1), layer, index, targets)[0]

        def kl() -> Tensor:
            states = self.states.flatten(0, 1).index_select(0, index)
            return exact_kl(
                FinalStates(states, layer), FinalStates(states, layer.with_weight(self.other))
            )

        return self._paths(score, score, kl)

    def _paths(self, score: Callable, trainable: Callable, kl: Callable) -> dict[str, Callable]:
        def train() -> None:
            self.states.grad = self.weight.grad = None
            trainable().sum().backward()
            self.states.grad = self.weight.grad = None

        quiet = torch.no_grad()
        return {"log-probabilities": quiet(score), "training": train, "exact KL": quiet(kl)}


def _measure(
    work: Callable[[], object], given: Sequence[Tensor], args: argparse.Namespace
) -> dict[str, float]:
    cuda = args.device == "cuda"
    try:
        peak = _peak_on_device(work) if cuda else _peak(work, given)
        seconds = [_seconds(work, cuda) for _ in range(args.repetitions)]
    except torch.OutOfMemoryError:
        return {"peak_bytes": float("nan"), "seconds": float("nan")}
    return {"peak_bytes": peak, "seconds": statistics.median(seconds)}


def _peak(work: Callable[[], object], given: Sequence[Tensor]) -> int:
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker, cpu = MemTracker(), torch.device("cpu")
    tracker.track_external(*given)
    before = tracker.get_tracker_snapshot("current")[cpu]["Total"]
    with tracker:
        work()
    return tracker.get_tracker_snapshot("peak")[cpu]["Total"] - before


def _peak_on_device(work: Callable[[], object]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def _seconds(work: Callable[[], object], cuda: bool) -> float:
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize()
    started = clock()
    work()
    if cuda:
        torch.cuda.synchronize()
    return clock() - started


def _print(rows: list[dict], args: argparse.Namespace) -> None:
    logits = args.sequences * args.length * args.vocabulary
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(
        f"\n{args.sequences} x {args.length} tokens, {args.prompt} of them prompt, vocabulary "
        f"{args.vocabulary}: {logits / 1e6:.0f} M logits; {args.dtype}, hidden {args.hidden}, "
        f"{device}\n"
    )
    print(f"{'':20}{'':10}{'peak MB':>10}{'B / logit':>12}{'seconds':>10}")
    for row in rows:
        peak = row["peak_bytes"]
        print(
            f"{row['path']:20}{row['side']:10}{peak / 1e6:10.0f}{peak / logits:12.2f}"
            f"{row['seconds']:10.3f}"
        )


if __name__ == "__main__":
    sys.exit(main())
