"""A study: its file, its runs by ``nemo-warp run``, and what its report says."""

import json
import sys

import pytest

from nemo_warp import exit_codes
from nemo_warp.cli import main
from nemo_warp.records import Completion, write_completion
from nemo_warp.study import start
from nemo_warp.study.load import load_study, runs_of
from nemo_warp.study.results import collect, curves_of, read_results, write_results
from nemo_warp.study.start import command, make, take_members

STUDY = """\
name: small
recipe: recipes/tiny
directory: {directory}
seeds: [1, 2]
overrides: [members=2]
variants:
  lerp: {{members_of: warp, overrides: ["merge.arguments=[--method,lerp]"]}}
  warp: {{overrides: [iterations=1], seeds: [1, 2, 3]}}
compare: [warp, lerp]
pictures:
  fronts: {{title: fronts, variants: {{warp: SLERP, lerp: LERP}}}}
  steps: {{title: steps, curves: [trajectory], x: step, variants: {{warp: members}}}}
  methods: {{title: methods, x: method, sweeps: {{ends: {{warp: 0, lerp: 1}}}}}}
  angles: {{title: angles, curves: [layers], x: layer, y: angle, variants: {{warp: members}}}}
"""


@pytest.fixture
def study(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.format(directory=tmp_path / "runs"))
    return file


