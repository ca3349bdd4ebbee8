"""Exit codes of every command, so that Slurm scripts and cron jobs can tell outcomes apart."""

DONE = 0
"""The stage is finished and its completion record is on disk."""

FAILED = 1
"""Something broke that a rerun may or may not fix; the log says what."""

MISCONFIGURED = 2
"""The configuration or an input is wrong; nothing was started."""

IN_PROGRESS = 75
"""Stages are running or queued (sysexits' EX_TEMPFAIL: come back later)."""

STOPPED_RESUMABLE = 85
"""A member saved at a step because it was asked to (signal or time limit); run it again."""

REWARDS_FAILED = 86
"""Too many rewards failed; the member saved and stopped. Mend the server, run it again."""

KL_LIMIT = 87
"""The KL to SFT passed its hard limit; the member saved and stopped for good."""
