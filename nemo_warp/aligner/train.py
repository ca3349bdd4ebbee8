"""Train one member: ``python -m nemo_warp.aligner.train --config FILE``, once per rank.

Resumes by itself when the member's directory holds a checkpoint. NeMo is imported only after the
configuration and every input have been checked.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
import time
from pathlib import Path
from typing import Any

from nemo_warp import exit_codes
from nemo_warp.config import CONF_DIRECTORY, identity_hash, load_config, require_complete, to_plain
from nemo_warp.records import RecordError, read_completion

_EPILOG = f"""\
run it under srun or torchrun, one process per device:
  torchrun --nproc-per-node 8 -m nemo_warp.aligner.train --config member_01/config.yaml
  ... --config member_01/config.yaml run.seed=7 optim.lr=2e-6

exit codes:
  {exit_codes.DONE}   step T is done, policy.nemo and completion.json are written
  {exit_codes.FAILED}   failed; run it again to resume from the newest checkpoint
  {exit_codes.MISCONFIGURED}   a wrong configuration or input; nothing was started
  {exit_codes.STOPPED_RESUMABLE}  saved after SIGUSR1, SIGTERM or near the time limit; run it again to resume
  {exit_codes.REWARDS_FAILED}  saved because too many rewards failed; mend the reward server, run it again
  {exit_codes.KL_LIMIT}  saved because KL to SFT passed evaluation.kl_limit
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns an exit code of `nemo_warp.exit_codes`."""
    started = time.time()
    parser = argparse.ArgumentParser(
        prog="python -m nemo_warp.aligner.train",
        description="Train one WARP member: REINFORCE with an EMA anchor.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, required=True, help="what differs from conf/member.yaml"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_args(arguments)
    try:
        config = load_config(CONF_DIRECTORY / "member.yaml", parsed.config, parsed.overrides)
        prompts = check_member(config)
        if _is_done(config):
            return exit_codes.DONE
        lock = _lock(Path(config.run.directory))
    except (ValueError, RecordError) as error:
        return _refuse(error, exit_codes.MISCONFIGURED)
    from nemo_warp.aligner.compat import activate

    activate()
    from nemo_warp.aligner.member import run_member
    from nemo_warp.rewards import RewardError

    try:
        return run_member(config, prompts, started)
    except ValueError as error:
        return _refuse(error, exit_codes.MISCONFIGURED)
    except (RecordError, RewardError, FloatingPointError) as error:
        return _refuse(error, exit_codes.FAILED)
    finally:
        os.close(lock)


def check_member(config: Any) -> dict[str, list[str]]:
    """Refuse what cannot work; returns the texts of the ``train`` and ``heldout`` prompts.

    Raises:
        ValueError: with one clear sentence.
    """
    from nemo_warp.aligner.prompts import read_prompts
    from nemo_warp.aligner.validation import max_prompt_tokens, validate_member

    require_complete(config)
    validate_member(config)
    max_prompt_tokens(config)
    texts = {
        name: read_prompts(Path(config.prompts[name]), config.prompts.key)
        for name in ("train", "heldout")
    }
    if len(texts["heldout"]) < config.evaluation.num_prompts:
        raise ValueError(
            f"{config.prompts.heldout} has {len(texts['heldout'])} prompts, but "
            f"evaluation.num_prompts is {config.evaluation.num_prompts}"
        )
    return texts


def _is_done(config: Any) -> bool:
    """Whether this very member is complete; refuses the directory of another one."""
    directory = Path(config.run.directory)
    wanted = identity_hash(to_plain(config))
    completion = read_completion(directory)
    found = completion.config_hash if completion else _recorded_hash(directory)
    if found not in (None, wanted):
        raise ValueError(
            f"{directory} belongs to another configuration (hash {found[:12]}, this one is "
            f"{wanted[:12]}); choose another run.directory, or remove it to start again"
        )
    if completion is not None and int(os.environ.get("RANK", "0")) == 0:
        print(f"{directory} is complete (step {completion.details['step']})")
    return completion is not None


def _recorded_hash(directory: Path) -> str | None:
    path = directory / "config.sha256"
    return path.read_text().strip() if path.is_file() else None


def _lock(directory: Path) -> int:
    """Hold the directory for this run (rank 0 holds it for all ranks of the job).

    Raises:
        ValueError: another run holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    if int(os.environ.get("RANK", "0")) != 0:
        return descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"another run is using {directory}; wait for it or choose another run.directory"
        ) from None
    return descriptor


def _refuse(error: Exception, code: int) -> int:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
