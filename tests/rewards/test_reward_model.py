"""A NeMo reward model: trained on pairs that VADER labels, served, and scored by the client."""

import itertools
import json
import os
import random
import signal
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from ranks import run_ranks

from nemo_warp import exit_codes
from nemo_warp.checkpoints.checkpoint import open_checkpoint
from nemo_warp.checkpoints.inspection import read_tensor
from nemo_warp.checkpoints.io.reading import FileCache
from nemo_warp.merge import merge
from nemo_warp.rewards import pairs
from nemo_warp.rewards.client import RewardClient
from nemo_warp.schema.shared import RewardClientSettings

pytestmark = pytest.mark.nemo

RUN_ID = "rm-test"
FEELINGS = ["good", "love", "joy", "bad", "hate", "evil", "light", "day", "earth", "deep", "form"]
THINGS = ["light", "day", "night", "earth", "deep", "morning", "heaven", "water"]
SETTINGS = RewardClientSettings(ready_deadline_s=60, request_timeout_s=30, retries=1, backoff_s=0.1)


def _texts(seed: int, number: int) -> list[str]:
    """Short sentences over words that VADER does and does not know; seed 0 and 1 share none."""
    every = [
        f"the {a} was {x} and the {b} was {y}"
        for a, b in itertools.permutations(THINGS, 2)
        for x, y in itertools.product(FEELINGS, repeat=2)
    ]
    random.Random(0).shuffle(every)
    return every[-number:] if seed else every[:number]


HELD_OUT = _texts(1, 13)


@pytest.fixture(scope="module")
def reward_model(nemo, tmp_path_factory) -> Path:
    """A tiny reward model, trained; its metrics are next to it."""
    directory = tmp_path_factory.mktemp("rm")
    for seed, (name, number) in enumerate([("train", 2400), ("validation", 800)]):
        (directory / f"{name}.txt").write_text("\n".join(_texts(seed, number)))
        vader = ["--callable", "nemo_warp.rewards.library:vader_compound", "--min-gap", "0.2"]
        files = ["--texts", directory / f"{name}.txt", "--output", directory / f"{name}.jsonl"]
        assert pairs.main([*vader, *map(str, files)]) == exit_codes.DONE
    with (directory / "validation.jsonl").open("a") as stream:  # upstream runs off the end here
        stream.write(json.dumps({"text": "far too long " * 64}) + "\n" + '{"text": "bad"}\n')
    tokenizer = tiny_models.write_tokenizer(directory)
    tied = partial(tiny_models.save_tiny_nemo, share_embeddings_and_output_weights=True)
    run_ranks(tied, 1, directory / "base.nemo", tokenizer)
    run_ranks(_train, 1, directory)
    return directory / "rm.nemo"


def _train(directory: Path, name: str = "rm.nemo", **changes) -> None:
    from nemo_warp.aligner import train_reward_model

    arguments = {
        "init": directory / "base.nemo",
        "output": directory / name,
        "pairs.train": directory / "train.jsonl",
        "pairs.validation": directory / "validation.jsonl",
        "steps": 150,
        "global_batch_size": 16,
        "validation_interval": 75,
        "optim.name": "adamw",
        "optim.lr": 3e-3,
        "optim.weight_decay": 0.0,
        "trainer.devices": 1,
        "trainer.accelerator": "auto",
        "trainer.precision": "'32'",
        "model.megatron_amp_O2": "false",
        "model.micro_batch_size": 16,
        **changes,
    }
    code = train_reward_model.main([f"{key}={value}" for key, value in arguments.items()])
    assert code == exit_codes.DONE


def test_it_learns_what_vader_prefers(reward_model):
    record = json.loads(reward_model.with_suffix(".json").read_text())
    assert record["validation"]["acc"] > 0.8
    assert record["validation"]["acc"] > record["history"][0]["acc"] - 0.05
    assert [point["step"] for point in record["history"]] == [75, 150]


