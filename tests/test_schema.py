"""The schema: it and conf/ agree, and no mistake in a recipe passes or ends in a traceback."""

import dataclasses
import shutil

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemo_warp import yaml_text
from nemo_warp.cli import main
from nemo_warp.config import CONF_DIRECTORY, SCHEMAS, load_config, to_plain
from nemo_warp.keys import rows_of
from nemo_warp.pipeline.recipe.load import load_recipe
from nemo_warp.schema.check import check, type_at
from nemo_warp.schema.recipe import Recipe

FILES = {
    "member": "member",
    "recipe": "recipe",
    "evaluation": "evaluation",
    "cluster": "cluster/defaults",
    "reward_model": "reward_model",
}
SHARED = ("rollout", "algorithm", "reward_client", "evaluation", "trainer", "model")


def _plain(instance):
    return {
        f.name: _plain(v) if dataclasses.is_dataclass(v := getattr(instance, f.name)) else v
        for f in dataclasses.fields(instance)
    }


@pytest.mark.parametrize("name", FILES)
def test_conf_has_every_key_with_the_schemas_default(name):
    """conf/evaluation.yaml leaves the sections that it shares with a member empty."""
    written = yaml_text.load_file(CONF_DIRECTORY / f"{FILES[name]}.yaml")
    expected = _plain(SCHEMAS[name]())
    if name == "evaluation":
        expected |= {section: {} for section in SHARED}
    assert list(written) == list(expected), "the same keys in the same order"
    assert written == expected
    check(written, SCHEMAS[name], name)


def test_every_key_is_explained(capsys):
    for name, schema in SCHEMAS.items():
        for path, takes, default, meaning in rows_of(schema):
            assert takes and default and meaning, f"{name}: {path}"
    assert main(["keys", "member", "optim"]) == 0
    shown = capsys.readouterr().out
    assert "optim.lr = 1e-06" in shown and "a number (above 0 and at most 1)" in shown
    assert "rollout" not in shown
    assert main(["keys", "member", "optin"]) == 2
    assert "did you mean 'optim'" in capsys.readouterr().err


def test_the_schema_is_a_structured_configuration():
    """OmegaConf, which NeMo's users know, takes the classes as they are."""
    made = OmegaConf.structured(SCHEMAS["member"])
    assert made.optim.lr == 1e-6 and OmegaConf.is_missing(made.run, "directory")


TEXTS = ["695e0514", "1e5", "on", "No", "010", "0x1F", "null", "~", "12:30:45", "24:00:00", "y"]
TEXTS += ["2026-11-25", "1_000", "true", ".5", "nan", ".inf", "=", "<<", "?", "n", "|", ">", "%"]
TEXTS += ["@", "`", "0b1", "1.", "+1", "-", "--method", "[1]", "{a:1}", "'", '"', "#", "!x", "&a"]
TEXTS += ["", " ", "exp #2", "a: b", "- x", "a\nb", "a\u2028b", "caf\u00e9", "\x85", "a:", "#x"]


def test_texts_survive_every_reader(tmp_path):
    """What is written is read back as the same text by this project, PyYAML and OmegaConf."""
    values = {"list": TEXTS, "table": {text or "empty": text for text in TEXTS}}
    written = yaml_text.dump(values)
    assert yaml_text.load(written) == values
    assert yaml.safe_load(written) == values
    (tmp_path / "x.yaml").write_text(written)
    assert OmegaConf.to_container(OmegaConf.load(tmp_path / "x.yaml")) == values


