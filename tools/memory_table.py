"""The table of docs/training.md: what a rank of a member holds, by model and layout.

    python tools/memory_table.py

The numbers are those of `nemo-warp plan`; a test holds the page against this program.
"""

from __future__ import annotations

from nemo_warp.config import CONF_DIRECTORY, load_config, to_plain
from nemo_warp.core.footprint import ALLOWANCE, Footprint, member_footprint
from nemo_warp.core.transformer import KNOWN

_PLACES = {
    "init": "x", "rewards": [], "prompts": {"train": "x", "heldout": "x"}, "run": {"directory": "x"}
}  # fmt: skip
_FULL = (
    "{activations_checkpoint_granularity: full, activations_checkpoint_method: uniform, "
    "activations_checkpoint_num_layers: 1}"
)
ROWS = (
    ("gemma-7b", 1, 4, 1, False, ""),
    ("gemma-7b", 2, 4, 1, True, ""),
    ("llama3-8b", 1, 4, 1, False, ""),
    ("llama3-8b", 2, 4, 1, True, ""),
    ("llama3-70b", 4, 8, 2, True, "recomputation"),
    ("llama3-70b", 8, 8, 2, True, "recomputation"),
    ("llama3-70b", 8, 8, 4, True, ""),
)
"""Model, nodes of eight GPUs, TP, PP, TensorRT-LLM, what else differs from conf/member.yaml."""


def main() -> None:
    """Print the table."""
    phases = ("generating", "scoring", "training")
    head = ["model", "nodes", "TP x PP x DP", "held", *phases, "at most"]
    print(_row(head))
    print(_row(["---"] * len(head)))
    for model, nodes, tensor, pipeline, engine, other in ROWS:
        found = footprint(model, nodes, tensor, pipeline, engine, bool(other))
        data = nodes * 8 // (tensor * pipeline)
        name = ", ".join(
            [model, *(["TensorRT-LLM"] if engine else []), *([other] if other else [])]
        )
        each = [sum(found.phases[phase].values()) for phase in phases]
        numbers = [f"{number / 1e9:.1f}" for number in (found.always, *each, found.peak)]
        print(_row([name, str(nodes), f"{tensor} x {pipeline} x {data}", *numbers]))
    print(f"\nGB on the rank that holds most; `at most` is what is held, the largest of the three "
          f"and\n{ALLOWANCE / 1e9:.0f} GB for CUDA and NCCL.")  # fmt: skip


def footprint(
    model: str, nodes: int, tensor: int, pipeline: int, engine: bool, recompute: bool
) -> Footprint:
    """Of conf/member.yaml's defaults but for the arguments."""
    changes = {
        "trainer": {"num_nodes": nodes},
        "model": {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline},
        "rollout": {"trt_llm": {"enable": engine}},
    }
    also = [f"model.extra={_FULL}"] if recompute else []
    config = load_config(CONF_DIRECTORY / "member.yaml", _PLACES, changes, also)
    return member_footprint(KNOWN[model], to_plain(config))


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