def test_reward_models_are_averaged_into_one_that_scores(reward_model, own_scores, caplog):
    """WARM: one base, another learning rate and seed, LERP at eta 1, the first as the init."""
    directory = reward_model.parent
    caplog.set_level("INFO")
    run_ranks(partial(_train, seed=7, **{"optim.lr": 2e-3}), 1, directory, "second.nemo")
    models, output = [reward_model, directory / "second.nemo"], directory / "warm.nemo"
    merge(models[0], models, str(output), method="lerp", eta=1.0, workers=1)
    assert "no change in some policy" not in caplog.text  # the init is one of them
    tensors = [_weights(path) for path in (*models, output)]
    assert any(name.startswith("rm_head") for name in tensors[2])
    for name, merged in tensors[2].items():
        average = (tensors[0][name].double() + tensors[1][name].double()) / 2
        assert torch.equal(merged, average.float()), name
    asked = [json.loads(line)["text"] for line in _lines(directory / "validation.jsonl")[:400]]
    (scores,) = run_ranks(_in_process, 1, output, asked)
    chosen, rejected = np.array(scores[0::2]), np.array(scores[1::2])
    assert (chosen > rejected).mean() > 0.75
    assert not np.allclose(scores[:12], own_scores)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def _weights(path: Path) -> dict[str, torch.Tensor]:
    tensors = open_checkpoint(path).tensors
    with FileCache() as files:
        return {name: read_tensor(files, tensor) for name, tensor in tensors.items()}


def _in_process(model_path: Path, texts: list[str]) -> list[float]:
    from nemo_warp.aligner.reward_model.model import RewardModelSetup, load_reward_model

    model = load_reward_model(RewardModelSetup(model_path, micro_batch_size=4))
    return model.infer(texts)[:, 0].tolist()


@pytest.fixture(scope="module")
def own_scores(reward_model) -> list[float]:
    """Of the first 12 held-out texts, by the model itself."""
    (scores,) = run_ranks(_in_process, 1, reward_model, HELD_OUT[:12])
    assert len(set(scores)) > 6
    return scores


def _serve_and_ask(model_path: Path, ask, *extra: str):
    """The entry point on every rank; rank 0 also asks, in a thread, and then ends the server."""
    from nemo_warp.aligner import serve_reward_model

    endpoint_file = model_path.parent / f"endpoint_{os.environ['WORLD_SIZE']}.json"
    answers = []

    def client() -> None:
        try:
            answers.append(ask(endpoint_file))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    if os.environ["RANK"] == "0":
        threading.Thread(target=client, daemon=True).start()
    arguments = ["--model", model_path, "--run-id", RUN_ID, "--endpoint-file", endpoint_file]
    code = serve_reward_model.main([*map(str, arguments), "--micro-batch-size", "4", *extra])
    return code, answers, endpoint_file.exists()