def _finish(run, gain: float) -> None:
    """The records that a run of one iteration leaves, with reward = gain * sqrt(KL)."""
    members = [run.directory / f"iteration_01/member_{m:02d}" for m in (1, 2)]
    for member in members:
        member.mkdir(parents=True, exist_ok=True)
        records = [
            {"kind": "eval", "step": s, "reward": gain * s**0.5, "kl_to_sft": float(s)}
            for s in (0, 1, 4)
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (member / "metrics.jsonl").write_text(text)
        write_completion(member, Completion("member", "0" * 64, {}, {}, "code", {}))
    front = run.directory / "front"
    front.mkdir()
    points = [
        {"eta": eta, "reward": gain * 2 * eta, "kl_to_sft": 4 * eta**2, "length": 20.0,
         "num_prompts": 8}
        for eta in (0.0, 0.5, 1.0)
    ]  # fmt: skip
    (front / "points.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    (run.directory / "benchmarks").mkdir()
    scores = [{"eta": e, "scores": {"verses": {"bits_per_byte": 1.5 + e}}} for e in (0.0, 0.5)]
    (run.directory / "benchmarks/points.jsonl").write_text(
        "".join(json.dumps(point) + "\n" for point in scores)
    )
    _write_angles(run.directory, {"decoder.layers.0": 80.0, "embedding": 70.0 + run.seed})
    (run.directory / "report").mkdir()
    measures = {"final front, LITI from sft": [{**p, "self_bleu": 3.0} for p in points]}
    (run.directory / "report/measures.json").write_text(json.dumps(measures))
    write_completion(run.directory / "report", Completion("report", "0" * 64, {}, {}, "code", {}))


def _write_angles(run, angles: dict[str, float]) -> None:
    """A merge's report: two pairs of members per group, the angle on average."""
    file = run / "iteration_01/merge/report/report.json"
    file.parent.mkdir(parents=True)
    weights = {"angle": 2.0, "norm_ratio": 1.0}
    units = {
        name: {"depth": None if name == "embedding" else 0, "pairs": [
            {"task_vectors": {"angle": angle + apart, "norm_ratio": 1.1}, "weights": weights}
            for apart in (-5, 5)
        ]}
        for name, angle in angles.items()
    }  # fmt: skip
    units["unchanged"] = {"pairs": [{"task_vectors": {"angle": None, "norm_ratio": None},
                                     "weights": weights}]}  # fmt: skip
    file.write_text(json.dumps({"units": units}))


def test_runs_are_variants_times_seeds_and_wait_for_the_members_they_take(study, tmp_path):
    runs = runs_of(load_study(study))
    assert [run.name for run in runs] == [
        *("warp/seed_1", "warp/seed_2", "warp/seed_3"),
        *("lerp/seed_1", "lerp/seed_2"),
    ]
    assert command(runs[3])[1:5] == ["-m", "nemo_warp.cli", "run", "recipes/tiny"]
    assert command(runs[3])[5:] == [
        *("members=2", "merge.arguments=[--method,lerp]"),
        *(f"run_directory={tmp_path / 'runs/lerp/seed_1'}", "seed=1"),
    ]
    assert runs[3].members_from == tmp_path / "runs/warp/seed_1"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("members_of: warp", "members_of: wrap", "variants.lerp.members_of .* no variant 'wrap'"),
        ("compare: [warp", "compare: [wrap", "compare .* no variant 'wrap'; there are lerp, warp"),
        ("seeds: [1, 2]\n", "seeds: [one]\n", "seeds"),
        ("curves: [trajectory]", "curves: [path]", "pictures.steps.curves"),
        ("recipe: recipes/tiny", "recepi: recipes/tiny", "recepi"),
        ("{warp: 0, lerp: 1}", "{warp: 0, lurp: 1}", "pictures.methods.sweeps.ends .* 'lurp'"),
        ("{warp: 0, lerp: 1}", "{warp: near}", "pictures.methods.sweeps.ends.warp.* a number"),
        ("y: angle, variants: {warp: members}", "y: angle", "pictures.angles .* shows nothing"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence(study, capsys, old, new, message):
    study.write_text(study.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_study(study)
    assert main(["study", str(study), "--dry-run"]) == exit_codes.MISCONFIGURED
    assert capsys.readouterr().err.startswith("error: ")


def test_members_are_taken_whole_or_not_at_all(study, tmp_path):
    warp, _, _, lerp, _ = runs_of(load_study(study))
    assert not take_members(warp.directory, lerp.directory)
    _finish(warp, 0.1)
    assert take_members(warp.directory, lerp.directory)
    taken = lerp.directory / "iteration_01/member_02"
    assert (taken / "metrics.jsonl").samefile(
        warp.directory / "iteration_01/member_02/metrics.jsonl"
    )
    assert sorted(p.name for p in lerp.directory.iterdir()) == ["iteration_01"]
    assert take_members(warp.directory, lerp.directory)  # again: what is there stays


def test_a_failed_run_keeps_no_other_from_being_made(study, monkeypatch, tmp_path):
    """The command is the fault that is injected; real runs are made by the slow tests."""
    runs = runs_of(load_study(study), ["warp"])
    script = tmp_path / "run.py"
    script.write_text("import sys; print(sys.argv[1]); sys.exit('seed=2' in sys.argv)")
    monkeypatch.setattr(start, "command", lambda run: [sys.executable, str(script), *run.overrides])
    _finish(runs[0], 0.1)
    assert make(runs) == {"warp/seed_2": 1, "warp/seed_3": 0}
    assert "members=2" in (runs[2].directory / start.LOG).read_text()


def test_report_compares_and_draws_from_results_alone(study, tmp_path, capsys):
    gains = {"warp": 0.2, "lerp": 0.1}
    runs = runs_of(load_study(study))
    for run in runs:
        _finish(run, gains[run.variant] + 0.01 * run.seed)
    output = tmp_path / "out"
    assert main(["study", str(study), "--report", str(output)]) == exit_codes.DONE
    names = {path.name for path in output.iterdir()}
    assert names == {
        *("compare.md", "compare.json", "pictures.md", "results.json"),
        *(
            f"{name}.{suffix}"
            for name in ("fronts", "steps", "methods", "angles")
            for suffix in ("png", "svg")
        ),
    }
    compared = json.loads((output / "compare.json").read_text())["groups"]
    at_one = compared["warp"]["kl 1"]
    # reward = gain * sqrt(KL), measured at KL 0, 1 and 4: exact at 1
    assert at_one["mean"] == pytest.approx(0.2 + 0.01 * 2) and at_one["count"] == 3
    assert compared["lerp"]["kl 1"]["to_first"]["mean"] == pytest.approx(0.115 - 0.22)
    # at KL 1 of the picture's table: seeds 1 to 3 of SLERP, and of LERP 1 and 2 in pairs
    table = (output / "pictures.md").read_text().splitlines()
    at = [cell.strip() for cell in table[4].split("|")].index("1")
    means = [row.split("|")[at].split()[0] for row in table[6:9]]
    assert means == ["0.220", "0.115", "-0.100"]
    assert "[-0.100, -0.100] *" in table[8]
    # the ends of both variants' fronts (eta = 1), of the seeds that both have: gain * 2
    at = table.index("## methods")
    places = [float(cell) for cell in table[at + 2].split("|")[2:-1]]
    means = [float(cell.split()[0]) for cell in table[at + 4].split("|")[2:-1]]
    # 2 * (0.2 + 0.01 * seed) at 0, and 0.1 in place of 0.2 at 1
    assert places[0] == 0 and means == pytest.approx([0.43 - 0.2 * place for place in places])

    again = tmp_path / "again"
    results = output / "results.json"
    assert main(["study", str(study), "--report", str(again), "--results", str(results)]) == 0
    for name in names - {"results.json"}:
        assert (again / name).read_bytes() == (output / name).read_bytes(), name


def test_results_survive_the_file_and_tell_curves_apart(study, tmp_path):
    runs = runs_of(load_study(study), ["warp"])
    with pytest.raises(ValueError, match="no run of the study is done"):
        collect(runs)
    for run in runs:
        _finish(run, 0.1)
    results = collect(runs)
    write_results(results, tmp_path / "results.json")
    assert read_results(tmp_path / "results.json") == results
    assert {result["code_version"] for result in results} == {"code"}
    trajectories = curves_of(results, "warp", "trajectory", 1)
    assert {seed: len(curves) for seed, curves in trajectories.items()} == {1: 2, 2: 2, 3: 2}
    assert curves_of(results, "warp", "final")[1][0].column("length") == [20.0] * 3
    assert curves_of(results, "warp", "anchor") == {}
    scored = curves_of(results, "warp", "benchmarks")[1][0]
    assert scored.column("verses: bits_per_byte") == [1.5, 2.0]
    assert scored.column("kl_to_sft") == [0.0, 1.0], "of the final front"
    assert curves_of(results, "warp", "final")[1][0].column("self_bleu") == [3.0] * 3
    angles = curves_of(results, "warp", "layers", 1)[2][0]
    assert angles.column("angle") == [72.0, 80.0], "by depth, the mean over pairs"
    assert angles.column("weights_angle") == [2.0, 2.0]
