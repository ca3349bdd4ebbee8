"""``nemo-warp compare``: two policies by their responses, groups of runs by their fronts."""

import json

import numpy as np
import pytest

from nemo_warp.cli import main
from nemo_warp.evidence.responses import write_responses


def _responses(path, shift, longer, judge_shift):
    """100 prompts, 2 generations; a judge that fails on prompt 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    records = []
    for index in range(100):
        for generation in range(2):
            base = random.normal()
            records.append(
                {
                    "prompt": f"p{index}",
                    "prompt_index": index,
                    "generation": generation,
                    "response": "word " * (4 + longer),
                    "reward": base + shift,
                    "scores": {"vader": base + shift},
                    "judges": {"tone": base + judge_shift if index else None},
                    "tokens": 4 + longer,
                }
            )
    write_responses(path, records)
    return path


def test_two_policies(tmp_path, capsys):
    """More of the trained reward and longer, but the judge likes it less: the table says so."""
    _responses(tmp_path / "run/front/responses/sft_1.jsonl.gz", 0.5, 3, -0.5)
    sft = _responses(tmp_path / "sft.jsonl.gz", 0, 0, 0)
    output = tmp_path / "out"
    points = [f"{tmp_path}/run@1.0", str(sft)]
    assert main(["compare", *points, "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "100 prompts in common; A's responses are 3.000 [3.000, 3.000] tokens longer" in text
    values = json.loads((output / "compare.json").read_text())
    reward, tone = values["judges"]["reward"], values["judges"]["judge:tone"]
    assert reward["difference"]["mean"] == pytest.approx(0.5)
    assert reward["difference"]["low"] == pytest.approx(0.5)
    assert tone["difference"]["mean"] == pytest.approx(-0.5)
    assert (tone["failed"], tone["difference"]["count"]) == (4, 99)
    assert reward["wins"] + reward["ties"] + reward["losses"] == 400
    assert reward["rate"]["mean"] == pytest.approx(reward["wins"] / 400)
    assert (output / "compare.md").read_text().strip() == text.strip()
    assert main(["compare", *points, "--judge", "tone", "--tie", "100"]) == 0
    assert "| judge:tone |" in (shown := capsys.readouterr().out) and "| reward" not in shown
    assert "0 / 396 / 0 (4 failed) | 50.0%" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{sft}", "{sft}", "{sft}"], "3 points given"),
        (["{sft}", "{tmp}"], "cannot be compared with each other"),
        (["{tmp}/run@0.5", "{sft}"], "no responses at 0.5"),
        (["{tmp}/none@0.5", "{sft}"], "no responses below"),
        (["{sft}", "{sft}", "--judge", "x"], "no judge 'x' in both; there are reward, score:vader"),
        (["{sft}", "{sft}", "--tie", "-1"], "--tie is -1"),
        (["{tmp}"], "is not a run"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, capsys, words, message):
    _responses(tmp_path / "run/front/responses/sft_1.jsonl.gz", 0, 0, 0)
    sft = _responses(tmp_path / "sft.jsonl.gz", 0, 0, 0)
    words = [word.format(sft=sft, tmp=tmp_path) for word in words]
    assert main(["compare", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def _run(path, gain):
    """A run whose front is reward = gain * sqrt(KL) at KL 0, 1, 4, 9."""
    (path / "iteration_01").mkdir(parents=True)
    (path / "front").mkdir()
    points = [
        {"base": "sft", "eta": root / 3, "reward": gain * root, "kl_to_sft": root**2}
        for root in range(4)
    ]
    text = "".join(json.dumps(point) + "\n" for point in points)
    (path / "front/points.jsonl").write_text(text)
    return path


def test_groups_of_runs(tmp_path, capsys):
    """Hypervolume of the steps at 1, 4, 9: gain * (1 * 3 + 2 * 5); differences over seeds."""
    warp = [_run(tmp_path / f"w{i}", gain) for i, gain in enumerate((1.0, 1.1, 1.2))]
    sft = [_run(tmp_path / f"s{i}", gain) for i, gain in enumerate((0.5, 0.6, 0.7))]
    words = [f"{name}={','.join(map(str, runs))}" for name, runs in (("sft", sft), ("warp", warp))]
    assert main(["compare", *words, "--output", str(tmp_path / "out")]) == 0
    values = json.loads((tmp_path / "out/compare.json").read_text())
    found = values["groups"]["warp"]["hypervolume"]
    assert (values["kl_limit"], values["reward_floor"]) == (9, 0)
    assert found["seeds"] == pytest.approx([13.0, 14.3, 15.6])
    assert found["to_first"]["mean"] == pytest.approx(0.5 * 13)
    assert found["to_first"]["low"] > 0
    at_four = values["groups"]["sft"]["kl 4"]
    assert at_four["mean"] == pytest.approx(1.2)
    assert at_four["high"] - at_four["mean"] == pytest.approx(0.2 * 4.302652729911275 / 3**0.5)
    assert "| - sft |" in capsys.readouterr().out
    assert (tmp_path / "out/fronts.png").read_bytes().startswith(b"\x89PNG")
    one = ["compare", str(warp[0]), str(sft[0]), "--output", str(tmp_path / "one")]
    assert main(one) == 0  # one seed each: no intervals
    assert "[" not in capsys.readouterr().out.split("- w0")[1].splitlines()[0]
    values = json.loads((tmp_path / "one/compare.json").read_text())
    assert values["groups"]["s0"]["hypervolume"]["low"] is None


def test_a_front_that_ends_early_hides_no_other(tmp_path, capsys):
    """The first group sets the range of KL; where another ends before, its reward is left out."""
    near = _run(tmp_path / "near", 1.0)
    points = near / "front/points.jsonl"
    points.write_text("".join(points.read_text().splitlines(keepends=True)[:-1]))
    whole = _run(tmp_path / "whole", 1.0)
    output = tmp_path / "out"
    assert main(["compare", str(whole), str(near), "--output", str(output)]) == 0
    values = json.loads((output / "compare.json").read_text())
    assert values["kl_limit"] == 9
    ended = values["groups"]["near"]
    assert ended["kl 6"]["mean"] is None and ended["kl 4"]["mean"] == pytest.approx(2.0)
    # up to KL 9 with the best reward so far: 1 from 1 to 4, then 2 from 4 to 9
    assert ended["hypervolume"]["mean"] == pytest.approx(1 * 3 + 2 * 5)