def _ask(texts: list[str], endpoint_file: Path):
    client = RewardClient(endpoint_file, SETTINGS, run_id=RUN_ID)
    endpoint = client.connect()
    half = [len(text) // 2 for text in texts]
    scores = client.score(
        [text[:cut] for text, cut in zip(texts, half, strict=True)],
        [text[cut:] for text, cut in zip(texts, half, strict=True)],
    )
    return endpoint, scores


def _ask_as_nemo_aligner_does(texts: list[str], tokens: np.ndarray, lengths, endpoint_file: Path):
    from nemo_aligner.servers.http_communicator import HTTPCommunicator

    endpoint, scores = _ask(texts, endpoint_file)
    address = (endpoint.host, endpoint.port)
    communicator = HTTPCommunicator.create_http_communicator_from_dict(
        {endpoint.model_name: address}
    )
    data = {"tokens": tokens, "sequence_lengths": lengths}
    rewards = communicator.send_data_to_server(endpoint.model_name, data).result()["rewards"]
    communicator.close()
    return endpoint, scores, rewards


def test_served_scores_are_the_models_own(reward_model, own_scores):
    import sentencepiece

    from nemo_warp.records import hash_file

    texts = HELD_OUT[:12]
    processor = sentencepiece.SentencePieceProcessor(str(reward_model.parent / "tokenizer.model"))
    rows = [processor.encode(text) for text in texts]
    tokens = np.array([row + [0] * (64 - len(row)) for row in rows], np.int64)
    lengths = np.array([[len(row)] for row in rows], np.int64)

    asked = ["", *texts, "too long " * 64]
    ask = partial(_ask_as_nemo_aligner_does, asked, tokens, lengths)
    ((code, [(endpoint, scores, rewards)], left),) = run_ranks(_serve_and_ask, 1, reward_model, ask)
    assert code == exit_codes.DONE and not left
    assert endpoint.fingerprint == hash_file(reward_model).sha256
    np.testing.assert_array_equal(scores.scores[1:-1], own_scores)
    np.testing.assert_array_equal(rewards[:, 0], np.array(own_scores, np.float32))
    assert scores.failed.tolist() == [True] + [False] * 12 + [True]
    assert scores.reasons[0] == "the text is empty"
    assert scores.reasons[-1].endswith("the reward model reads 64")


TEMPLATE = """\
{%- if messages[0]['role'] != 'user' %}{{ raise_exception('no user') }}{% endif -%}
{{ messages[0]['content'] }}{{ messages[-1]['content'] }}
"""


def _ask_with_messages(endpoint_file: Path):
    """Prompts with the marks of another family, and what their lines say of them."""
    client = RewardClient(endpoint_file, SETTINGS, run_id=RUN_ID)
    endpoint = client.connect()
    half = [len(text) // 2 for text in HELD_OUT[:12]]
    halves = [(t[:cut], t[cut:]) for t, cut in zip(HELD_OUT[:12], half, strict=True)]
    fields = [{"messages": [{"role": "user", "content": prompt}]} for prompt, _ in halves]
    fields += [{}, {"messages": "none"}, {"messages": [{"role": "system", "content": "x"}]}]
    prompts = [f"<start_of_turn>user\n{prompt}<end_of_turn>\n" for prompt, _ in halves]
    responses = [response for _, response in halves]
    return endpoint, client.score(prompts + ["p"] * 3, responses + ["r"] * 3, fields)


def test_texts_for_a_model_of_another_family_are_made_anew(reward_model, own_scores):
    """From the conversation, with its own template: nothing of the policy's marks is left."""
    template = reward_model.parent / "template.jinja"
    template.write_text(TEMPLATE.rstrip("\n"))
    extra = ("--chat-template", str(template))
    ((code, [(endpoint, scores)], _),) = run_ranks(
        _serve_and_ask, 1, reward_model, _ask_with_messages, *extra
    )
    assert code == exit_codes.DONE
    assert endpoint.needs == endpoint.takes == ("messages",)
    np.testing.assert_array_equal(scores.scores[:12], own_scores)
    assert scores.failed.tolist() == [False] * 12 + [True] * 3
    assert "no field 'messages'" in scores.reasons[12]
    assert "holds no messages" in scores.reasons[13]
    assert scores.reasons[14] == "the chat template says: no user"
    from nemo_warp.records import hash_file

    assert endpoint.fingerprint != hash_file(reward_model).sha256, "the template decides, too"


@pytest.mark.parametrize(
    ("ranks", "extra"), [(2, ()), (4, ("--tensor", "2", "--pipeline", "2"))], ids=["dp2", "tp2pp2"]
)
def test_parallel_layouts_serve_the_same_scores(reward_model, own_scores, ranks, extra):
    outcomes = run_ranks(
        _serve_and_ask, ranks, reward_model, partial(_ask, HELD_OUT), *extra, timeout=90
    )
    assert [code for code, _, _ in outcomes] == [exit_codes.DONE] * ranks
    (_, scores) = outcomes[0][1][0]
    assert not scores.failed.any()
    np.testing.assert_allclose(scores.scores[:12], own_scores, rtol=0, atol=2e-6)


def _main(arguments: list[str]) -> int:
    from nemo_warp.aligner import serve_reward_model

    return serve_reward_model.main(["--run-id", RUN_ID, "--endpoint-file", "e.json", *arguments])


@pytest.mark.parametrize(
    ("model", "extra", "message"),
    [
        ("missing.nemo", [], "no checkpoint"),
        ("base.nemo", [], "not a NeMo-Aligner reward model"),
        ("rm.nemo", ["--tensor", "2"], "tensor"),
        ("rm.nemo", ["--micro-batch-size", "0"], "--micro-batch-size must be at least 1"),
        ("rm.nemo", ["--run-id", ""], "run id"),
        ("rm.nemo", ["--chat-template", "none.jinja"], "no chat template none.jinja"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused(reward_model, capsys, model, extra, message):
    assert _main(["--model", str(reward_model.parent / model), *extra]) == exit_codes.MISCONFIGURED
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
