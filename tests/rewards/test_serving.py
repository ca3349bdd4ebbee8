"""Real PyTriton servers and the client, when all is well and when it is not."""

import json
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from reward_servers import STRANGE, VADER, Server, running

from nemo_warp import exit_codes
from nemo_warp.rewards import RewardError
from nemo_warp.rewards.client import RewardClient
from nemo_warp.rewards.endpoint import Endpoint
from nemo_warp.rewards.mixture import RewardMixture
from nemo_warp.rewards.triton import Serving, serve
from nemo_warp.schema.shared import RewardClientSettings

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

QUICK = RewardClientSettings(
    ready_deadline_s=30, request_timeout_s=5, retries=2, backoff_s=0.05, batch_size=4, in_flight=2
)
PATIENT = replace(QUICK, retries=30, backoff_s=0.5)

SENTENCES = [
    "And God saw the light, that it was good.",
    "Woe unto them! for they have gone in the way of Cain.",
    "Rejoice in the Lord alway: and again I say, Rejoice.",
    "These are the names of the children of Israel.",
    "I hate, I despise your feast days.",
    "He was GREAT, and I love him :) !!!",
    "Ναὶ ἔρχομαι ταχύ — 愛 🎉",
    "",
]


def _connected(server: Server, settings: RewardClientSettings = QUICK) -> RewardClient:
    client = RewardClient(server.endpoint_file, settings, name="test", run_id="run-1")
    client.connect()
    return client


def test_scores_are_vaders_own(vader):
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    expected = [analyzer.polarity_scores(text)["compound"] for text in SENTENCES]
    assert len(set(expected)) > 4
    prompts = ["A dreadful, evil prompt: "] * len(SENTENCES)  # not to be scored
    scores = _connected(vader).score(prompts, SENTENCES)
    np.testing.assert_array_equal(scores.scores, np.array(expected, np.float32))
    assert not scores.failed.any()


def test_a_process_forked_after_asking_can_ask(vader):
    def ask() -> None:
        assert not _connected(vader).score([""], ["Rejoice!"]).failed.any()

    ask()
    forked = multiprocessing.get_context("fork").Process(target=ask)
    forked.start()
    try:
        forked.join(30)
        assert forked.exitcode == 0
    finally:
        forked.kill()


def test_nemo_aligners_way_of_asking_works(vader):
    """`sentences` alone, over PyTriton's client, as its HTTPCommunicator sends them."""
    from pytriton.client import FuturesModelClient
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    endpoint = Endpoint.read(vader.endpoint_file)
    data = np.array([[text.encode()] for text in SENTENCES], np.object_)
    with FuturesModelClient(f"http://{endpoint.address}", endpoint.model_name) as client:
        rewards = client.infer_batch(sentences=data).result()["rewards"]
    scores = [SentimentIntensityAnalyzer().polarity_scores(text)["compound"] for text in SENTENCES]
    assert rewards.dtype == np.float32
    np.testing.assert_array_equal(rewards, np.array(scores, np.float32)[:, None])


def test_bad_samples_fail_alone(strange):
    responses = ["abc", "raise", "nan", "huge", "text", "defg"]
    scores = _connected(strange).score(["pp"] * 6, responses)
    assert scores.failed.tolist() == [False, True, True, True, True, False]
    assert scores.scores[[0, 5]].tolist() == [32.0, 42.0]
    assert np.isnan(scores.scores[1:5]).all()
    assert scores.reasons[1] == "RuntimeError: asked to raise"
    assert scores.reasons[2] == "the reward returned nan"
    assert scores.reasons[4].startswith("ValueError: could not convert")
    assert "asked to raise" in strange.log.read_text()


def test_order_survives_batches_in_flight(strange):
    responses = ["x" * length for length in range(1, 100)]
    future = _connected(strange).submit([""] * 99, responses)
    assert future.result(timeout=30).scores.tolist() == [10.0 * n for n in range(1, 100)]
    assert future.done()


def test_a_text_that_is_none_fails_without_an_exception(strange):
    scores = _connected(strange).score(["p"], ["\ud800"])
    assert scores.failed.tolist() == [True] and "not a text" in scores.reasons[0]


def test_mixture_of_two_servers(vader, strange):
    rewards = [
        {"name": "vader", "weight": 100.0, "endpoint": str(vader.endpoint_file)},
        {"name": "length", "weight": -0.5, "endpoint": str(strange.endpoint_file)},
    ]
    mixture = RewardMixture.from_config(rewards, {"batch_size": 2, "retries": 0}, run_id="run-1")
    mixture.connect()
    scores = mixture.score([""] * 3, ["good", "raise", "bad"])
    vader_good, vader_bad = np.float32([0.4404, -0.5423]).astype(float)
    np.testing.assert_allclose(
        scores.scores, [100 * vader_good - 20, np.nan, 100 * vader_bad - 15], rtol=1e-12
    )
    assert scores.reasons[1] == "length: RuntimeError: asked to raise"
    assert not np.isnan(scores.parts["vader"]).any()
    assert set(mixture.fingerprints) == {"vader", "length"}
    mixture.close()


def test_another_runs_server_is_refused(vader, strange, tmp_path):
    with pytest.raises(RewardError, match="belongs to run 'run-1', not to 'run-2'"):
        RewardClient(vader.endpoint_file, QUICK, run_id="run-2").connect()
    with pytest.raises(RewardError, match="but 0123abcd is expected"):
        RewardClient(vader.endpoint_file, QUICK, fingerprint="0123abcd").connect()
    # A port that now belongs to someone else: the file says ours, the server says it is not.
    port = Endpoint.read(strange.endpoint_file).port
    stale = tmp_path / "stale.json"
    replace(Endpoint.read(vader.endpoint_file), port=port).write(stale)
    with pytest.raises(RewardError, match=r"not ready within .* does not serve reward-"):
        RewardClient(stale, replace(QUICK, ready_deadline_s=1), run_id="run-1").connect()


