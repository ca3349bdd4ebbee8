"""What a rank will hold: hand-computed figures, the recipes, and the documentation's table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sandbox import ROOT

from nemo_warp.config import CONF_DIRECTORY, load_config, to_plain
from nemo_warp.core.footprint import ALLOWANCE, Footprint, member_footprint
from nemo_warp.core.transformer import KNOWN, Sizes
from nemo_warp.pipeline.commands.estimate import device_bytes, memory
from nemo_warp.pipeline.commands.plan import describe
from nemo_warp.pipeline.recipe.load import load_recipe

PLACES = {"init": "x", "rewards": [], "prompts": {"train": "a", "heldout": "b"}}
SMALL = Sizes(4, 64, 256, 4, 2, 16, 1000, 128, gated=True, divisible_by=64)


def footprint(sizes: Sizes, **changes: Any) -> Footprint:
    """Of conf/member.yaml under ``a__b=c`` for ``a.b=c``."""
    arguments = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    config = load_config(
        CONF_DIRECTORY / "member.yaml", {**PLACES, "run": {"directory": "d"}}, arguments
    )
    return member_footprint(sizes, to_plain(config))


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gemma-2b", 2_506_172_416),
        ("gemma-7b", 8_537_680_896),
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama2-70b", 68_976_648_192),
        ("llama3-8b", 8_030_261_248),
        ("llama3.2-1b", 1_235_814_400),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-7b", 7_615_616_512),
        ("llama3-70b", 70_553_706_496),
        ("mistral-7b", 7_241_732_096),
    ],
)
def test_known_models_have_their_published_number_of_parameters(name: str, published: int) -> None:
    assert KNOWN[name].parameters == published


def test_a_small_model_by_hand() -> None:
    """4 layers, hidden 64, 4 heads of 16 over 2 groups, ffn 256 gated, 1000 entries; TP 2, DP 4.

    A layer: qkv 64 x (64 + 2 x 32), out 64 x 64, feed-forward 64 x 512 and 256 x 64, two norms of
    64. TP halves the matrices. 1000 entries padded to a multiple of 2 x 64 are 1024, 512 a rank.
    """
    layer = (64 * 128 + 64 * 64 + 64 * 512 + 256 * 64) // 2 + 2 * 64
    parameters = 4 * layer + 2 * 512 * 64 + 64
    found = footprint(
        SMALL, model__tensor_model_parallel_size=2, rollout__max_response_tokens=28,
        rollout__micro_batch_size=8, model__micro_batch_size=2,
    )  # fmt: skip
    assert SMALL.stage_parameters(tensor=2) == parameters
    assert found.held == {
        "weights": 2 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 12 * parameters // 4,
        "anchor": 4 * parameters // 4,
        "SFT": 2 * parameters // 4,
    }
    generating, scoring, training = (found.phases[n] for n in ("generating", "scoring", "training"))
    # 8 sequences of 128, keys and values of one group of 16 channels, bf16, 4 layers
    assert generating["KV cache"] == 8 * 128 * (2 * 1 * 16) * 2 * 4
    # NeMo's first pass: prompts of 100 tokens, bf16 and fp32
    assert generating["logits of the prompts"] == 8 * 100 * 512 * (2 + 4)
    # the anchor as a whole in bf16, and this rank's quarter on the way there
    assert scoring["reference"] == 2 * parameters + 2 * parameters // 4
    assert scoring["logits"] == 512 * 8 * 28 * 6, "less than a chunk"
    assert training["logits"] == 512 * 2 * 28 * 6
    assert training["output layer's gradient"] == 512 * 64 * (4 + 2)
    # per token and layer: norms' and matrices' inputs (4 x 64), queries and sums (2 x 64), keys and
    # values (64), up (512), down (256); all of them halved, with sequence parallelism
    assert training["activations"] == 2 * 128 * 4 * 2 * (4 * 64 + 2 * 64 + 64 + 512 + 256) // 2
    assert found.peak == sum(found.held.values()) + sum(generating.values()) + ALLOWANCE


def test_layouts_and_optimizers() -> None:
    whole = footprint(SMALL, model__tensor_model_parallel_size=1, optim__name="adam")
    assert whole.held["optimizer"] == 12 * SMALL.stage_parameters(), "nothing is split over DP"
    apex = footprint(SMALL, optim__name="distributed_fused_adam")
    ours = footprint(SMALL)
    assert ours.held["optimizer"] == pytest.approx(1.2 * apex.held["optimizer"], abs=24)
    plain = footprint(SMALL, trainer__precision='"32"', model__megatron_amp_O2="false")
    assert plain.held["weights"] == 2 * ours.held["weights"]
    none = footprint(SMALL, algorithm__anchor="none", algorithm__kl_coefficient=0)
    assert "anchor" not in none.held and "SFT" in none.held
    offloaded = footprint(SMALL, algorithm__offload_anchor="true")
    assert {"anchor", "SFT"}.isdisjoint(offloaded.held)
    full = footprint(SMALL, model__extra="{activations_checkpoint_granularity: full}")
    assert full.phases["training"]["activations"] < ours.phases["training"]["activations"]
    stages = footprint(SMALL, model__pipeline_model_parallel_size=2)
    assert stages.always < ours.always + 1000, "half the layers, twice the optimizer's share"
    engine = footprint(
        SMALL, rollout__trt_llm="{enable: true, max_input_len: 50}",
        model__tensor_model_parallel_size=2,
    )  # fmt: skip
    assert engine.held["engine"] == engine.held["weights"]
    assert engine.phases["generating"] == {"KV cache": 8 * (50 + 512) * 32 * 2 * 4}


def test_a_chunk_bounds_the_logits() -> None:
    """Llama 3's vocabulary at TP 1, 16 responses of 1024: 0.8 GB in place of 8.4 in fp32."""
    found = footprint(
        KNOWN["llama3-8b"], model__tensor_model_parallel_size=1, rollout__micro_batch_size=16,
        rollout__max_response_tokens=1024,
    )  # fmt: skip
    assert found.phases["scoring"]["logits"] == 2**27 * 6


