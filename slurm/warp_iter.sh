#!/usr/bin/env bash
# One round of a recipe; submits the stages that are missing and itself for the next round.
#   sbatch --account=... --partition=... slurm/warp_iter.sh RECIPE [key=value ...]
# Start it in the checkout, or set NEMO_WARP_ROOT to it. Repeating it does nothing twice.
#SBATCH --job-name=warp-driver
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=00:15:00
#SBATCH --open-mode=append
set -euo pipefail
export PYTHONPATH="${NEMO_WARP_ROOT:-$PWD}${PYTHONPATH:+:$PYTHONPATH}"
status=0
"${NEMO_WARP_PYTHON:-python3}" -m nemo_warp.cli run "$@" launcher.kind=slurm || status=$?
# 75: stages are queued and the next round's driver with them, so this job has done its part.
[[ $status -eq 75 ]] && exit 0
exit "$status"
