"""lm-evaluation-harness on the policy in memory, against plain softmax in float64."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import member_lab as lab
import pytest
import torch
from member_lab import Layout
from ranks import run_ranks

from nemo_warp import exit_codes
from nemo_warp.records import hash_file, read_completion

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.nemo

LONG = "And God said, Let there be light: and there was light. " * 6
PAIRS = [
    ("In the beginning", " God created"),
    ("", "And the earth"),
    ("And ", "God"),
    (LONG, "sea"),
]
TEXTS = ["And God saw the light, that it was good", LONG, "day"]
ASKED = [("In the beginning", {"until": ["."], "max_gen_toks": 5}),
         ("And the evening and", {"until": [], "max_gen_toks": 5}),
         ("And", {"until": [" "], "max_gen_toks": 5})]  # fmt: skip


def _requests(arguments):
    return [SimpleNamespace(args=a, task_name="test") for a in arguments]


def _policy(materials, directory, layout):
    from nemo_warp.aligner.policy.build import build_policy

    policy, _ = build_policy(lab.member_config(materials, directory, layout), 8, 1)
    return policy.model


def _answers(materials, directory, layout, tasks):
    from nemo_warp.aligner.evaluation.benchmarks import measure, task_manager
    from nemo_warp.aligner.evaluation.language_model import PolicyLM

    model = _policy(materials, directory, layout)
    with model.inference():
        lm = PolicyLM(model, micro_batch_size=2)
        return (
            lm.loglikelihood(_requests(PAIRS), disable_tqdm=True),
            lm.loglikelihood_rolling(_requests([(t,) for t in TEXTS]), disable_tqdm=True),
            lm.generate_until(_requests(ASKED), disable_tqdm=True),
            measure(lm, ["verses", "choices"], task_manager(tasks), limit=6),
        )


def _plain(materials, directory):
    """The same numbers from the model's logits, one text at a time, in float64."""
    model = _policy(materials, directory, lab.SINGLE)
    with model.inference(), torch.no_grad():

        def log_softmax(tokens):
            ids = torch.tensor([tokens])
            mask, _, positions = model.get_ltor_masks_and_position_ids(ids)
            logits = model.model(ids, positions, mask, labels=None)[0]
            return logits[:, : model.tokenizer.vocab_size].double().log_softmax(-1)

        def score(given, wanted):
            whole = (given + wanted)[-33:]  # the context is 32
            log_probs = log_softmax(whole[:-1])
            places = range(len(whole) - 1 - len(wanted), len(whole) - 1)
            picked = [(log_probs[p, whole[p + 1]], log_probs[p].argmax() == whole[p + 1])
                      for p in places]  # fmt: skip
            return sum(v.item() for v, _ in picked), all(bool(g) for _, g in picked)

        encode, bos = model.tokenizer.text_to_ids, model.tokenizer.bos_id
        pairs = []
        for context, continuation in PAIRS:
            if not context:
                pairs.append(score([bos], encode(continuation)))
                continue
            stripped = context.rstrip()
            whole = encode(stripped + context[len(stripped) :] + continuation)
            given = encode(stripped)
            pairs.append(score(given, whole[len(given) :]))
        rolling = []
        for text in TEXTS:
            tokens, total = encode(text), 0.0
            for start in range(0, len(tokens), 32):  # the last window looks back as far as it can
                stop = min(start + 32, len(tokens))
                first = max(0, stop - 32) if start else 0
                given = ([bos, *tokens])[first : start + 1]
                total += score(given, tokens[start:stop])[0]
            rolling.append(total)
        texts = []
        for context, options in ASKED:
            tokens = encode(context)
            for _ in range(options["max_gen_toks"]):
                tokens = [*tokens, int(log_softmax(tokens)[-1].argmax())]
                if tokens[-1] == model.tokenizer.eos_id:
                    break
            decode = model.tokenizer.ids_to_text
            answer = decode([t for t in tokens if t != model.tokenizer.eos_id])[
                len(decode(encode(context))) :
            ]
            cut = [answer.find(end) for end in options["until"] if end in answer]
            texts.append(answer[: min(cut)] if cut else answer)
        return pairs, rolling, texts


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two local tasks of lm-eval: bits per byte of verses, and a choice of the true next words."""
    folder = tmp_path_factory.mktemp("tasks")
    verses = [{"text": text, "choices": [text[20:30], "zzz qqq"], "gold": 0}
              for text in lab.json.loads(json.dumps(TEXTS)) * 2 if len(text) > 20]  # fmt: skip
    (folder / "verses.jsonl").write_text("".join(json.dumps(v) + "\n" for v in verses))
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/verses.jsonl}}}}\n"
        "test_split: test\n"
    )
    (folder / "verses.yaml").write_text(
        f"task: verses\n{common}output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{text}}'\nmetric_list: [{metric: bits_per_byte}]\n"
    )
    (folder / "choices.yaml").write_text(
        f"task: choices\n{common}output_type: multiple_choice\ndoc_to_text: '{{{{text[:20]}}}}'\n"
        "doc_to_target: gold\ndoc_to_choice: choices\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    return folder


def test_equal_to_plain_softmax_at_every_layout(materials, tasks, tmp_path):
    pairs, rolling, texts = run_ranks(_plain, 1, materials, tmp_path)[0]
    first = None
    for layout in (lab.SINGLE, Layout(2), Layout(1, 2), Layout(1, 1, 2)):
        answers = run_ranks(_answers, layout.ranks, materials, tmp_path, layout, tasks)
        assert all(a == answers[0] for a in answers), f"{layout}: ranks disagree"
        found_pairs, found_rolling, found_texts, scores = answers[0]
        for (found, greedy), (expected, best) in zip(found_pairs, pairs, strict=True):
            assert found == pytest.approx(expected, abs=2e-4), layout
            assert greedy == best
        assert found_rolling == pytest.approx(rolling, abs=1e-3), layout
        assert found_texts == texts, layout
        first = first or scores
        assert scores["verses"]["bits_per_byte"] == pytest.approx(
            first["verses"]["bits_per_byte"], abs=1e-5
        )
        assert scores["choices"] == pytest.approx(first["choices"], abs=1e-9)
    assert 0 <= first["choices"]["acc"] <= 1 and first["verses"]["bits_per_byte"] > 0


def _theirs(checkpoint, pairs):
    """lm-eval's own class for NeMo, which wants a GPU by name."""
    from unittest import mock

    from lightning.pytorch.trainer import trainer
    from lm_eval.models import nemo_lm
    from nemo.collections.nlp.modules.common.text_generation_strategy import (
        GPTModelTextGenerationStrategy,
    )

    def on_the_cpu(**settings):
        return trainer_class(**settings | {"accelerator": "cpu"})

    trainer_class = trainer.Trainer
    with mock.patch.object(trainer, "Trainer", on_the_cpu):
        model = nemo_lm.NeMoLM(str(checkpoint), max_length=32, precision="32-true")
    # NeMo's search for the strategy imports its multimodal models, which want torchvision.
    model.generate = partial(model.generate, strategy=GPTModelTextGenerationStrategy(model.model))
    return model.loglikelihood(_requests(pairs))


