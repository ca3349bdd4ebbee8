"""Check a GPU machine: small members in bf16 with O2, at the layouts that fit its GPUs.

    make gpu-check                                       in the container, or wherever GPUs are
    python tools/gpu_check.py --device cpu --ranks 2     the same on a CPU, tiny (a rehearsal)

About ten minutes. For each layout and each optimizer a member is trained, saved, resumed and
exported: gradients are not 0 after either, results of layouts agree as far as bf16 goes, anchors
are kept bit for bit, memory is within the estimate of `nemo-warp plan`. Then two members are merged
and a front is measured. TensorRT-LLM generates where it is installed. Prints a table and writes
gpu-check.json, which you can send us. Exit code: 0 if all is well, 1 if something is not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemo_warp.pipeline.launch.steps import Allocation, Step
from nemo_warp.pipeline.ranks import free_port

HERE = Path(__file__).resolve().parent
PRETRAIN = HERE.parent / "recipes" / "tiny" / "pretrain.yaml"
WITHIN = 0.05
"""Of gradient norms of two layouts, relative, and of their log-probabilities, in nats."""
PACKAGES = (
    "torch", "nemo-toolkit", "nemo-aligner", "megatron-core", "transformer-engine", "apex",
    "tensorrt-llm", "nvidia-pytriton",
)  # fmt: skip
WORDS = "in the beginning god created heaven and earth without form void darkness upon face deep"


@dataclass(frozen=True)
class Size:
    """The model, and how long its responses are."""

    layers: int
    hidden: int
    heads: int
    response: int

    def model(self, tokenizer: Path, transformer_engine: bool, gpu: bool) -> dict[str, Any]:
        """What differs from recipes/tiny/pretrain.yaml; in the way of Llama."""
        length = 2 * self.response
        return {
            "data": {"train": "", "validation": ""}, "output": "", "metrics": "",
            "trainer": {"devices": 1, "accelerator": "gpu" if gpu else "cpu"},
            "model": {
                "num_layers": self.layers, "hidden_size": self.hidden,
                "ffn_hidden_size": 4 * self.hidden, "num_attention_heads": self.heads,
                "num_query_groups": self.heads // 2, "encoder_seq_length": length,
                "max_position_embeddings": length, "position_embedding_type": "rope",
                "normalization": "rmsnorm", "activation": "fast-swiglu",
                "share_embeddings_and_output_weights": False,
                "transformer_engine": transformer_engine,
                "tokenizer": {"model": str(tokenizer)}, "data": {"seq_length": length},
            },
        }  # fmt: skip


SIZES = {"cpu": Size(2, 64, 8, 16), "gpu": Size(16, 2048, 16, 128)}


@dataclass(frozen=True)
class Layout:
    """A layout, over some ranks."""

    ranks: int
    tensor: int = 1
    pipeline: int = 1

    def __str__(self) -> str:
        data = self.ranks // (self.tensor * self.pipeline)
        sequence = "-sp" if self.tensor > 1 else ""
        return f"tp{self.tensor}{sequence}-pp{self.pipeline}-dp{data}"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    where: str
    what: str
    found: str
    right: bool


def layouts(ranks: int) -> list[Layout]:
    """One rank first: the others are compared with it."""
    more = {
        2: [Layout(2, tensor=2), Layout(2), Layout(2, pipeline=2)],
        4: [Layout(4, tensor=2), Layout(4, tensor=2, pipeline=2)],
        8: [Layout(8, tensor=2), Layout(8, tensor=4, pipeline=2), Layout(8)],
    }
    return [Layout(1), *more.get(ranks, [])]


def main() -> int:
    """Entry point; see the module's text."""
    arguments = _arguments()
    gpus, name = _gpus()
    device = arguments.device or ("gpu" if gpus else "cpu")
    ranks = arguments.ranks or max(n for n in (1, 2, 4, 8) if n <= max(1, gpus))
    if device == "gpu" and gpus < ranks:
        print(f"error: {ranks} ranks on {gpus} GPUs; use --device cpu or fewer", file=sys.stderr)
        return 2
    chosen = [x for x in layouts(ranks) if not arguments.layouts or str(x) in arguments.layouts]
    directory = Path(arguments.directory or tempfile.mkdtemp(prefix="gpu-check-"))
    check = Check(directory, device, SIZES[device], arguments.optimizers or _optimizers(device))
    started = time.monotonic()
    try:
        rows = check.run(chosen)
    finally:
        check.stop()
    report = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "device": name if device == "gpu" else "cpu",
        "ranks": ranks,
        "packages": {p: found for p in PACKAGES if (found := _version(p))},
        "seconds": round(time.monotonic() - started),
        "rows": [asdict(row) for row in rows],
        "layouts": check.found,
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows))
    wrong = sum(not row.right for row in rows)
    print(f"\n{len(rows) - wrong} of {len(rows)} are right on {report['device']}, "
          f"{report['seconds']} s; {arguments.output} has all numbers")  # fmt: skip
    if not arguments.directory:
        shutil.rmtree(directory, ignore_errors=True)
    return int(wrong > 0)


