"""What one rank of a member holds in device memory: arithmetic over sizes and settings.

Standard library only: ``nemo-warp plan`` computes it on a login node, a member tells it at its
start, and ``gpu-check`` holds it against what the device counted. All numbers are bytes:

- held all the time: weights, gradients, the optimizer's masters and moments, anchor, SFT copy;
- in turn: generating (KV cache, logits of the prompts, or TensorRT-LLM's engine), scoring (the
  reference's weights, gathered; logits), training (activations, logits).

The longest sequences are assumed that the settings allow. Not counted, and allowed for with
`ALLOWANCE`: the CUDA context, NCCL's buffers, what the allocator cannot use again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_warp.core.transformer import Sizes

ALLOWANCE = 4_000_000_000
"""A guess: no GPU was at hand to measure it on."""

CHUNK_LOGITS = 2**27
"""Logits that are held at a time, while log-probabilities are computed in chunks.

Large enough for the products with the output layer to run at full speed (1024 positions of a
vocabulary of 128 k), and for the sum of the weight's gradient over chunks not to show.
"""
_CHUNK_BYTES = (
    6  # the product in bf16 and its logits in fp32; then these and their gradient in bf16
)

NO_ROOM = "DOES NOT FIT"
"""In a line of `Footprint.lines`, and nowhere else."""

_HALF, _FLOAT = 2, 4

OPTIMIZERS = {
    # apex keeps 2 bytes of remainders, which with the bf16 weight make the fp32 master (NeMo sets
    # store_param_remainders, megatron_base_model.py l.833), and two fp32 moments.
    "distributed_fused_adam": (4, 10),  # 16 bits per weight that bf16 lacks, two moments
    "mcore_distributed_optim": (4, 12),  # masters, two moments
}
"""Bytes per parameter under bf16 with O2: gradients (whole), optimizer (split over DP)."""
_WHOLE_O2 = (4, 12)
"""Of an optimizer that is not sharded (adam): nothing is split over DP."""
# Two fp32 moments of Adam, where the fp32 weights are themselves what the optimizer steps.
_MOMENTS = 8


@dataclass(frozen=True)
class Footprint:
    """Bytes on one rank.

    Attributes:
        held: name -> bytes that are there all the time.
        phases: name of a part of the step -> name -> bytes that are there in that part only.
    """

    held: dict[str, int]
    phases: dict[str, dict[str, int]]

    @property
    def always(self) -> int:
        """What is held all the time."""
        return sum(self.held.values())

    @property
    def peak(self) -> int:
        """The most at a time, with the allowance."""
        return self.always + max(sum(p.values()) for p in self.phases.values()) + ALLOWANCE

    def lines(self, device: float | None = None) -> list[str]:
        """For people, in GB (1e9 bytes); with ``device`` bytes, also whether it fits."""
        found = [_line("held", self.held)]
        found += [_line(name, parts) for name, parts in self.phases.items()]
        most = f"{'at most':<11}{_gb(self.peak)} GB, {_gb(ALLOWANCE)} of it for CUDA and NCCL"
        if device is None:
            return [*found, most]
        return [*found, f"{most}; the device has {_gb(device)}: {self._verdict(device)}"]

    def _verdict(self, device: float) -> str:
        if self.peak <= device:
            return "fits"
        if self.always + ALLOWANCE > device:
            return f"{NO_ROOM}: {_REMEDIES['held']}"
        phase = max(self.phases, key=lambda name: sum(self.phases[name].values()))
        return f"{NO_ROOM} ({phase}): {_REMEDIES[phase]}"


_REMEDIES = {
    "held": "raise model.tensor_model_parallel_size, model.pipeline_model_parallel_size or "
    "trainer.num_nodes",
    "generating": "raise model.tensor_model_parallel_size, or lower rollout.micro_batch_size or "
    "prompts.max_tokens",
    "scoring": "raise model.tensor_model_parallel_size, or lower "
    "rollout.forward_micro_batch_size",
    "training": "raise model.tensor_model_parallel_size, set model.sequence_parallel, or "
    "model.extra.activations_checkpoint_granularity=full with "
    "activations_checkpoint_method=uniform",
}  # fmt: skip


def member_footprint(sizes: Sizes, member: Mapping[str, Any]) -> Footprint:
    """Of the rank that holds most, at the first or the last pipeline stage.

    Args:
        member: every key of conf/member.yaml, plain.
    """
    # The first stage holds most activations (1F1B) and the embedding, the last one the logits; a
    # stage between holds no more than the first.
    stages = {0, member["model"]["pipeline_model_parallel_size"] - 1}
    found = [stage_footprint(sizes, member, stage) for stage in sorted(stages)]
    return max(found, key=lambda footprint: footprint.peak)


def stage_footprint(sizes: Sizes, member: Mapping[str, Any], stage: int) -> Footprint:
    """Of a rank of one pipeline stage."""
    rank = _Rank(sizes, member, stage)
    phases = {
        "generating": rank.generating(),
        "scoring": rank.scoring(),
        "training": rank.training(),
    }
    return Footprint(rank.held(), phases)


def logit_bytes(sequences: int, positions: int, columns: int) -> int:
    """The chunk of logits that is held at a time.

    Args:
        sequences, positions: of a micro batch; response positions only.
        columns: this rank's part of the vocabulary.
    """
    return min(CHUNK_LOGITS, sequences * positions * columns) * _CHUNK_BYTES


class _Rank:
    """One rank of a member."""

    def __init__(self, sizes: Sizes, member: Mapping[str, Any], stage: int) -> None:
        model, trainer = member["model"], member["trainer"]
        self.sizes, self.member, self.stage = sizes, member, stage
        self.tensor = model["tensor_model_parallel_size"]
        self.pipeline = model["pipeline_model_parallel_size"]
        self.data = trainer["num_nodes"] * trainer["devices"] // (self.tensor * self.pipeline)
        # Without O2 NeMo keeps fp32 parameters and autocasts, whatever trainer.precision says.
        self.half = model["megatron_amp_O2"] and str(trainer["precision"])[:2] in ("bf", "16")
        self.parameters = sizes.stage_parameters(self.tensor, self.pipeline, stage)
        self.dtype = _HALF if self.half else _FLOAT
        self.layers = sizes.layers // self.pipeline
        self.columns = sizes.padded_vocabulary(self.tensor) // self.tensor
        self.response = member["rollout"]["max_response_tokens"]
        self.prompt = self._longest_prompt()

    @property
    def _is_last(self) -> bool:
        return self.stage == self.pipeline - 1

    def _longest_prompt(self) -> int:
        engine, limit = self.member["rollout"]["trt_llm"], self.member["prompts"]["max_tokens"]
        room = max(1, self.sizes.context - self.response)
        # TensorRT-LLM's engine is built for a fixed input length, which no prompt may exceed;
        # without one, prompts may fill what the response leaves of the context.
        taken = (engine["max_input_len"] or room) if engine["enable"] else room
        return min(taken, limit or taken)

    def held(self) -> dict[str, int]:
        gradients, optimizer = self._optimizer()
        algorithm, slice_bytes = self.member["algorithm"], self._slice(_FLOAT)
        held = {
            "weights": self.parameters * self.dtype,
            "gradients": gradients,
            "optimizer": optimizer,
        }
        if not algorithm["offload_anchor"]:
            # Slices over the data-parallel group, see ShardedWeights: the anchor in fp32, the SFT
            # copy, which is never updated, in the parameters' dtype.
            held |= {"anchor": slice_bytes} if algorithm["anchor"] == "ema" else {}
            held |= {"SFT": self._slice(self.dtype)}
        engine = self.member["rollout"]["trt_llm"]
        if engine["enable"] and not engine["unload_engine_train"]:
            held["engine"] = self._engine_weights()
        return held

    def _optimizer(self) -> tuple[int, int]:
        """Bytes of gradients and of the optimizer's state."""
        name = self.member["optim"]["name"]
        split = name in OPTIMIZERS
        gradients, states = OPTIMIZERS.get(name, _WHOLE_O2)
        if not self.half:  # weights are their own masters
            gradients, states = _FLOAT, _MOMENTS
        held = self._slice(states) if split else self.parameters * states
        return self.parameters * gradients, held

    def _slice(self, bytes_each: int) -> int:
        """Of what is split over the data-parallel group."""
        return -(-self.parameters // self.data) * bytes_each

    def _engine_weights(self) -> int:
        # With trt_llm.reshard the engine runs without pipeline stages: each rank then holds its
        # tensor-parallel share of all layers.
        stages = self.pipeline if self.member["rollout"]["trt_llm"]["reshard"] else 1
        return self.parameters * _HALF * stages

    def generating(self) -> dict[str, int]:
        rollout, evaluation = self.member["rollout"], self.member["evaluation"]
        engine = rollout["trt_llm"]
        # Evaluations happen between steps of the same process, so the larger of the two counts.
        rows = max(rollout["micro_batch_size"], evaluation["micro_batch_size"])
        if engine["enable"]:
            parts = {"engine": self._engine_weights()} if engine["unload_engine_train"] else {}
            return parts | {"KV cache": self._key_values(engine["batch_size"] or rows)}
        parts = {
            "KV cache": self._key_values(rows),
            "activations": rows * self.prompt * self._working(),
        }
        if self._is_last:  # NeMo's first pass gives logits of every position, also in fp32
            each = self.dtype + (_FLOAT if self.half else 0)
            parts["logits of the prompts"] = rows * self.prompt * self.columns * each
        return parts

    def _key_values(self, rows: int) -> int:
        length = self.prompt + self.response
        engine = self.member["rollout"]["trt_llm"]
        stages = self.pipeline if engine["enable"] and engine["reshard"] else 1
        # Keys and values of one layer are split over TP; rows are full length because NeMo
        # allocates the cache for the longest sequence at once (InferenceParams).
        width = self.sizes.keys_values // self.tensor
        return rows * length * width * self.dtype * self.layers * stages

    def scoring(self) -> dict[str, int]:
        rollout = self.member["rollout"]
        rows = self._rows(rollout["forward_micro_batch_size"], rollout["forward_tokens"])
        parts = {
            # While the reference is in place both it and the policy exist: a full gathered set, and
            # this rank's slice cast to bf16 as the input of the all-gather
            # (ShardedWeights._gather).
            "reference": self.parameters * self.dtype + (self._slice(_HALF) if self.half else 0),
            "activations": rows * (self.prompt + self.response) * self._working(),
        }
        if self.member["algorithm"]["anchor"] == "none":
            parts.pop("reference")  # but for evaluations, see SFT
        # The exact KL needs the logits of policy and reference at the same time.
        return parts | self._logits(rows, sides=2 if self.member["evaluation"]["exact_kl"] else 1)

    def training(self) -> dict[str, int]:
        budget = self.member["rollout"]["train_tokens"]
        rows = self._rows(self.member["model"]["micro_batch_size"], budget)
        tokens = rows * (self.prompt + self.response)
        # The first stage has a micro batch under way for each stage behind it (1F1B).
        under_way = self.pipeline - self.stage
        each = self._saved()
        activations = tokens * each * self.layers * under_way
        if self._recomputes:
            # One layer at a time is computed again with all that its backward pass needs.
            activations += tokens * self._saved(recomputes=False)
        parts = {"activations": activations} | self._logits(rows)
        if self._is_last:  # summed in fp32 over the chunks, beside one chunk's share
            parts["output layer's gradient"] = (
                self.columns * self.sizes.hidden * (_FLOAT + self.dtype)
            )
        return parts

    def _rows(self, rows: int, tokens: int | None) -> int:
        """Of the longest sequences in a micro batch, with a budget of tokens for it or without."""
        return rows if tokens is None else max(1, tokens // (self.prompt + self.response))

    def _logits(self, rows: int, sides: int = 1) -> dict[str, int]:
        if not self._is_last:
            return {}
        return {"logits": sides * logit_bytes(rows, self.response, self.columns)}

    @property
    def _recomputes(self) -> bool:
        return self.member["model"]["extra"].get("activations_checkpoint_granularity") == "full"

    def _working(self) -> int:
        """Bytes per token of the layer that runs, where nothing is kept for a backward pass."""
        sizes, tensor = self.sizes, self.tensor
        wide = (sizes.up + sizes.ffn) // tensor
        # Without a fused kernel the probabilities of all heads are a tensor of length x length.
        scores = 0 if sizes.fused_attention else sizes.heads // tensor * sizes.context
        return self.dtype * (3 * sizes.hidden + max(wide, scores))

    def _saved(self, recomputes: bool | None = None) -> int:
        """Bytes per token and layer that are kept for the backward pass.

        After Korthikanti et al. (arXiv 2205.05198, section 4), without dropout: inputs of the two
        norms and of the matrices behind them (split over TP with sequence parallelism); queries,
        keys, values and their sums; what goes into and comes out of the activation function.
        """
        sizes, tensor = self.sizes, self.tensor
        shared = tensor if self.member["model"]["sequence_parallel"] else 1
        if self._recomputes if recomputes is None else recomputes:
            return self.dtype * sizes.hidden // shared
        split = 2 * sizes.attention + sizes.keys_values + sizes.up + sizes.ffn
        scores = 0
        if not sizes.fused_attention:  # fp32 softmax, and probabilities in the weights' dtype
            length = self.prompt + self.response
            scores = sizes.heads // tensor * length * (_FLOAT + self.dtype)
        return self.dtype * (4 * sizes.hidden // shared + split // tensor) + scores


def _line(name: str, parts: Mapping[str, int]) -> str:
    listed = ", ".join(f"{part} {_gb(number)}" for part, number in parts.items())
    return f"{name:<11}{listed} = {_gb(sum(parts.values()))} GB"


def _gb(number: float) -> str:
    """GB: one digit behind the point, more where there would be nothing else."""
    gigabytes = number / 1e9
    # Tiny models would otherwise be listed as 0.0 GB throughout.
    return f"{gigabytes:.1f}" if gigabytes >= 0.1 or not number else f"{gigabytes:.2g}"