def _ours(materials, directory, pairs):
    from nemo_warp.aligner.evaluation.language_model import PolicyLM

    model = _policy(materials, directory, lab.SINGLE)
    with model.inference():
        return PolicyLM(model, micro_batch_size=2).loglikelihood(_requests(pairs), True)


def test_equal_to_lm_evals_own_class(materials, tmp_path):
    """Where that one is right: a context that is not empty and is not cut."""
    pairs = [PAIRS[0], PAIRS[2], ("And God saw", " the light"), ("it was", " good. And God")]
    ours = run_ranks(_ours, 1, materials, tmp_path, pairs)[0]
    theirs = run_ranks(_theirs, 1, materials.sft, pairs)[0]
    for (found, greedy), (expected, best) in zip(ours, theirs, strict=True):
        assert found == pytest.approx(expected, abs=2e-4)
        assert greedy == bool(best)


def _benchmark(config, *overrides):
    from nemo_warp.aligner import benchmark

    return benchmark.main(["--config", str(config), *overrides])


def test_benchmarks_along_a_front(materials, tasks, tmp_path, capfd):
    """A program of its own; a restart scores only what is missing; both ends are their models'."""
    config = {
        "directory": str(tmp_path / "benchmarks"),
        "base": str(materials.sft),
        "slerp": str(materials.other),
        "sft": str(materials.sft),
        "etas": [0.0, 1.0],
        "prompts": {"heldout": str(materials.heldout)},
        "rollout": {"max_response_tokens": 6, "micro_batch_size": 2},
        "rewards": [],
        "evaluation": {"num_prompts": 8},
        "benchmarks": {"tasks": ["verses", "choices"], "include": str(tasks), "limit": 6},
        "trainer": {"devices": 1, "accelerator": "auto", "precision": "32"},
        "model": {"tensor_model_parallel_size": 1, "megatron_amp_O2": False},
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    assert run_ranks(_benchmark, 1, path) == [exit_codes.DONE]
    file = tmp_path / "benchmarks/points.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    scores = [json.loads(line)["scores"] for line in lines]
    assert [json.loads(line)["eta"] for line in lines] == [0.0, 1.0]
    for found, model in zip(scores, (materials.sft, materials.other), strict=True):
        at_both = replace(materials, sft=model)
        (_, _, _, expected) = run_ranks(_answers, 1, at_both, tmp_path, lab.SINGLE, tasks)[0]
        assert found["verses"] == pytest.approx(expected["verses"], abs=1e-5)
    assert scores[0]["verses"] != scores[1]["verses"]
    assert read_completion(tmp_path / "benchmarks").files["points.jsonl"] == hash_file(file)
    (tmp_path / "benchmarks/completion.json").unlink()
    file.write_text(lines[0])
    assert run_ranks(_benchmark, 1, path) == [exit_codes.DONE]
    assert file.read_text() == "".join(lines)
    for override, message in (
        ("benchmarks.tasks=[]", "benchmarks.tasks is empty"),
        ("benchmarks.include=/nowhere", "no such directory: /nowhere"),
        ("benchmarks.tasks=[no_such]", "lm-eval knows no task 'no_such'"),
    ):
        elsewhere = f"directory={tmp_path / 'other'}"
        assert run_ranks(_benchmark, 1, path, elsewhere, override) == [exit_codes.MISCONFIGURED]
        assert message in capfd.readouterr().err


def _refusals(materials, directory):
    from nemo_warp.aligner.evaluation.benchmarks import measure, task_manager
    from nemo_warp.aligner.evaluation.language_model import PolicyLM

    model = _policy(materials, directory, lab.SINGLE)
    messages = []
    with model.inference():
        lm = PolicyLM(model, 2)
        for call in (
            lambda: lm.generate_until(_requests([("a", {"max_gen_toks": 32})]), True),
            lambda: lm.generate_until(_requests([("a", {"do_sample": True})]), True),
            lambda: measure(lm, ["no_such_task"], task_manager(None)),
        ):
            try:
                call()
            except ValueError as error:
                messages.append(str(error))
    return messages


def test_what_cannot_be_measured_is_refused(materials, tmp_path):
    messages = run_ranks(_refusals, 1, materials, tmp_path)[0]
    assert [m.split(";")[0] for m in messages] == [
        "task test wants 32 new tokens of a model whose context is 32",
        "task test samples its answers",
        "lm-eval knows no task 'no_such_task'",
    ]