def test_a_budget_of_tokens_takes_the_place_of_rows() -> None:
    """Sequences are of 128 tokens at most: 300 hold two of them, 100 one."""
    changes = {"rollout__max_response_tokens": 28}
    for budget, rows in ((300, 2), (100, 1)):
        both = {"rollout__forward_tokens": budget, "rollout__train_tokens": budget}
        given = footprint(SMALL, **changes, **both).phases
        plain = footprint(
            SMALL, **changes, rollout__forward_micro_batch_size=rows, model__micro_batch_size=rows
        ).phases
        assert (given["scoring"], given["training"]) == (plain["scoring"], plain["training"])


def test_the_defaults_fit_an_8b_model_on_one_node() -> None:
    for model in ("llama3-8b", "gemma-7b", "mistral-7b"):
        sizes = KNOWN[model]
        limits = {} if sizes.context <= 8192 else {"prompts__max_tokens": 7680}
        found = footprint(sizes, **limits)
        assert found.peak <= 80e9, f"{model}: {found.lines(80e9)}"
    assert footprint(KNOWN["llama3-70b"]).peak > 80e9, "a bound that everything keeps says nothing"


@pytest.mark.parametrize("recipe", ["gemma_7b", "llama3_8b", "length_penalty"])
def test_the_h100_recipes_fit(recipe: str) -> None:
    loaded = load_recipe(ROOT / "recipes" / recipe, files_here=False)
    found, device = memory(loaded), device_bytes(loaded)
    assert found is not None and device == 80e9
    assert found.peak <= device
    assert found.lines(device)[-1].endswith("the device has 80.0: fits")


def test_plan_says_what_does_not_fit_and_what_to_change() -> None:
    changes = ["member.model.tensor_model_parallel_size=1", "member.model.sequence_parallel=false"]
    recipe = load_recipe(ROOT / "recipes" / "llama3_8b", changes, files_here=False)
    said = [line for line in describe(recipe) if "DOES NOT FIT" in line]
    assert len(said) == 1 and "raise model.tensor_model_parallel_size" in said[0]
    unknown = load_recipe(ROOT / "recipes" / "llama3_8b", ["estimate.model=null"], files_here=False)
    assert "memory of a member's rank: give estimate.model" in list(describe(unknown))


def test_the_documentation_has_the_present_table() -> None:
    program = ROOT / "tools" / "memory_table.py"
    printed = subprocess.run(
        [sys.executable, program], text=True, capture_output=True, check=True, cwd=ROOT
    ).stdout
    assert printed.count("\n") >= 6
    assert printed in Path(ROOT, "docs", "training.md").read_text()
