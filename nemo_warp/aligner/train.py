"""Train one member: ``python -m nemo_warp.aligner.train --config FILE``, once per rank.

Resumes by itself when the member's directory holds a checkpoint. NeMo is imported only after the
configuration and every input have been checked.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import cast

from nemo_warp import exit_codes
from nemo_warp.aligner.entry.frame import run_once
from nemo_warp.aligner.entry.validation import max_prompt_tokens, validate_member
from nemo_warp.config import CONF_DIRECTORY, check_resolved, load_config, require_complete
from nemo_warp.prompts import PromptLine, read_prompts
from nemo_warp.schema.member import Member

_EPILOG = f"""\
run it under srun or torchrun, one process per device:
  torchrun --nproc-per-node 8 -m nemo_warp.aligner.train --config member_01/config.yaml
  ... --config member_01/config.yaml run.seed=7 optim.lr=2e-6

exit codes:
  {exit_codes.DONE}   step T is done, policy.nemo and completion.json are written
  {exit_codes.FAILED}   failed; run it again to resume from the newest checkpoint
  {exit_codes.MISCONFIGURED}   a wrong configuration or input; nothing was started
  {exit_codes.STOPPED_RESUMABLE}  saved after SIGUSR1, SIGTERM or near the time limit; run it again
  {exit_codes.REWARDS_FAILED}  saved because too many rewards failed; mend the server, run it again
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

    def check() -> tuple[Member, Path, dict[str, list[PromptLine]]]:
        given = load_config(CONF_DIRECTORY / "member.yaml", parsed.config, parsed.overrides)
        config = cast("Member", given)
        prompts = check_member(config)
        return config, Path(config.run.directory), prompts

    def work(config: Member, prompts: dict[str, list[PromptLine]]) -> int:
        from nemo_warp.aligner.member.run import run_member

        return run_member(config, prompts, started)

    return run_once(check, work)


def check_member(config: Member) -> dict[str, list[PromptLine]]:
    """Refuse what cannot work; returns the ``train`` and ``heldout`` prompts.

    Raises:
        ValueError: with one clear sentence.
    """
    require_complete(config)
    check_resolved(config, CONF_DIRECTORY / "member.yaml", "the configuration")
    validate_member(config)
    max_prompt_tokens(config, config.init)
    texts = {
        name: read_prompts(Path(getattr(config.prompts, name)), config.prompts.key)
        for name in ("train", "heldout")
    }
    if len(texts["heldout"]) < config.evaluation.num_prompts:
        raise ValueError(
            f"{config.prompts.heldout} has {len(texts['heldout'])} prompts, but "
            f"evaluation.num_prompts is {config.evaluation.num_prompts}"
        )
    return texts


if __name__ == "__main__":
    sys.exit(main())