_SCALARS = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.text()
_SCALARS |= st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.recursive(
        _SCALARS,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
@settings(max_examples=150, deadline=None)
def test_any_value_survives(value):
    assert yaml_text.load(yaml_text.dump({"v": value})) == {"v": value}


@pytest.mark.parametrize(
    "text",
    ["a: 1\na: 2\n", "[1, 2]: 3\n", "a: !!python/name:os.system\n", f"a: {'9' * 5000}\n", "a: ["],
)
def test_what_is_refused_as_yaml(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"x.yaml as YAML") as caught:
        load_config(CONF_DIRECTORY / "recipe.yaml", tmp_path / "x.yaml")
    assert "\n" not in str(caught.value)


def test_words_of_yaml_1_1():
    """yes and off mean true and false where that is wanted, and are refused where it is unclear."""
    load, member, cluster = yaml_text.load, SCHEMAS["member"], SCHEMAS["cluster"]
    found = check(load("rollout: {trt_llm: {enable: yes}}"), member, "x")
    assert found == {"rollout": {"trt_llm": {"enable": True}}}
    found = check(load("environment: {A: on, B: 010, C: 12:30:45}"), cluster, "x")
    assert found["environment"] == {"A": "on", "B": "010", "C": "12:30:45"}
    for value, message in (("1", "put it in quotes"), ("null", "expected text"), ("true", "quote")):
        with pytest.raises(ValueError, match=message):
            check(load(f"environment: {{A: {value}}}"), cluster, "x")
    with pytest.raises(ValueError, match=r"'optim.extra.fused' in x is no, .*write true or false"):
        check(load("optim: {extra: {fused: no}}"), member, "x")


def test_arguments_are_taken_as_texts_where_the_key_is_one():
    def given(argument, key):
        config = to_plain(load_config(CONF_DIRECTORY / "recipe.yaml", [argument]), resolve=False)
        return config[key]

    assert given("run_directory=runs/exp #2", "run_directory") == "runs/exp #2"
    assert given("run_directory=a: b", "run_directory") == "a: b"
    assert given('name="7e1"', "name") == "7e1"
    with pytest.raises(ValueError, match=r"'name' in the command line is 70.0, .*in quotes"):
        given("name=7e1", "name")
    assert given("cluster=null", "cluster") is None
    assert given("resources.member.time=24:00:00", "resources")["member"]["time"] == "24:00:00"
    with pytest.raises(ValueError, match="where a comment begins; put it in quotes"):
        given("seed=3 #4", "seed")


RECIPE = {
    "name": "x",
    "iterations": 1,
    "members": 2,
    "rewards": {"given": {"weight": 1.0, "callable": "a.b:c"}},
    "per_member": [{}, {}],
    "per_iteration": [{}],
    "member": {
        "evaluation": {"num_prompts": 1, "micro_batch_size": 1},
        "trainer": {"devices": 1},
        "model": {"tensor_model_parallel_size": 1},
        "rollout": {"micro_batch_size": 1},
    },
    "evaluation": {"settings": {"evaluation": {"num_prompts": 1}}},
}
REPLACED = ("init", "sft", "rewards", "prompts", "run.name", "run.directory", "run.seed")
PLACES = [path for path, *_ in rows_of(Recipe) if path not in ("base", "member")]
PLACES += [
    f"member.{path}" for path, *_ in rows_of(SCHEMAS["member"]) if not path.startswith(REPLACED)
]
PLACES += [
    "rewards.given.weight",
    "rewards.given.options",
    "rewards.given.arguments",
    "per_member.0.member.optim.lr",
    "per_member.1.rewards.given.weight",
    "per_iteration.0.eta",
    "evaluation.settings.towards_sft",
]
ODD = [None, True, "text", "", 3, -1, 2.5, -1e300, float("inf"), [], [None], [[]], {}, {"a": 1}]
ODD += [[{"a": None}], "10 # x", "yes", "1e5", 10**30, "\x00", "a\nb"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "sft.nemo").write_text("x")
    (folder / "p.jsonl").write_text('{"prompt": "p"}\n')
    return folder


def _recipe(place, folder):
    return {
        **RECIPE,
        "sft": str(place / "sft.nemo"),
        "run_directory": str(folder / "run"),
        "prompts": dict.fromkeys(("train", "heldout"), str(place / "p.jsonl")),
    }


def _put(values, parts, value):
    if isinstance(values, list):
        return [_put(v, parts[1:], value) if str(i) == parts[0] else v
                for i, v in enumerate(values)]  # fmt: skip
    inner = values.get(parts[0], {}) if len(parts) > 1 else None
    return {**values, parts[0]: _put(inner, parts[1:], value) if len(parts) > 1 else value}


@given(st.sampled_from(PLACES), st.sampled_from(ODD) | st.text(max_size=8), st.booleans())
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_one_mistake_in_a_recipe(place, path, value, misspell):
    """Refused with one line that names the key; or accepted, and then kept as it was given."""
    parts = path.split(".")
    if misspell:
        parts[-1] += "x"
    folder = place / "one"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    changed = _put(_recipe(place, folder), parts, value)
    (folder / "recipe.yaml").write_text(yaml_text.dump(changed))
    try:
        recipe = load_recipe(folder / "recipe.yaml")
    except ValueError as error:
        text = str(error)
        assert "\n" not in text, text
        assert parts[-1] in text or parts[0] in text, text
        return
    assert type_at(Recipe, parts) is not None, f"{'.'.join(parts)} is unknown and was accepted"
    if path in ("sft", "init", "run_directory", "cluster", "benchmarks.include"):
        return  # made absolute
    stored = recipe.values
    for part in parts:
        if isinstance(stored, dict) and part not in stored:
            return  # a table that holds only what differs
        stored = stored[int(part)] if isinstance(stored, list) else stored[part]
    assert stored == value or isinstance(value, dict), f"{path}: {value!r} became {stored!r}"


def test_mistakes_on_the_command_line_end_with_2(place, capsys):
    """A sample of the property above through the command itself."""
    folder = place / "cli"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml_text.dump(_recipe(place, folder)))
    for argument in (
        *("members=", "merge.eta=abc", "estimate.parameters=7B", "sft=null", "name"),
        *("per_member=[{rewards: {given: 0.5}}, {}]", "rewards.given.options=5"),
        *('member.prompts.max_tokens="64"', "member.run.seed=3", "member.optim.lr="),
        *("member.rollout.end_strings=['']", "member.rollout.top_p=0.5", "prompts.heldout=[a]"),
        *("evaluation.settings.etas=[1]", "member.rollout.prompts_per_step=1"),
    ):
        assert main(["plan", str(folder / "recipe.yaml"), argument]) == 2, argument
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
    assert not (folder / "run").exists()
