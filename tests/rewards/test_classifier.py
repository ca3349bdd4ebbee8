"""A Hugging Face sequence classifier as reward model: its scores are transformers' own."""

import json
import math

import pytest
import torch
from hf_models import write_hf_tokenizer

from nemo_warp.aligner.reward_model.template import ChatTemplate, template_source
from nemo_warp.rewards.callables import fingerprint, load_callable
from nemo_warp.rewards.scoring import Desk, Sample, Scoring

transformers = pytest.importorskip("transformers")
NAME = "nemo_warp.rewards.library.classifier:Classifier"
TEMPLATE = "{% for m in messages %}<s>{{ m['role'][0] }}:{{ m['content'] }}</s>{% endfor %}"
RESPONSES = ["abc", "a", "abcdefghij" * 2, "", "x" * 200, "zyx"]
SIZES = {
    "vocab_size": 128,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def _write(folder, kind, **changes):
    """A random classifier of a decoder (llama) or an encoder (bert)."""
    config = transformers.AutoConfig.for_model(kind, **SIZES, **changes)
    torch.manual_seed(1)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    write_hf_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Directory and model by kind."""
    made = {}
    for kind, changes in (("llama", {"num_labels": 1}), ("bert", {"num_labels": 3})):
        folder = tmp_path_factory.mktemp(kind)
        made[kind] = (folder, _write(folder, kind, pad_token_id=0, **changes))
    return made


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"form": "text"}),
        ("llama", {"form": "chat", "micro_batch_size": 2}),
        ("llama", {"form": "text", "probability": True}),
        ("bert", {"form": "pair", "label": "LABEL_2", "probability": True}),
        ("bert", {"form": "text", "label": 0}),
    ],
)
def test_batched_scores_are_transformers_own_one_by_one(folders, kind, options):
    folder, model = folders[kind]
    score = load_callable(NAME, {"model": str(folder), "device": "cpu", **options})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    samples = [Sample("p:", text, {"messages": talk}) for text in RESPONSES]
    outcomes = Desk(Scoring(score, together=32)).score(samples)
    for text, (value, why) in zip(RESPONSES, outcomes, strict=True):
        if len(text) > 64:
            assert math.isnan(value) and "the classifier reads 64" in why
            continue
        assert not why
        if options["form"] == "chat":
            whole = "<s>u:hi</s><s>a:yes?</s>" + f"<s>a:{text}</s>"
            given = tokenizer(whole, return_tensors="pt")
        elif options["form"] == "pair":
            given = tokenizer("p:", text, return_tensors="pt")
        else:
            given = tokenizer("p:" + text, return_tensors="pt")
        if kind == "llama":
            given.pop("token_type_ids", None)
        with torch.no_grad():
            logits = model(**given).logits[0]
        if options.get("probability"):
            logits = logits.sigmoid() if len(logits) == 1 else logits.softmax(0)
        label = {"LABEL_2": 2}.get(options.get("label"), 0)
        assert value == pytest.approx(logits[label].item(), abs=1e-5)


@pytest.mark.parametrize("pad", ["</s>", None])
def test_a_padding_token_in_the_text_does_not_end_it(folders, tmp_path, pad):
    """Where the end token pads, or nothing does, as in many published reward models."""
    model = _write(tmp_path, "llama", num_labels=1, pad_token_id=2 if pad else None)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"pad_token": pad}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    score = load_callable(NAME, {"model": str(tmp_path), "form": "chat", "device": "cpu"})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    responses = ["abc", "abcdef", "a"]
    for response, found in zip(responses, score(["p:"] * 3, responses), strict=True):
        ids = tokenizer(f"<s>u:p:</s><s>a:{response}</s>", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            last = model.score(model.model(ids).last_hidden_state)[0, -1, 0]
        assert found == pytest.approx(last.item(), abs=1e-5)


def test_its_weights_are_its_fingerprint(folders, tmp_path):
    options = {"model": str(folders["llama"][0]), "device": "cpu"}
    score = load_callable(NAME, options)
    _write(tmp_path, "llama", num_labels=1, pad_token_id=0, attention_bias=True)
    other = load_callable(NAME, {**options, "model": str(tmp_path)})
    assert score.identity != other.identity
    assert fingerprint(NAME, options, score) != fingerprint(NAME, options, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "/no/such/folder"}, "holds no config.json"),
        ({"model": "llama", "form": "prose"}, "form is 'prose', expected text"),
        ({"model": "bert"}, r"label is None, but .* 0 \(LABEL_0\), 1 \(LABEL_1\)"),
        ({"model": "bert", "label": "good"}, "label is 'good'"),
        ({"model": "empty"}, "cannot be loaded as a sequence classifier"),
    ],
)
def test_a_classifier_that_cannot_be_used_is_refused(folders, tmp_path, options, message):
    (tmp_path / "config.json").write_text("{}")
    known = {kind: str(folder) for kind, (folder, _) in folders.items()} | {"empty": str(tmp_path)}
    with pytest.raises(ValueError, match=message):
        load_callable(NAME, {**options, "model": known.get(options["model"], options["model"])})


GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}
{% for message in messages %}
    {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
"""
TALK = [{"role": "user", "content": " hi\n"}]


@pytest.mark.parametrize("source", [TEMPLATE, GEMMA])
def test_a_nemo_reward_models_template_is_read_as_transformers_does(folders, tmp_path, source):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["llama"][0])
    whole = [*TALK, {"role": "assistant", "content": "yes? "}]
    expected = tokenizer.apply_chat_template(whole, tokenize=False, chat_template=source)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({"chat_template": source}))
    assert template_source(file) == source
    template = ChatTemplate(template_source(file), {"bos_token": "<s>"})
    assert template.text(TALK, "yes? ") == expected


def test_what_is_no_template_or_no_conversation_is_said(tmp_path):
    template = ChatTemplate(GEMMA, {})
    with pytest.raises(ValueError, match="the chat template says: no system"):
        template.text([{"role": "system", "content": "x"}], "r")
    for messages in ([], "none", [{"role": "user"}]):
        with pytest.raises(ValueError, match="holds no messages"):
            template.text(messages, "r")
    with pytest.raises(ValueError, match="cannot be read"):
        ChatTemplate("{% if %}", {})
    (tmp_path / "config.json").write_text("{}")
    for name in ("none.jinja", "config.json"):
        with pytest.raises(ValueError, match="no chat template"):
            template_source(tmp_path / name)
