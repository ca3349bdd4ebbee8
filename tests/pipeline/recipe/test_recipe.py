"""What a recipe may say, and how it is told when it is wrong: before anything is started."""

from __future__ import annotations

import pytest
import yaml
from sandbox import ROOT, Sandbox

from nemo_warp import exit_codes
from nemo_warp.config import identity_hash
from nemo_warp.pipeline.disk.opening import open_run
from nemo_warp.pipeline.recipe.load import load_recipe

REWARD = {"weight": 1.0, "callable": "nemo_warp.rewards.library:vader_compound"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"membres": 2}, r"unknown key 'membres' in .*recipe.yaml; did you mean 'members'"),
        ({"merge": {"etta": 1}}, r"did you mean 'merge.eta'"),
        ({"member": {"optim": {"lrr": 1}}}, r"'member.optim.lrr' .*'member.optim.lr'"),
        ({"per_member": [{"member": {"optin": {}}}, {}]}, r"did you mean .*0.member.optim'"),
        ({"per_member": [{"reward": {}}, {}]}, r"did you mean 'per_member.0.rewards'"),
        ({"evaluation": {"settings": {"towards": 1}}}, r"'evaluation.settings.towards_sft'"),
        ({"members": 0}, r"'members' in .*yaml is 0, expected a whole number \(1 to 999\)"),
        ({"members": "two"}, r"'members' in .* is 'two', expected a whole number"),
        ({"iterations": 0}, r"'iterations' in .*yaml is 0"),
        ({"seeds": [1]}, r"1 seeds for 2 members"),
        ({"seeds": [7, 7]}, r"seeds holds \[7\] more than once"),
        ({"seed": -1}, r"'seed' in .*yaml is -1"),
        ({"per_iteration": [{}]}, r"per_iteration has 1 entries, expected 2"),
        ({"per_member": [{}, {}, {}]}, r"per_member has 3 entries, expected 2"),
        ({"per_iteration": [{"eta": 3}, {}]}, r"'per_iteration.0.eta' .* is 3, .*at most 2"),
        ({"evaluation": {"etas": []}}, r"'evaluation.etas' in .* is empty"),
        ({"evaluation": {"etas": [0.1, 0.1]}}, r"evaluation.etas repeats"),
        ({"front": {"kappas": [-1]}}, r"'front.kappas.0' in .* is -1, expected .*0 to 2"),
        ({"merge": {"towards": "last"}}, r"'merge.towards' in .* is 'last', expected init or sft"),
        ({"merge": {"average_steps": [3]}}, r"ends with the checkpoints of steps \[2, 4\]"),
        ({"sft": "/nowhere/sft.nemo"}, r"sft: no such file: /nowhere/sft.nemo"),
        ({"prompts": {"train": "/nowhere", "heldout": "/nowhere"}}, r"prompts.train: no such file"),
        ({"judges": {"a": {}}}, r"judges.a needs exactly one of callable, model"),
        ({"judges": {"a": REWARD}}, r"unknown key 'judges.a.weight'"),
        ({"judges": {"given": {"endpoint": "e.json"}}}, r"judges.given is rewards.given, which has "
         "a weight: a judge is never trained on"),
        ({"rewards": {"a": REWARD}, "judges": {"b": {"callable": REWARD["callable"]}}},
         r"judges.b is rewards.a, which has a weight"),
        ({"rewards": {"a": REWARD, "b": {"weight": 0, "endpoint": "b.json"}},
          "per_member": [{}, {"rewards": {"b": {"weight": 1}}}],
          "judges": {"b": {"endpoint": "b.json"}}}, r"judges.b is rewards.b"),
        ({"member": {"judges": [{"name": "a", "endpoint": "b"}]}}, r"use the recipe's judges"),
        ({"rewards": {}}, r"rewards is empty"),
        ({"rewards": {"a": {"weight": 1}}}, r"rewards.a needs exactly one of callable, model"),
        ({"rewards": {"a": {**REWARD, "weight": "x"}}}, r"'rewards.a.weight' in .* is 'x'"),
        ({"rewards": {"a": {**REWARD, "callable": "x"}}}, r"expected text such as"),
        ({"rewards": {"a": {**REWARD, "wieght": 1}}}, r"did you mean 'rewards.a.weight'"),
        ({"rewards": {"a b": REWARD}}, r"rewards.a b: use letters"),
        ({"rewards": {"a": {**REWARD, "clip": [1, 0]}}}, r"rewards.a.clip is \[1, 0\]"),
        ({"rewards": {"a": {**REWARD, "standardize": "z"}}}, r"none, mean or deviation"),
        ({"rewards": {"a": {**REWARD, "concurrency": 0}}}, r"'rewards.a.concurrency' .* is 0"),
        ({"rewards": {"a": {"weight": 1, "endpoint": "e", "concurrency": 8}}},
         r"rewards.a.concurrency is of a callable"),
        ({"rewards": {"a": REWARD}, "per_member": [{"rewards": {"a": {"weight": 0}}}, {}]},
         r"per_member\[1\]: every reward has weight 0"),
        ({"name": "a b"}, r"'name' in .* is 'a b', expected text of letters"),
        ({"launcher": {"kind": "pbs"}}, r"'launcher.kind' in .* is 'pbs', expected local or slurm"),
        ({"launcher": {"kind": "slurm"}}, r"no cluster is given"),
        ({"launcher": {"side_by_side": 0}}, r"'launcher.side_by_side' in .* is 0"),
        ({"member": {"run": {"total_steps": 0}}}, r"'member.run.total_steps' in .* is 0"),
        ({"member": {"optim": {"lr": 5.0}}}, r"'member.optim.lr' in .* is 5.0"),
        ({"member": {"algorithm": {"ema_update_rate": 2.0}}}, r"ema_update_rate' in .* is 2.0"),
        ({"member": {"trainer": {"num_nodes": 2}}}, r"launcher.kind local is one machine"),
        ({"member": {"model": {"tensor_model_parallel_size": 3}}}, r"TP x PP = 3 does not divide"),
        ({"resources": {"member": {"time": "soon"}}}, r"'resources.member.time' in .* is 'soon'"),
        ({"base": "recipe.yaml"}, r"is its own base"),
    ],
)  # fmt: skip
def test_mistakes_are_named_and_nothing_is_made(
    sandbox: Sandbox, changes: dict, message: str
) -> None:
    sandbox.save(**changes)
    with pytest.raises(ValueError, match=message):
        load_recipe(sandbox.recipe)
    assert not sandbox.run_directory.exists()