def run_step(step: Step, log: Path, environment: dict[str, str]) -> int:
    """Run ranks as the driver runs a stage's; returns their exit status."""
    allocation = Allocation()
    with log.open("w") as stream:
        return subprocess.run(
            step.command(allocation, free_port()), stdout=stream, stderr=stream,
            env=environment | step.environment(allocation), check=False,
        ).returncode  # fmt: skip


Start = Callable[[Step, Path, dict[str, str]], int]


class Check:
    """Runs the layouts, one after another, in processes of their own.

    Args:
        start: runs a layout's ranks; tests give another, since NeMo's import takes long.

    Attributes:
        found: by layout, what its ranks found.
    """

    def __init__(
        self,
        directory: Path,
        device: str,
        size: Size,
        optimizers: list[str],
        start: Start | None = None,
    ) -> None:
        self.directory, self.device, self.size = directory, device, size
        self.optimizers = optimizers
        self._start = start or run_step
        self.found: dict[str, Any] = {}
        self._server: subprocess.Popen[bytes] | None = None
        self._engine = device == "gpu" and find_spec("tensorrt_llm") is not None
        self._spec = self._common()

    def run(self, chosen: list[Layout]) -> list[Row]:
        """All checks of all layouts."""
        self._serve_reward()
        rows: list[Row] = []
        for number, layout in enumerate(chosen):
            last = number == len(chosen) - 1
            rows += self._layout(layout, self._merge(rows) if last and number else None)
        if len(chosen) == 1 and (merged := self._merge(rows)):  # members come before a merge
            rows += self._layout(chosen[0], merged, optimizers=[])
        if self._engine:
            rows += self._layout(chosen[-1], None, ["mcore_distributed_optim"], engine=True)
        return rows

    def stop(self) -> None:
        """End the reward server."""
        if self._server is not None:
            self._server.terminate()
            self._server.wait()

    def _common(self) -> dict[str, Any]:
        self.directory.mkdir(parents=True, exist_ok=True)
        tokenizer, vocabulary = _tokenizer(self.directory)
        prompts = self.directory / "prompts.jsonl"
        lines = [json.dumps({"prompt": " ".join(_words(seed, 2))}) for seed in range(32)]
        prompts.write_text("".join(f"{line}\n" for line in lines))
        engine = find_spec("transformer_engine") is not None and self.device == "gpu"
        return {
            "directory": str(self.directory), "init": str(self.directory / "init.nemo"),
            "prompts": str(prompts), "endpoint": str(self.directory / "endpoint.json"),
            "pretrain": str(PRETRAIN), "vocabulary": vocabulary, "response": self.size.response,
            "transformer_engine": engine,
            "model": self.size.model(tokenizer, engine, self.device == "gpu"),
        }  # fmt: skip

    def _layout(
        self, layout: Layout, front: str | None, optimizers: list[str] | None = None,
        engine: bool = False,
    ) -> list[Row]:  # fmt: skip
        name = f"{layout}{'-trtllm' if engine else ''}{'-front' if optimizers == [] else ''}"
        optimizers = self.optimizers if optimizers is None else optimizers
        spec = self._spec | {
            "name": name, "ranks": layout.ranks, "tensor": layout.tensor,
            "pipeline": layout.pipeline, "optimizers": optimizers, "engine": engine,
            "prepare": not Path(self._spec["init"]).exists(), "front": front,
            "result": str(self.directory / f"{name}.json"),
        }  # fmt: skip
        file = self.directory / f"{name}.spec"
        file.write_text(json.dumps(spec))
        words = (sys.executable, str(HERE / "_gpu_check_ranks.py"), str(file))
        step = Step(name, words, processes_per_node=layout.ranks, mpi=engine and layout.ranks > 1)
        log = self.directory / f"{name}.log"
        print(f"{name} ... (log: {log})", file=sys.stderr, flush=True)
        code = self._start(step, log, self._environment())
        if code:
            return [Row(name, "ranks", f"exit code {code}: {_last_error(log)}", False)]
        self.found[name] = json.loads(Path(spec["result"]).read_text())
        return list(rows_of(name, self.found[name], self.found.get(str(Layout(1)))))

    def _merge(self, rows: list[Row]) -> str | None:
        """The SLERP of the first two members' policies; None where there are not two."""
        policies = [m["policy"] for f in self.found.values() for m in f["members"].values()]
        policies = [policy for policy in policies if Path(policy).exists()][:2]
        if len(policies) < 2:
            return None
        output = self.directory / "merged.nemo"
        words = [sys.executable, "-m", "nemo_warp.merge", "--init", self._spec["init"]]
        words += ["--policies", *policies, "--eta", "1", "--output", str(output)]
        done = subprocess.run(
            words, text=True, capture_output=True, env=self._environment(), check=False
        )
        said = "written" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
        rows.append(Row("merge", "SLERP of two members", said, done.returncode == 0))
        return str(output) if done.returncode == 0 else None

    def _serve_reward(self) -> None:
        words = [sys.executable, "-m", "nemo_warp.rewards.serve", "--run-id", "gpu-check"]
        words += ["--callable", "_gpu_check_ranks:share_of_vowels"]
        words += ["--endpoint-file", self._spec["endpoint"]]
        log = (self.directory / "reward.log").open("w")
        self._server = subprocess.Popen(words, stdout=log, stderr=log, env=self._environment())

    def _environment(self) -> dict[str, str]:
        """This process's, in which modules of this folder are found and OpenMP does not crowd."""
        path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {}
        return {**os.environ, "PYTHONPATH": path, **hidden}


