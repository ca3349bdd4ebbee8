"""What a run's page says in words and tables, read from its records."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nemo_warp.records import RecordError
from nemo_warp.reporting.page.measures import Measures, partings
from nemo_warp.reporting.run import Curve

_MAX_TEXTS, _MAX_COLUMNS = 6, 5


def title(run: Path) -> str:
    """The recipe's name, or the directory's."""
    return f"{_recipe(run).get('name') or run.resolve().name}: a WARP run"


def caption(run: Path) -> str:
    """The recipe's name and rewards, for pictures."""
    return f"{_recipe(run).get('name') or run.resolve().name}, trained on {_rewards(run)}"


def subtitle(run: Path) -> str:
    """Iterations, members and rewards in a line."""
    recipe = _recipe(run)
    return (
        f"{recipe.get('iterations', '?')} iterations of {recipe.get('members', '?')} members; "
        f"trained on {_rewards(run)}; further up and to the left is better"
    )


def _rewards(run: Path) -> str:
    return ", ".join(_recipe(run).get("rewards") or {}) or "unknown rewards"


def layers(run: Path) -> dict[int, dict[str, dict[str, float]]]:
    """What the merges found between the members, layer by layer (figure 11).

    Returns:
        Iteration -> group of tensors, by depth -> ``angle`` (degrees) and ``norm_ratio`` of task
        vectors, and the same with ``weights_`` before it of full weights: means over pairs.
    """
    found = {}
    for path in sorted(run.glob("iteration_*/merge/report/report.json")):
        # JSON is stored with sorted keys: layer 10 would come before layer 2.
        units = dict(sorted(_json(path).get("units", {}).items(), key=_depth))
        of_units = {name: _of_pairs(unit.get("pairs", [])) for name, unit in units.items()}
        iteration = int(path.parts[-4].removeprefix("iteration_"))
        found[iteration] = {name: values for name, values in of_units.items() if values}
    return {iteration: values for iteration, values in found.items() if values}