@pytest.mark.parametrize("key", ["account", "partition"])
def test_a_cluster_file_needs_account_and_partition(sandbox: Sandbox, key: str) -> None:
    file = sandbox.directory / "cluster.yaml"
    values = {"account": "a", "partition": "p"}
    del values[key]
    file.write_text(yaml.safe_dump(values))
    sandbox.save(launcher={"kind": "slurm"}, cluster=str(file))
    with pytest.raises(ValueError, match=rf"cluster.yaml: no value given for .*{key}"):
        load_recipe(sandbox.recipe)


@pytest.mark.parametrize(
    ("time", "margin", "refused"),
    [("15", 840, True), ("15", 839, False), ("00:15:00", 840, True), ("15:00", 840, True),
     ("15:01", 840, False), ("1-01:00", 89940, True), ("1-01:00", 89939, False),
     ("1-01:00:01", 89940, False), ("0", 900, False), ("24:00:00", -1, True)],
)  # fmt: skip
def test_members_have_time_before_slurm_tells_them_to_stop(
    sandbox: Sandbox, time: str, margin: int, refused: bool
) -> None:
    """The signal may come a minute early."""
    sandbox.save(
        launcher={"kind": "slurm"},
        cluster="cpu",
        cluster_overrides={"signal_margin_s": margin},
        resources={"member": {"time": time}},
    )
    if not refused:
        assert load_recipe(sandbox.recipe).cluster["signal_margin_s"] == margin
        return
    with pytest.raises(ValueError, match=rf"signal_margin_s.* is {margin}"):
        load_recipe(sandbox.recipe)


def test_seeds_differ_between_members_and_iterations(sandbox: Sandbox) -> None:
    sandbox.save(iterations=5, members=64)
    recipe = load_recipe(sandbox.recipe)
    seeds = [recipe.seed(i, m) for i in range(1, 6) for m in range(1, 65)]
    assert len(set(seeds)) == 320
    assert recipe.seed(1, 1) == 720644447, "sha256('1234/1/1')[:8] mod 2**31: fixed for ever"
    sandbox.save(seeds=list(range(64)))
    given = load_recipe(sandbox.recipe)
    assert len({given.seed(i, m) for i in range(1, 6) for m in range(1, 65)}) == 320


def test_members_and_iterations_differ_as_asked(sandbox: Sandbox) -> None:
    sandbox.save(
        rewards={"a": REWARD, "b": {**REWARD, "weight": 2.0}},
        per_iteration=[{"member": {"run": {"total_steps": 9}}, "eta": 0.5}, {}],
        per_member=[
            {"member": {"length_penalty": 0.0005}, "rewards": {"b": {"weight": 0}}},
            {"member": {"optim": {"lr": 2e-6}}, "rewards": {"a": {"weight": 3}}},
        ],
    )
    recipe = load_recipe(sandbox.recipe)
    first, second = recipe.member_config(1, 1), recipe.member_config(2, 2)
    assert (first["run"]["total_steps"], second["run"]["total_steps"]) == (9, 4)
    assert (first["length_penalty"], second["length_penalty"]) == (0.0005, 0.0)
    assert (first["optim"]["lr"], second["optim"]["lr"]) == (1e-6, 2e-6)
    assert [(r["name"], r["weight"]) for r in first["rewards"]] == [("a", 1.0)]
    assert [(r["name"], r["weight"]) for r in second["rewards"]] == [("a", 3.0), ("b", 2.0)]
    assert [r["weight"] for r in recipe.evaluation_config()["rewards"]] == [1.0, 2.0]
    assert (recipe.eta(1), recipe.eta(2)) == (0.5, 0.3)