def rows_of(name: str, found: dict[str, Any], first: dict[str, Any] | None) -> Any:
    """The table's lines of a layout.

    Args:
        first: what was found on one rank, to be compared with.
    """
    for optimizer, member in found["members"].items():
        where = f"{name} {optimizer}"
        norms = member["member_norms"]
        good = member["exit_code"] == 0 and all(norm > 0 for norm in norms)
        shown = ", ".join(f"{n:.3g}" for n in norms)
        yield Row(where, "member: gradients before and after a save", shown, good)
        if "norms" in member:
            yield from _numbers(where, member, (first or found)["members"].get(optimizer))
        yield _memory(where, member)
        yield Row(where, "speed", _speed(member), True)
    if found.get("front") is not None:
        points = found["front"]
        shown = "; ".join(
            f"eta {p['eta']:g}: {p['reward']:.3f}, {p['kl_to_sft']:.2g}" for p in points
        )
        yield Row(name, "front: reward, KL", shown, len(points) == 2)
    exchange = found["exchange"]
    speed = f"{exchange['backend']}, {exchange['ranks']} ranks, "
    speed += f"{exchange['gigabytes_per_second']:.1f} GB/s"
    yield Row(name, "all-reduce of 64 MiB", speed, exchange["right"])


def _numbers(where: str, member: dict[str, Any], one: dict[str, Any] | None) -> Any:
    norms, again = member["norms"], member["resumed_norms"]
    good = all(n > 0 for n in [*norms, *again])
    close = abs(again[-1] / norms[-1] - 1) if norms[-1] else float("inf")
    shown = f"{again[-1]:.6g} and {norms[-1]:.6g}"
    yield Row(where, "gradient after a resume, and without", shown, good and close <= WITHIN)
    exact = member["anchor_starts_as_policy"] and member["anchor_survives"]
    yield Row(where, "anchor: as the policy at first, as saved after", str(exact), exact)
    if one is None or one is member:
        return
    norm = max(abs(a / b - 1) for a, b in zip(norms, one["norms"], strict=True))
    pairs = zip(_flat(member["log_probs"]), _flat(one["log_probs"]), strict=True)
    nats = sum(abs(a - b) for a, b in pairs) / len(_flat(one["log_probs"]))
    shown = f"norms {norm:.1%}, log-probabilities {nats:.2g} nats"
    yield Row(where, "difference from one rank", shown, max(norm, nats) <= WITHIN)


