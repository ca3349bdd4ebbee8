"""Prompts carry their answers: from a line of the file to a callable that takes them by name."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from reward_servers import running
from test_serving import QUICK, SENTENCES, _connected

from nemo_warp.prompts import PromptLine, read_prompts
from nemo_warp.rewards.callables import load_callable, score_samples, score_together
from nemo_warp.rewards.client import RewardClient
from nemo_warp.rewards.endpoint import Endpoint
from nemo_warp.rewards.fields import FieldsTaken
from nemo_warp.rewards.mixture import RewardMixture

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

CHECKED = "strange_rewards:checked"


def test_a_line_keeps_its_further_fields(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "2+2=", "answer": "4", "tests": ["assert f() == 4"], "level": None},
        {"prompt": "Say hi."},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_prompts(path, "prompt") == [
        PromptLine("2+2=", {"answer": "4", "tests": ["assert f() == 4"], "level": None}),
        PromptLine("Say hi.", {}),
    ]
    path.write_text('{"prompt": "a", "answer": "\\ud83d"}\n')
    with pytest.raises(ValueError, match="line 1 holds half of a surrogate pair"):
        read_prompts(path, "prompt")


@pytest.mark.parametrize(
    ("options", "needed", "names"),
    [({}, ("answer",), None), ({"answer": "4"}, (), None), ({"points": 2.0}, ("answer",), None)],
)
def test_what_a_callable_takes_by_name(options, needed, names):
    taken = FieldsTaken.by(load_callable(CHECKED, options))
    assert (taken.needed, taken.names) == (needed, names)


def test_the_two_texts_and_the_options_are_no_fields():
    def score(question, completion, answer=None, *, level=3):
        return 0.0

    taken = FieldsTaken.by(score)
    assert taken.names == ("answer", "level") and not taken.needed
    fields = {"question": "shadows the text", "level": 5, "other": 1}
    assert taken.of_one(fields) == {"level": 5}
    taken = FieldsTaken.by(load_callable(CHECKED, {"points": 2.0}))
    # The file's own `points` and `prompt` do not replace the option and the text.
    assert taken.of_one({"answer": "4", "points": 9.0, "prompt": "x", "k": 1}) == {
        "answer": "4",
        "k": 1,
    }


FIELDS = [{"answer": "4"}, {"answer": "4"}, {}, {"answer": "4", "points": 2.0}]


@pytest.mark.parametrize(
    ("name", "score"), [("checked", score_samples), ("checked_batch", score_together)]
)
def test_a_sample_without_a_needed_field_fails_alone(name, score):
    scores, reasons = score(
        load_callable(f"strange_rewards:{name}", {}), ["p"] * 4, ["4", "5", "4", "4"], FIELDS
    )
    assert scores[[0, 1, 3]].tolist() == [1.0, 0.0, 2.0]
    assert math.isnan(scores[2])
    assert reasons == ["", "", "the prompt has no field 'answer', which the reward takes", ""]


def test_fields_reach_the_server_and_what_lacks_them_is_refused(pytriton, tmp_path, vader):
    with running(tmp_path, CHECKED) as server:
        names = {"checked": server, "vader": vader}
        endpoint = Endpoint.read(server.endpoint_file)
        assert (endpoint.needs, endpoint.takes) == (("answer",), None)
        mixture = RewardMixture(
            [RewardClient(s.endpoint_file, QUICK, name=n) for n, s in names.items()], [1.0, 0.0]
        )
        mixture.connect()
        fields = [*FIELDS, {"answer": "日本", "a": [1], "b": {"c": 2}}]
        scores = mixture.score(["p"] * 5, ["4", "5", "4", "4", "日本"], fields)
        assert scores.scores[[0, 1, 3, 4]].tolist() == [1.0, 0.0, 2.0, 3.0]
        assert scores.failed.tolist() == [False, False, True, False, False]
        assert not np.isnan(scores.parts["vader"]).all()
        with pytest.raises(ValueError, match=r"field 'answer'.* a\.jsonl 1 of 4 .*: prompt 3\)"):
            mixture.check_fields(FIELDS, "a.jsonl")
        mixture.check_fields(FIELDS[:2], "a.jsonl")
        bad = mixture.score(["p"], ["4"], [{"answer": object()}])
        assert bad.failed.all() and "no JSON" in bad.reasons[0]
        mixture.close()


def test_a_server_of_an_earlier_version_is_asked_its_way(vader, tmp_path):
    """Its endpoint file names no inputs; it is sent none that it does not know."""
    old = asdict(Endpoint.read(vader.endpoint_file))
    for name in ("inputs", "needs", "takes"):
        del old[name]
    file = tmp_path / "endpoint.json"
    file.write_text(json.dumps(old))
    assert Endpoint.read(file) == replace(
        Endpoint.read(vader.endpoint_file), inputs=("sentences", "prompt_lengths"), takes=()
    )
    client = RewardClient(file, QUICK, run_id="run-1")
    client.connect()
    new = _connected(vader).score([""] * len(SENTENCES), SENTENCES)
    scores = client.score([""] * len(SENTENCES), SENTENCES, [{"answer": "x"}] * len(SENTENCES))
    np.testing.assert_array_equal(scores.scores, new.scores)
