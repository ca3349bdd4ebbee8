"""The page of a run, in a real browser: nothing is fetched, nothing fails, all of it shows."""

import json
import re
import shutil
import subprocess

import pytest

from nemo_warp.cli import main
from nemo_warp.evidence.responses import write_responses

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",  # root has none
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
]


def _lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _sample(reward):
    return {"prompt": "Say <b>it</b>", "response": f"a text worth {reward}", "reward": reward}


@pytest.fixture
def run(tmp_path):
    """A finished run of one iteration, with a judge and two generations a prompt."""
    root = tmp_path / "run #1"
    for member in (1, 2):
        folder = root / f"iteration_01/member_0{member}"
        _lines(
            folder / "metrics.jsonl",
            [
                {"kind": kind, "step": s, "reward": s / 10, "kl_to_sft": s / 2, "entropy": 2.0}
                | {"alarms": {"entropy": f"entropy fell at {s}"} if s and kind == "eval" else {}}
                for s in (0, 5, 10)
                for kind in ("eval", "anchor")
            ],
        )
        (folder / "completion.json").write_text(
            json.dumps(
                {
                    "code_version": "0.1+gabc",
                    "versions": {"torch": "2.6"},
                    "details": {"seed": 40 + member, "rewards": {"vader": "ab" * 32}},
                }
            )
        )
        attempt = folder / "attempts/001"
        attempt.mkdir(parents=True)
        (attempt / "attempt.json").write_text(json.dumps({"started": 0}))
        (attempt / "exit.json").write_text(json.dumps({"ended": 7200, "exit_code": member - 1}))
    points = [
        {
            "base": "sft",
            "eta": e,
            "reward": e,
            "reward_stderr": 0.01,
            "kl_to_sft": 9 * e * e,
            "length": 20 + e,
            "judges": {"tone": min(e, 0.5)},
            "failed_judges": {"tone": 2 if e == 1 else 0},
            "samples": [_sample(e)],
        }
        for e in (0.0, 0.5, 1.0)
    ]
    _lines(root / "front/points.jsonl", points)
    for e in (0, 0.5, 1):
        write_responses(
            root / f"front/responses/sft_{e:g}.jsonl.gz",
            [
                {
                    "prompt": f"p{p}",
                    "prompt_index": p,
                    "generation": g,
                    "response": "the heart of the king and of the land" if g else "a b a b c d e f",
                    "reward": float(p % 4 < 3 * e if g else p % 3 < 2 * e),
                    "judges": {"tone": min(e, 0.5) + (p % 5) / 50},
                    "log_ratio": 9 * e * e,
                }
                for p in range(60)
                for g in range(2)
            ],
        )
    scores = [{"verses": {"bits_per_byte": 2.5 + e}, "choices": {"acc": 0.5, "acc_stderr": 0.02}}
              for e in (0, 1)]  # fmt: skip
    _lines(
        root / "benchmarks/points.jsonl",
        [{"base": "init", "eta": e, "scores": s} for e, s in zip((0, 1), scores, strict=True)],
    )
    chosen = {"budget": 4, "tolerance": 0.1, "kappa": 0.66, "kl": 3.95, "point": {"reward": 0.6}}
    (root / "final").mkdir()
    (root / "final/completion.json").write_text(json.dumps({"details": {"chosen": chosen}}))
    report = root / "iteration_01/merge/report/report.json"
    report.parent.mkdir(parents=True)
    pairs = [{"task_vectors": {"angle": 77.0, "norm_ratio": 1.1},
              "weights": {"angle": 1.0, "norm_ratio": 1.0}}]  # fmt: skip
    units = {"decoder.layers.0": {"depth": 0, "pairs": pairs}, "embedding": {"pairs": pairs}}
    report.write_text(json.dumps({"units": units}))
    (root / "recipe.yaml").write_text(
        "name: small\niterations: 1\nmembers: 2\nrewards: {vader: {}}"
    )
    return root


def test_page_in_a_browser(run, tmp_path, capsys):
    assert main(["report", str(run), "--output", str(tmp_path / "out")]) == 0
    page = tmp_path / "out/index.html"
    assert str(page) in capsys.readouterr().out
    text = page.read_text()
    own = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)  # plotly's script names URLs
    assert not re.search(r'(src|href)="(https?:)?//', own), "the page fetches nothing"
    assert "<script src" not in text
    for shown in (
        "small: a WARP run",
        "a text worth 0.5  (0.50)",
        "Say &lt;b&gt;it",
        "0.1+gabc",
        "iteration_01/member_02: 42",
        "<td>member</td><td>2</td><td>4.00</td><td>2.00</td>",
        "tone stops following the reward at KL 2.2. From there to KL 9.0 the reward rises by",
        "tone failed 2 times.",
        "<td>verses: bits_per_byte</td><td>2.5</td><td>3.5</td>",
        "<td>choices: acc</td><td>0.5 ± 0.02</td>",
        "budget of 4 nats (tolerance 0.1): kappa 0.66, measured KL 3.95, reward 0.600",
        "<td>iteration 1, member 2</td><td>5</td><td>entropy fell at 5</td>",
    ):
        assert shown in text, shown
    assert "entropy fell at 10" not in text, "an alarm is told once"
    points = json.loads((tmp_path / "out/measures.json").read_text())["final front, LITI from sft"]
    assert points[0]["best_of"][0] == {"n": 1, "reward": 0.0, "kl": 0.0, "passed": 0.0}
    first, second = points[2]["best_of"]  # of 60 prompts 45 and 40 are right, 55 either way
    assert (first["reward"], second["passed"]) == (pytest.approx(42.5 / 60), pytest.approx(55 / 60))
    assert second["kl"] == pytest.approx(9 + 0.6931 - 0.5, abs=1e-3)
    assert points[2]["distinct_1"] == pytest.approx(6 / (60 * 8))
    # To itself SFT is preferred half of the time; at 1, of 120 responses 85 have 1 for SFT's 0.
    assert points[0]["preferred"] == {"reward": 0.5, "tone": 0.5}
    assert points[2]["preferred"] == {"reward": pytest.approx((85 + 35 / 2) / 120), "tone": 1.0}
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    picture = tmp_path / "page.png"
    common = [
        CHROMIUM,
        *FLAGS,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1200,4200",
        "--virtual-time-budget=10000",
        "--enable-logging=stderr",
    ]
    found = subprocess.run(
        [*common, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert ":CONSOLE" not in found.stderr, "the page's scripts failed"
    for drawn in (
        "similarity of two generations (BLEU)",
        "tone",
        "final front, LITI from sft",
        "decoder.layers.0",
        "length (tokens)",
        "length (characters)",
        "distinct bigrams (share, 256 responses)",
        "best of N at 0.5",
        "preferred to SFT by tone (share)",
        "verses: bits_per_byte",
        "iteration 1, member 1 anchor",
    ):
        assert re.search(rf">{re.escape(drawn)}<", found.stdout), f"not drawn: {drawn}"
    subprocess.run(
        [*common, f"--screenshot={picture}", page.as_uri()],
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 50_000


def test_without_plotly_the_page_is_left_out(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["report", str(run), "--output", str(tmp_path / "out")]) == 0
    assert "plotly is not installed" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "curves.png",
        "curves.svg",
        "measures.json",
        "table.csv",
        "table.md",
    ]
