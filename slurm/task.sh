#!/usr/bin/env bash
# One stage of a run as a Slurm job:  task.sh PYTHON RUN_DIRECTORY STAGE
# Submitted by the driver (slurm/warp_iter.sh) with every option on the command line.
# exec: the supervisor becomes the batch script, so that `--signal=B:USR1@...` reaches it.
set -euo pipefail
python=$1
shift
exec "$python" -m nemo_warp.pipeline.task "$@"
