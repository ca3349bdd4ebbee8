"""Configuration files: what merges, what is refused, and in which words."""

from pathlib import Path

import pytest

from nemo_warp.config import (
    CONF_DIRECTORY,
    Overrides,
    check_keys,
    identity_hash,
    load_config,
    require_complete,
    to_plain,
)
from nemo_warp.records import config_hash

DEFAULTS = """
run: {name: "???", seed: 1234, directory: "runs/${run.name}"}
optim: {lr: 1e-6, warmup_steps: 100, nesterov: false}
rewards: [{name: helpful, weight: 1.0}]
note: null
model: {extra: {}}
"""


@pytest.fixture
def defaults(tmp_path: Path) -> Path:
    path = tmp_path / "defaults.yaml"
    path.write_text(DEFAULTS)
    return path


def test_later_overrides_win_and_interpolations_follow(defaults: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: {name: a}\noptim: {lr: 2e-5}\n")
    config = load_config(defaults, recipe, {"optim": {"lr": 3}}, ["run.name=b", "note=[1, 2]"])
    plain = to_plain(config)
    assert plain["run"] == {"name": "b", "seed": 1234, "directory": "runs/b"}
    assert plain["optim"] == {"lr": 3, "warmup_steps": 100, "nesterov": False}
    assert plain["note"] == [1, 2]


def test_arguments_reach_into_lists_and_open_sections(defaults: Path) -> None:
    config = load_config(
        defaults, ["rewards.0.weight=0.5", "model.extra.a.b=7", "rewards[0].name=x"]
    )
    plain = to_plain(config, resolve=False)
    assert plain["rewards"] == [{"name": "x", "weight": 0.5}]
    assert plain["model"] == {"extra": {"a": {"b": 7}}}


def test_an_open_section_stays_open_after_the_first_override(defaults: Path) -> None:
    config = load_config(defaults, {"model": {"extra": {"a": 1}}}, {"model": {"extra": {"b": 2}}})
    assert to_plain(config, resolve=False)["model"]["extra"] == {"a": 1, "b": 2}


def test_lists_are_replaced_whole(defaults: Path) -> None:
    config = load_config(defaults, {"rewards": [{"name": "short"}]})
    assert to_plain(config, resolve=False)["rewards"] == [{"name": "short"}]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["optim.lrr=1"], r"unknown key 'optim.lrr' in the command line; did you mean 'optim.lr'"),
        ({"optim": {"warmup": 1}}, r"did you mean 'optim.warmup_steps'"),
        (Overrides({"zzz": 1}, "section member of r.yaml"), r"in section member of r.yaml; known"),
        ({"optim": 3}, r"'optim' in the given values is 3, but it is a section"),
        ({"optim": {"lr": "fast"}}, r"'optim.lr' in the given values is 'fast', expected a number"),
        ({"run": {"seed": 1.5}}, r"'run.seed' .* expected a whole number"),
        ({"run": {"seed": True}}, r"'run.seed' .* expected a whole number"),
        ({"optim": {"nesterov": 1}}, r"expected true or false"),
        ({"rewards": "x"}, r"expected a list"),
        (["optim.lr"], r"'optim.lr' is not an override; write key=value"),
        (["=3"], r"is not an override"),
        (["rewards.4.weight=1"], r"cannot apply 'rewards.4.weight=1'"),
        (["rewards.0.weight=[1"], r"cannot read the value"),
    ],
)
def test_mistakes_are_named(defaults: Path, override, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(defaults, override)


def test_files_that_cannot_be_read(defaults: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no configuration file .*absent.yaml"):
        load_config(defaults, tmp_path / "absent.yaml")
    for text in ("a: [", "- 1\n", "\x00"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.yaml"):
            load_config(defaults, tmp_path / "bad.yaml")


def test_missing_mandatory_values_are_listed(defaults: Path) -> None:
    with pytest.raises(ValueError, match=r"no value given for run.name"):
        require_complete(load_config(defaults))
    require_complete(load_config(defaults, ["run.name=x"]))


def test_dangling_interpolation_is_a_value_error(defaults: Path) -> None:
    config = load_config(defaults, ["run.name=${nowhere}"])
    with pytest.raises(ValueError, match="cannot resolve"):
        to_plain(config)


def test_check_keys_suggests() -> None:
    check_keys(["a"], ["a", "b"], "x")
    with pytest.raises(ValueError, match=r"unknown key 'wieght' in rewards; did you mean 'weight'"):
        check_keys(["wieght"], ["name", "weight"], "rewards")


def test_identity_leaves_out_places_and_limits_only() -> None:
    config = {
        "run": {"seed": 1, "directory": "/a", "time_limit": 60, "total_steps": 9},
        "init": "/a/init.nemo",
        "prompts": {"train": "/a/p.jsonl", "max_tokens": 8},
        "rewards": [{"name": "x", "weight": 2.0, "endpoint": "/a/e.json"}],
        "reward_client": {"retries": 4},
    }
    decides = {
        "run": {"seed": 1, "total_steps": 9},
        "prompts": {"max_tokens": 8},
        "rewards": [{"name": "x", "weight": 2.0}],
    }
    assert identity_hash(config) == config_hash(decides)
    config["rewards"][0]["weight"] = 1.0
    assert identity_hash(config) != config_hash(decides)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 4),
        ({"trainer": {"devices": 1}}, 1),
        ({"trainer": {"devices": 6}}, 2),
        ({"trainer": {"num_nodes": 2}, "model": {"pipeline_model_parallel_size": 8}}, 2),
        ({"trainer": {"devices": 1}, "model": {"tensor_model_parallel_size": 4}}, 4),
    ],
)
def test_the_default_layout_fits_the_ranks(changes: dict, expected: int) -> None:
    """A member started by hand, as in a recipe: who asks for one device asks for no shards."""
    model = to_plain(load_config(CONF_DIRECTORY / "member.yaml", changes)["model"])
    assert model["tensor_model_parallel_size"] == expected
