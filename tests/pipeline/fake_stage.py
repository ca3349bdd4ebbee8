"""A stage program for fault injection: real files and records, no training.

    fake_stage.py KIND DIRECTORY RUN [rewards.N.endpoint=...]

What it writes is a function of the stage's configuration and of the contents it reads. Faults are
files ``RUN/faults/<stage name with dots>``: a line per attempt, each ``KIND@STEP`` with KIND one of
``exit-N``, ``kill``, ``kill-supervisor``, ``silent`` (exit code 0 without a record), ``hang``.
While there is a file ``RUN/faults/hold``, members wait after their second step until they are told
to stop: tests act on what runs, however slow the machine is.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nemo_warp.records import Completion, hash_file, write_completion

STEP_S = float(os.environ.get("FAKE_STEP_S", "0.02"))
stop = False


def ask_to_stop(*_):
    global stop
    stop = True


def digest(*parts) -> str:
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()


def fault(run: Path, directory: Path) -> tuple[str, int]:
    name = str(directory.relative_to(run)).replace("/", ".")
    path = run / "faults" / name
    lines = path.read_text().split() if path.exists() else []
    attempt = len(list((directory / "attempts").iterdir()))
    if attempt > len(lines) or lines[attempt - 1] == "none":
        return "", -1
    kind, _, step = lines[attempt - 1].partition("@")
    return kind, int(step or 0)


def supervisor(directory: Path) -> int:
    newest = sorted((directory / "attempts").iterdir())[-1]
    return json.loads((newest / "attempt.json").read_text())["pid"]


def suffer(kind: str, directory: Path) -> None:
    if kind.startswith("exit-"):
        print(f"error: made to exit with {kind}", flush=True)
        sys.exit(int(kind.removeprefix("exit-")))
    if kind == "silent":
        sys.exit(0)
    if kind == "kill-supervisor":
        os.kill(supervisor(directory), signal.SIGKILL)
        while not stop:
            time.sleep(0.1)
        sys.exit(128 + signal.SIGTERM)  # without saving, whether Slurm's SIGKILL is first or not
    if kind == "hang":
        while True:
            time.sleep(1)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def newest(directory: Path) -> int:
    found = [int(p.name[5:]) for p in (directory / "checkpoints").glob("step_????????")]
    return max(found, default=0)


def member(directory: Path, run: Path, config: dict) -> int:
    signal.signal(signal.SIGUSR1, ask_to_stop)
    signal.signal(signal.SIGTERM, ask_to_stop)
    steps, seed = config["run"]["total_steps"], config["run"]["seed"]
    kind, at = fault(run, directory)
    for step in range(newest(directory) + 1, steps + 1):
        while step > 2 and (run / "faults" / "hold").exists() and not stop:
            time.sleep(0.05)
        time.sleep(STEP_S)
        if kind and step > at:
            suffer(kind, directory)
        with (directory / "metrics.jsonl").open("a") as stream:
            record = {"step": step, "kind": "eval", "reward": step / steps, "kl_to_sft": step / 10}
            stream.write(json.dumps(record) + "\n")
        if step % config["run"]["save_interval"] == 0 or stop:
            (directory / "checkpoints" / f"step_{step:08d}").mkdir(parents=True, exist_ok=True)
        if stop and step < steps:
            return 85
    init = Path(config["init"]).read_text()
    salt = os.environ.get("FAKE_SALT", "")
    (directory / "policy.nemo").write_text(digest("member", init, seed, steps, salt))
    told = 0 if os.environ.get("FAKE_TWINS") else seed
    order = digest("order", told)
    details = {"step": steps, "total_steps": steps, "seed": told, "prompt_order_hash": order}
    complete(directory, ["policy.nemo"], "member", details)
    return 0


def merge(directory: Path, run: Path, config: dict) -> int:
    kind, _ = fault(run, directory)
    inputs = json.loads((directory / "stage.json").read_text())["inputs"]
    outputs = ["policy.nemo"] if directory.name == "final" else ["slerp.nemo", "init.nemo"]
    for number, name in enumerate(outputs):
        (directory / "building").mkdir(exist_ok=True)
        (directory / "building" / name).write_text(digest(name, sorted(inputs.items())))
        if kind and number == 0:
            suffer(kind, directory)
        time.sleep(STEP_S)
        (directory / "building" / name).rename(directory / name)
    return 0


def evaluation(directory: Path, run: Path, config: dict) -> int:
    kind, at = fault(run, directory)
    path = directory / "points.jsonl"
    done = len(path.read_text().splitlines()) if path.exists() else 0
    for number, eta in enumerate(config["etas"][done:], start=done):
        if kind and number >= at:
            suffer(kind, directory)
        time.sleep(STEP_S)
        with path.open("a") as stream:
            point = {"base": "init", "eta": eta, "reward": eta, "kl_to_sft": 10 * eta}
            point |= {f"judge_{judge['name']}": eta for judge in config.get("judges", [])}
            stream.write(json.dumps(point) + "\n")
    pick = config.get("pick", {}).get("kl")
    if pick is None:
        complete(directory, ["points.jsonl"], "evaluation", {})
        return 0
    chosen = {"kappa": pick / 10, "kl": pick, "budget": pick, "point": {"reward": pick / 10}}
    (directory / "chosen.json").write_text(json.dumps(chosen))
    complete(directory, ["points.jsonl", "chosen.json"], "evaluation", {"chosen": chosen})
    return 0


def report(directory: Path, run: Path, config: dict) -> int:
    inputs = json.loads((directory / "stage.json").read_text())["inputs"]
    for name in ("curves.png", "table.md"):
        (directory / name).write_text(digest(name, sorted(inputs.items())))
    return 0


def complete(directory: Path, names: list[str], kind: str, details: dict) -> None:
    config_hash = json.loads((directory / "stage.json").read_text())["config_hash"]
    files = {name: hash_file(directory / name) for name in names}
    write_completion(directory, Completion(kind, config_hash, files, details, "fake"))


if __name__ == "__main__":
    directory, run = Path(sys.argv[2]), Path(sys.argv[3])
    config = yaml.safe_load((directory / "config.yaml").read_text())
    kinds = {"member": member, "merge": merge, "evaluation": evaluation, "report": report}
    kinds["benchmarks"] = evaluation
    sys.exit(kinds[sys.argv[1]](directory, run, config))
