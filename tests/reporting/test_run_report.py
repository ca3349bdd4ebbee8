"""The KL-reward picture and its table, on a run whose numbers were chosen by hand."""

import json
from pathlib import Path

import pytest

from nemo_warp import exit_codes
from nemo_warp.records import RecordError
from nemo_warp.reporting import curves, member
from nemo_warp.reporting.run import read_run
from nemo_warp.reporting.write import write_report

PNG = b"\x89PNG\r\n\x1a\n"


def _write(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _point(eta: float, reward: float, kl: float, base: str = "init") -> dict:
    errors = {"reward_stderr": 0.012, "kl_to_sft_stderr": 0.25}
    sizes = {"length": 22.3, "ended_share": 0.28, "num_prompts": 512}
    return {"eta": eta, "base": base, "reward": reward, "kl_to_sft": kl, **errors, **sizes}


def _eval(step: int, reward: float, kl: float) -> dict:
    return {"kind": "eval", "step": step, "reward": reward, "kl_to_sft": kl, "length": 23.5}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    for iteration, (first, last) in {1: (0.0, 8.0), 2: (1.0, 12.0)}.items():
        for number in (1, 2):
            evals = [_eval(0, 0.05, first), _eval(20, 0.5 + number / 100, last)]
            _write(run / f"iteration_{iteration:02d}/member_{number:02d}/metrics.jsonl", evals)
        points = [_point(0, 0.1, first), _point(0.3, 0.3, first + 3), _point(1, 0.8, last + 4)]
        if iteration == 2:
            points.append(_point(1, 0.8, last + 4, "sft"))
        _write(run / f"iteration_{iteration:02d}/evaluation/points.jsonl", points)
    _write(run / "front/points.jsonl", [_point(0, 0.1, 0, "sft"), _point(1, 0.82, 16, "sft")])
    return run


def test_every_curve_is_found_in_order(run):
    assert [(curve.kind, curve.name, len(curve.points)) for curve in read_run(run)] == [
        ("trajectory", "iteration 1, member 1", 2),
        ("trajectory", "iteration 1, member 2", 2),
        ("trajectory", "iteration 2, member 1", 2),
        ("trajectory", "iteration 2, member 2", 2),
        ("front", "iteration 1, LITI from init", 3),
        ("front", "iteration 2, LITI from init", 3),
        ("front", "iteration 2, LITI from sft", 1),
        ("final", "final front, LITI from sft", 2),
    ]


def test_table_holds_the_measurements_and_rewards_at_equal_kl(run, tmp_path):
    write_report(run, tmp_path / "out")
    table = (tmp_path / "out/table.md").read_text()
    # The last evaluation of a trajectory; estimates with their errors.
    assert "| iteration 1, member 2 | step 20 | 0.520 | 8.00 | 23.5 |  |  |" in table
    front = "| eta 0.3 | 0.300 ± 0.012 | 4.00 ± 0.25 | 22.3 | 28% | 512 |"
    assert f"| iteration 2, LITI from init {front}" in table
    # By hand. Iteration 1 goes (0, 0.1), (3, 0.3), (12, 0.8): at KL 4 0.3 + 0.5 / 9 = 0.356.
    # Iteration 2 goes (1, 0.1), (4, 0.3), (16, 0.8): at KL 6 0.3 + 0.5 * 2 / 12 = 0.383.
    kls = "KL 2 | KL 4 | KL 6 | KL 8 | KL 10 | KL 12 | KL 14 | KL 16"
    assert f"| curve | {kls} |" in table
    first = "0.233 | 0.356 | 0.467 | 0.578 | 0.689 | 0.800 |  |  |"
    assert f"| iteration 1, LITI from init | {first}" in table
    second = "0.167 | 0.300 | 0.383 | 0.467 | 0.550 | 0.633 | 0.717 | 0.800 |"
    assert f"| iteration 2, LITI from init | {second}" in table
    final = "0.190 | 0.280 | 0.370 | 0.460 | 0.550 | 0.640 | 0.730 | 0.820 |"
    assert f"| final front, LITI from sft | {final}" in table


def test_csv_holds_every_measurement_unrounded(run, tmp_path):
    write_report(run, tmp_path / "out")
    lines = (tmp_path / "out/table.csv").read_text().splitlines()
    assert lines[0].startswith("curve,position,reward,reward_stderr,kl_to_sft,kl_to_sft_stderr")
    assert len(lines) == 1 + 4 * 2 + 3 + 3 + 1 + 2
    assert '"iteration 1, member 1",step 20,0.51,,8.0,,23.5,,' in lines
    assert '"final front, LITI from sft",eta 1,0.82,0.012,16,0.25,22.3,0.28,512' in lines


def test_pictures_show_the_data_and_are_reproducible(run, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for output in (first, second):
        assert curves.main([str(run), "--output", str(output)]) == exit_codes.DONE
    picture = (first / "curves.png").read_bytes()
    assert picture.startswith(PNG)
    assert picture == (second / "curves.png").read_bytes()
    points = run / "front/points.jsonl"
    points.write_text(points.read_text().replace("0.82", "0.62"))
    write_report(run, second)
    assert picture != (second / "curves.png").read_bytes()


def test_a_run_in_progress_is_drawn_as_far_as_it_is(run):
    for path in (run / "front", run / "iteration_02"):
        _remove(path)
    assert curves.main([str(run)]) == exit_codes.DONE
    assert (run / "front/curves.png").read_bytes().startswith(PNG)
    assert "iteration 2" not in (run / "front/table.md").read_text()


def test_member_picture(run, capsys):
    directory = run / "iteration_01/member_01"
    assert member.main([str(directory)]) == exit_codes.DONE
    picture = (directory / "curves.png").read_bytes()
    assert picture.startswith(PNG)
    assert capsys.readouterr().out.strip() == str(directory / "curves.png")
    member.draw_member(directory, directory / "again.png")
    assert (directory / "again.png").read_bytes() == picture


def test_what_is_not_a_run_is_refused(tmp_path, capsys):
    assert curves.main([str(tmp_path)]) == exit_codes.MISCONFIGURED
    assert "is not a run: it has no iteration_01" in capsys.readouterr().err
    assert curves.main([str(tmp_path / "absent")]) == exit_codes.MISCONFIGURED
    assert "No such file or directory" in capsys.readouterr().err
    (tmp_path / "iteration_01/member_01").mkdir(parents=True)
    assert curves.main([str(tmp_path)]) == exit_codes.MISCONFIGURED
    assert "nothing has been measured yet" in capsys.readouterr().err
    assert member.main([str(tmp_path)]) == exit_codes.MISCONFIGURED
    assert "metrics.jsonl: No such file" in capsys.readouterr().err


def test_a_malformed_point_stops_the_report(run):
    points = run / "iteration_01/evaluation/points.jsonl"
    points.write_text(points.read_text() + '{"eta": 2}\n')
    with pytest.raises(RecordError, match=r"points.jsonl, line 4: 'reward' is None"):
        read_run(run)


def _remove(directory: Path) -> None:
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    directory.rmdir()