def test_a_recipe_may_build_on_another(sandbox: Sandbox) -> None:
    other = sandbox.directory / "other.yaml"
    other.write_text("base: recipe.yaml\nname: other\nmember: {optim: {lr: 3.0e-6}}\n")
    recipe = load_recipe(other, ["members=3"])
    assert (recipe.name, recipe.values["members"], recipe.total_steps(1)) == ("other", 3, 4)
    assert recipe.member_config(1, 3)["optim"]["lr"] == 3e-6


def test_a_run_directory_belongs_to_one_name(sandbox: Sandbox) -> None:
    open_run(load_recipe(sandbox.recipe))
    sandbox.save(name="other")
    with pytest.raises(ValueError, match=r"was started with another recipe: name differs"):
        open_run(load_recipe(sandbox.recipe))


def test_the_stored_recipe_is_complete_and_may_be_moved(sandbox: Sandbox) -> None:
    recipe = load_recipe(sandbox.recipe)
    open_run(recipe)
    moved = sandbox.directory / "moved"
    sandbox.run_directory.rename(moved)
    stored = load_recipe(moved)
    assert stored.paths.root == moved
    for member in (1, 2):
        ours, theirs = recipe.member_config(1, member), stored.member_config(1, member)
        assert identity_hash(ours) == identity_hash(theirs)


def test_bad_recipes_end_with_a_sentence_and_code_2(sandbox: Sandbox) -> None:
    code, output = sandbox.call("run", "members=0")
    assert code == exit_codes.MISCONFIGURED
    assert output.startswith("error: ")
    assert "Traceback" not in output
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [({}, 4), ({"devices": 1}, 1), ({"devices": 6}, 2), ({"devices": 2}, 2)],
)
def test_the_default_layout_fits_the_ranks(sandbox: Sandbox, trainer, expected: int) -> None:
    """TP 4 is for a node of eight; who asks for one device asks for no shards."""
    sandbox.save(member={"run": {"total_steps": 2}, "trainer": {"accelerator": "cpu", **trainer}})
    member = load_recipe(sandbox.recipe).member_config(1, 1)
    assert member["model"]["tensor_model_parallel_size"] == expected
    given = load_recipe(sandbox.recipe, ["member.model.tensor_model_parallel_size=1"])
    assert given.member_config(1, 1)["model"]["tensor_model_parallel_size"] == 1


def test_every_recipe_in_the_repository_is_valid() -> None:
    others = ("pretrain.yaml", "study")  # of the tiny SFT model; of `nemo-warp study`
    files = [f for f in ROOT.glob("recipes/*/*.yaml") if not {*others} & {f.name, f.parent.name}]
    names = []
    for file in files:
        recipe = load_recipe(file, files_here=False)
        names.append(recipe.name)
        for stage in recipe.stages:
            if stage.member:
                recipe.member_config(stage.iteration, stage.member)
    assert {"tiny", "gemma-7b", "llama3-8b", "length-penalty", "lerp", "no-kl"} <= set(names)
    assert len(names) == len(set(names))


def test_a_rewards_scale_reaches_members_where_it_is_not_the_usual(sandbox: Sandbox) -> None:
    sandbox.save(rewards={"a": REWARD, "b": {**REWARD, "scale": 0.5, "clip": [-1, 1]}})
    recipe = load_recipe(sandbox.recipe)
    plain, changed = recipe.member_config(1, 1)["rewards"]
    assert not set(plain) & {"shift", "scale", "clip", "standardize"}, "finished members stay"
    assert {k: changed[k] for k in ("scale", "clip")} == {"scale": 0.5, "clip": [-1, 1]}
    assert recipe.evaluation_config()["rewards"][1] == changed


def test_a_callables_concurrency_reaches_its_server() -> None:
    from nemo_warp.pipeline.launch.programs import _server_words

    words = ["-m", "nemo_warp.rewards.serve", "--callable", REWARD["callable"]]
    assert _server_words({**REWARD, "concurrency": 1}) == words
    assert _server_words({**REWARD, "concurrency": 8}) == [*words, "--concurrency", "8"]
