"""Which rows of which Hugging Face tensor make up each tensor of Megatron-core.

A Megatron tensor is runs of rows of Hugging Face tensors, one after another: nothing is transposed
or computed. linear_qkv holds, per query group, the group's query heads, its key and its value head
(megatron/core/transformer/attention.py); linear_fc1 the gate above the up projection.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """Rows [first, first + rows) of the tensor ``name``."""

    name: str
    first: int
    rows: int


@dataclass(frozen=True)
class Joined:
    """A tensor that is runs of rows of others, in this order."""

    name: str
    shape: Shape
    runs: tuple[Run, ...]


def megatron_tensors(config: dict[str, Any]) -> list[Joined]:
    """Every tensor of a model in Megatron's names, from Hugging Face's; layers in order.

    Args:
        config: from `configuration.nemo_keys`.
    """
    hidden, vocabulary = config["hidden_size"], config["override_vocab_size"]
    found = [
        _whole("embedding.word_embeddings.weight", "model.embed_tokens.weight", vocabulary, hidden)
    ]
    for layer in range(config["num_layers"]):
        found += _layer(config, f"decoder.layers.{layer}.", f"model.layers.{layer}.")
    found.append(_whole("decoder.final_layernorm.weight", "model.norm.weight", hidden))
    if not config["share_embeddings_and_output_weights"]:
        found.append(_whole("output_layer.weight", "lm_head.weight", vocabulary, hidden))
    return found


def taken_apart(tensors: list[Joined]) -> list[Joined]:
    """The same table the other way: every Hugging Face tensor from rows of Megatron's."""
    runs: dict[str, list[tuple[int, Run]]] = defaultdict(list)
    cols: dict[str, Shape] = {}
    for tensor in tensors:
        row = 0
        for run in tensor.runs:
            runs[run.name].append((run.first, Run(tensor.name, row, run.rows)))
            cols[run.name] = tensor.shape[1:]
            row += run.rows
    apart = []
    for name, found in runs.items():
        ordered = tuple(run for _, run in sorted(found, key=lambda pair: pair[0]))
        apart.append(Joined(name, (sum(run.rows for run in ordered), *cols[name]), ordered))
    return apart


def _layer(config: dict[str, Any], ours: str, theirs: str) -> Iterator[Joined]:
    hidden, ffn = config["hidden_size"], config["ffn_hidden_size"]
    width = config["num_attention_heads"] * config["kv_channels"]
    attention, mlp = f"{ours}self_attention.", f"{ours}mlp."
    double = config.get("name") == "megatron_gemma2"
    yield _whole(
        f"{attention}linear_qkv.layer_norm_weight", f"{theirs}input_layernorm.weight", hidden
    )
    yield _qkv(config, f"{attention}linear_qkv.", f"{theirs}self_attn.", "weight", (hidden,))
    if config["qkv_bias"]:
        yield _qkv(config, f"{attention}linear_qkv.", f"{theirs}self_attn.", "bias", ())
    yield _whole(
        f"{attention}linear_proj.weight", f"{theirs}self_attn.o_proj.weight", hidden, width
    )
    before = "pre_feedforward_layernorm" if double else "post_attention_layernorm"
    yield _whole(f"{mlp}linear_fc1.layer_norm_weight", f"{theirs}{before}.weight", hidden)
    halves = tuple(Run(f"{theirs}mlp.{half}_proj.weight", 0, ffn) for half in ("gate", "up"))
    yield Joined(f"{mlp}linear_fc1.weight", (2 * ffn, hidden), halves)
    yield _whole(f"{mlp}linear_fc2.weight", f"{theirs}mlp.down_proj.weight", hidden, ffn)
    if double:  # NeMo's TERowParallelLinearLayerNorm
        for norm, place in (
            ("attention", f"{attention}linear_proj"),
            ("feedforward", f"{mlp}linear_fc2"),
        ):
            theirs_norm = f"{theirs}post_{norm}_layernorm.weight"
            yield _whole(f"{place}.post_layernorm.weight", theirs_norm, hidden)


def _whole(name: str, other: str, *shape: int) -> Joined:
    return Joined(name, shape, (Run(other, 0, shape[0]),))


def _qkv(config: dict[str, Any], ours: str, theirs: str, kind: str, cols: Shape) -> Joined:
    groups, size = config["num_query_groups"], config["kv_channels"]
    queries = config["num_attention_heads"] // groups * size
    runs = []
    for group in range(groups):
        runs.append(Run(f"{theirs}q_proj.{kind}", group * queries, queries))
        runs += [Run(f"{theirs}{part}_proj.{kind}", group * size, size) for part in "kv"]
    return Joined(f"{ours}{kind}", (groups * (queries + 2 * size), *cols), tuple(runs))