def _of_pairs(pairs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over pairs of members; nothing of a group that a member did not change."""
    means = {}
    for kind, prefix in (("task_vectors", ""), ("weights", "weights_")):
        known = [pair[kind] for pair in pairs if pair[kind]["angle"] is not None]
        for name in ("angle", "norm_ratio") if known else ():
            means[prefix + name] = sum(pair[name] for pair in known) / len(known)
    return means if "angle" in means else {}


def published(run: Path) -> list[str]:
    """Which policy of the front was published for a budget of KL, if one was."""
    found = _json(run / "final/completion.json").get("details", {}).get("chosen")
    if not found:
        return []
    point = found["point"]
    judges = [f"{n} {v:.3f}" for n, v in (point.get("judges") or {}).items() if v is not None]
    return [
        f"Published for a budget of {found['budget']:g} nats (tolerance {found['tolerance']:g}): "
        f"kappa {found['kappa']:g}, measured KL {found['kl']:.2f}, reward "
        + ", ".join([f"{point['reward']:.3f}", *judges])
    ]


def judge_lines(curves: Sequence[Curve]) -> list[str]:
    """For each front and judge: whether the judge follows the reward, and until where."""
    lines = []
    for curve in curves:
        if curve.kind not in ("front", "final"):
            continue
        for judge, found in partings(curve).items():
            if found is None:
                lines.append(f"{curve.name}: {judge} follows the reward to the end.")
                continue
            lines.append(
                f"{curve.name}: {judge} stops following the reward at KL {found.kl:.1f}. From "
                f"there to KL {found.last_kl:.1f} the reward rises by {found.reward}, {judge} by "
                f"{found.judge} (95 % intervals, paired by prompt)."
            )
        lines += _failures(curve)
    return lines


def _failures(curve: Curve) -> list[str]:
    """Judges that failed, counted; their failures are in no mean."""
    failed: dict[str, int] = defaultdict(int)
    for point in curve.points:
        for judge, count in (point.get("failed_judges") or {}).items():
            failed[judge] += count
    return [f"{curve.name}: {judge} failed {n} times." for judge, n in failed.items() if n]


def alarms(curves: Sequence[Curve]) -> list[list[str]]:
    """Member, step and sentence of each alarm; one that lasts for several steps appears once."""
    rows, told = [], set()
    for curve in curves:
        for point in curve.points:
            for name, text in (point.get("alarms") or {}).items():
                if (curve.name, name) not in told:
                    told.add((curve.name, name))
                    rows.append([curve.name, str(point["step"]), text])
    return rows


def best_of_rows(
    curves: Sequence[Curve], measured: Mapping[str, Sequence[Measures | None]]
) -> tuple[list[str], list[list[str]]]:
    """A row per point with several generations: best of N, its KL, pass@k."""
    header = ["curve", "point", "N", "mean reward of the best", "KL to SFT, at most", "pass@N"]
    rows = []
    for curve in curves:
        for point, found in zip(curve.points, measured[curve.name], strict=True):
            if found is None or len(found.best_of) < 2:
                continue
            for best in found.best_of:
                passed = "" if best.passed is None else f"{best.passed:.3f}"
                place = f"{curve.position} {point[curve.position]:g}"
                rows.append([curve.name, place, str(best.n), f"{best.reward:.3f}",
                             f"{best.kl:.2f}", passed])  # fmt: skip
    return header, rows


def sample_texts(curves: Sequence[Curve]) -> tuple[list[str], list[list[str]]] | None:
    """The same prompts' responses along the last front, with their rewards; None without any."""
    fronts = [c for c in curves if c.position == "eta" and c.points[0].get("samples")]
    if not fronts:
        return None
    points = fronts[-1].points
    step = max(1, math.ceil(len(points) / _MAX_COLUMNS))
    # The last point always: it is the far end of the front.
    points = [*points[:-1:step][: _MAX_COLUMNS - 1], points[-1]]
    header = [
        "prompt",
        *(f"{fronts[-1].position} {p['eta']:g}, KL {p['kl_to_sft']:.1f}" for p in points),
    ]
    count = min(_MAX_TEXTS, *(len(point["samples"]) for point in points))
    rows = [
        [points[0]["samples"][i]["prompt"], *(_sample(p["samples"][i]) for p in points)]
        for i in range(count)
    ]
    return header, rows


def provenance(run: Path) -> list[list[str]]:
    """Seeds, code and package versions, reward fingerprints."""
    rows: dict[str, dict[str, None]] = defaultdict(dict)
    for path in sorted(run.glob("iteration_*/member_*/completion.json")):
        record = _json(path)
        name = f"{path.parts[-3]}/{path.parts[-2]}"
        rows["seeds"][f"{name}: {record.get('details', {}).get('seed')}"] = None
        for reward, digest in (record.get("details", {}).get("rewards") or {}).items():
            rows["rewards"][f"{reward}: {str(digest)[:12]}"] = None
        rows["code"][str(record.get("code_version"))] = None
        for package, version in record.get("versions", {}).items():
            rows["versions"][f"{package} {version}"] = None
    recipe = _recipe(run)
    rows["seed of the recipe"][str(recipe.get("seed"))] = None
    return [[name, "; ".join(values)] for name, values in rows.items()]


def hours(run: Path) -> tuple[list[str], list[list[str]]]:
    """Hours of attempts by kind of stage, and those of attempts that did not end well."""
    total: dict[str, float] = defaultdict(float)
    lost: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    for kind, seconds, code in _attempts(run):
        total[kind] += seconds / 3600
        count[kind] += 1
        # 85 is a stop that saved: its hours were not lost.
        if code not in (0, 85):
            lost[kind] += seconds / 3600
    rows = [[kind, str(count[kind]), f"{total[kind]:.2f}", f"{lost[kind]:.2f}"] for kind in total]
    return ["stages", "attempts", "hours", "of these in attempts that failed"], rows


def _attempts(run: Path) -> Iterator[tuple[str, float, Any]]:
    for path in sorted(run.glob("**/attempts/*/exit.json")):
        started, ended = _json(path.with_name("attempt.json")), _json(path)
        if "started" in started and "ended" in ended:
            stage = path.parts[-4]
            kind = stage.rpartition("_")[0] if stage[-1].isdigit() else stage
            yield kind, ended["ended"] - started["started"], ended.get("exit_code")


def _depth(unit: tuple[str, dict[str, Any]]) -> tuple[float, str]:
    """Order through the network: embedding, layers, final norm and output layer."""
    name, values = unit
    depth = values.get("depth")
    return (-1.0 if "embedding" in name else math.inf) if depth is None else depth, name


def _sample(sample: dict[str, Any]) -> str:
    reward = sample.get("reward")
    return f"{sample['response']}  ({'failed' if reward is None else format(reward, '.2f')})"


def _recipe(run: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load((run / "recipe.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RecordError(f"cannot read {path}: {error}") from error