def _memory(where: str, member: dict[str, Any]) -> Row:
    """Of a GPU; a process's memory on a CPU holds Python and NeMo, too, and says nothing."""
    peak, estimate = member["peak_memory_bytes"] / 1e9, member["estimated_bytes"] / 1e9
    on_gpu = member["flops_utilisation"] is not None
    shown = f"{peak:.3g} GB, estimate {estimate:.3g} GB"
    return Row(where, "memory, and its estimate", shown, not on_gpu or peak <= 1.1 * estimate + 1)


def _speed(member: dict[str, Any]) -> str:
    words = f"{member['seconds_per_step']:.2f} s a step, "
    words += f"{member['generated_tokens_per_second']:.0f} tokens/s generated, "
    words += f"{member['trained_tokens_per_second']:.0f} trained"
    used = member["flops_utilisation"]
    return words if used is None else f"{words}, {used:.1%} of the FLOPs"


def _flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


def table(rows: list[Row]) -> str:
    """Rows as aligned text."""
    where, what = (max(len(getattr(r, n)) for r in rows) for n in ("where", "what"))
    marks = {True: "ok   ", False: "WRONG"}
    return "\n".join(
        f"{marks[r.right]} {r.where:<{where}}  {r.what:<{what}}  {r.found}" for r in rows
    )


def _last_error(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if "rror" in line]
    return (lines or ["see its log"])[-1].strip()


def _words(seed: int, number: int) -> list[str]:
    return random.Random(seed).choices(WORDS.split(), k=number)


def _tokenizer(directory: Path) -> tuple[Path, int]:
    """A SentencePiece model of a few words, and its number of entries."""
    import sentencepiece

    text, prefix = directory / "words.txt", directory / "tokenizer"
    text.write_text("\n".join(" ".join(_words(seed, 12)) for seed in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(prefix), vocab_size=96, model_type="bpe", num_threads=1,
        minloglevel=2, bos_id=1, eos_id=2, unk_id=0, pad_id=3, hard_vocab_limit=False,
    )  # fmt: skip
    model = prefix.with_suffix(".model")
    return model, sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size()


def _gpus() -> tuple[int, str]:
    """How many, and what they are called; asked in a process of its own."""
    program = (
        "import torch; n = torch.cuda.device_count(); print(n, n and torch.cuda.get_device_name())"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], text=True, capture_output=True, check=False
    ).stdout.split(maxsplit=1)
    return (int(found[0]), found[1].strip()) if len(found) == 2 else (0, "")


def _optimizers(device: str) -> list[str]:
    apex = device == "gpu" and find_spec("apex") is not None
    return ["mcore_distributed_optim", "distributed_fused_adam" if apex else "adam"]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: gpu where there is one")
    parser.add_argument("--ranks", type=int, choices=(1, 2, 4, 8), help="default: as many as GPUs")
    parser.add_argument("--layouts", nargs="+", metavar="NAME", help="only these, as in the table")
    parser.add_argument("--optimizers", nargs="+", metavar="NAME", help="NeMo's names")
    parser.add_argument("--output", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--directory", help="where to work, kept (default: a temporary one)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