def test_a_server_replaced_by_another_reward_gives_failures(vader, strange, tmp_path):
    moving = tmp_path / "endpoint.json"
    Endpoint.read(vader.endpoint_file).write(moving)
    client = RewardClient(moving, QUICK, run_id="run-1")
    client.connect()
    Endpoint.read(strange.endpoint_file).write(moving)
    scores = client.score(["", ""], ["good", "bad"])
    assert scores.failed.all() and "is expected" in scores.reasons[0]


def test_not_ready_within_the_deadline(tmp_path):
    client = RewardClient(tmp_path / "never.json", replace(QUICK, ready_deadline_s=0.2))
    with pytest.raises(RewardError, match=r"no endpoint file .*never.json"):
        client.connect()


def test_a_mangled_endpoint_file_is_named(tmp_path):
    (tmp_path / "endpoint.json").write_text("{")
    with pytest.raises(RewardError, match=r"endpoint.json is not a reward server's endpoint file"):
        RewardClient(tmp_path / "endpoint.json", QUICK).connect()


def test_slow_start_is_waited_for_and_sigterm_cleans_up(pytriton, tmp_path, monkeypatch):
    monkeypatch.setenv("STRANGE_IMPORT_S", "3")
    with Server(tmp_path, STRANGE, "--options", json.dumps({"scale": 2.0})) as server:
        assert _connected(server).score(["p"], ["ab"]).scores.tolist() == [42.0]
        assert server.stop() == exit_codes.DONE
        assert not server.endpoint_file.exists() and not any(server.temporary.iterdir())


def test_a_server_killed_in_a_request_and_restarted_elsewhere_is_found(pytriton, tmp_path):
    with running(tmp_path, STRANGE) as first:
        before = Endpoint.read(first.endpoint_file)
        client = _connected(first, PATIENT)
        future = client.submit(["p"] * 8, ["sleep 3"] + ["abc"] * 7)
        first.wait_for(first.mark)
    with running(tmp_path, STRANGE) as second:
        scores = future.result(timeout=60)
        after = Endpoint.read(second.endpoint_file)
        assert scores.scores.tolist() == [71.0] + [31.0] * 7
        assert (after.pid, after.port) != (before.pid, before.port)
        assert after.fingerprint == before.fingerprint


def test_a_dead_server_gives_failures_not_numbers(pytriton, tmp_path):
    with running(tmp_path, STRANGE) as server:
        client = _connected(server)
        os.kill(server.triton_pid(), signal.SIGKILL)
        assert server.process.wait(30) == exit_codes.FAILED
        assert "error: the Triton server ended by itself" in server.log.read_text()
        assert not server.endpoint_file.exists()
        scores = client.score(["p"] * 5, ["abc"] * 5)
    assert scores.failed.all() and "its server has stopped" in scores.reasons[0]
    assert np.isnan(scores.scores).all()


def test_a_hanging_server_times_out_and_still_stops_on_sigterm(pytriton, tmp_path):
    with running(tmp_path, STRANGE) as server:
        client = _connected(server, replace(QUICK, request_timeout_s=0.5, retries=1))
        started = time.monotonic()
        scores = client.score(["p"], ["sleep 1000"])
        assert time.monotonic() - started < 10
        assert scores.failed.all() and "did not answer in 0.5 s" in scores.reasons[0]
        assert server.stop() == exit_codes.DONE
        assert not server.endpoint_file.exists()


def test_something_that_speaks_no_http_is_a_failure(vader, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_mumble, args=(listener,), daemon=True).start()
        stale = tmp_path / "endpoint.json"
        port = listener.getsockname()[1]
        replace(Endpoint.read(vader.endpoint_file), port=port).write(stale)
        scores = RewardClient(stale, QUICK).score(["p"], ["r"])
    assert scores.failed.all() and "failed (" in scores.reasons[0]


def _mumble(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.recv(1 << 16)
            connection.sendall(b"mumble\r\n\r\n")


def test_a_port_in_use_is_refused(vader, tmp_path):
    port = Endpoint.read(vader.endpoint_file).port
    with Server(tmp_path, VADER, "--port", str(port)) as server:
        assert server.process.wait(30) == exit_codes.FAILED
        assert f"error: cannot listen on 127.0.0.1:{port}" in server.log.read_text()
        assert not server.endpoint_file.exists()


@pytest.mark.parametrize(
    ("callable_", "extra", "run_id", "message"),
    [
        ("strange_rewards:none", [], "run-1", "has no 'none'"),
        (STRANGE, ["--options", "[1]"], "run-1", "must be a JSON object"),
        (STRANGE, ["--port", "99999"], "run-1", "port must be"),
        (STRANGE, [], "", "run id of a reward server must not be empty"),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path, callable_, extra, run_id, message):
    with Server(tmp_path, callable_, *extra, run_id=run_id) as server:
        assert server.process.wait(30) == exit_codes.MISCONFIGURED
    last = server.log.read_text().strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last


def test_a_temporary_directory_too_deep_for_sockets_is_refused(pytriton, tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    serving = Serving("run-1", "f" * 64, tmp_path / "endpoint.json")
    with pytest.raises(RewardError, match="set TMPDIR to a shorter path"):
        serve(lambda **inputs: {}, serving)
