"""Which of the caller's environment variables reach Slurm's commands and the stages' programs.

A shell, an outer job or a cron table may hold variables that act as options: ``SQUEUE_STATES``
hides jobs, ``SBATCH_ARRAY_INX`` makes an array of the merge, ``SLURM_GPUS_PER_NODE`` contradicts a
step's own request, ``RANK`` or ``PMIX_RANK`` make a single program believe that it is one of many.
All options are given on the command line instead; of Slurm's variables only those are passed on
that say where the controller is. Settings of libraries (``NCCL_*``, ``UCX_*``, ``OMPI_MCA_btl``,
``PYTHONPATH``) are the operator's and stay.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

_SLURM = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SCANCEL_", "SCONTROL_", "SINFO_")
_WHERE = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER"})
"""Names the configuration and the controller."""
_ABOUT_THE_JOB = frozenset(
    {
        "SLURM_JOB_ID",
        "SLURM_JOB_END_TIME",
        "SLURM_ARRAY_JOB_ID",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_RESTART_COUNT",
    }
)
"""Facts for the programs; srun takes none of them but the first as an option."""
_RANKS = ("TORCHELASTIC_", "PMI_", "PMIX_", "OMPI_", "MV2_COMM_", "MPIEXEC_", "HYDRA_")
_LIBRARY_SETTINGS = ("PMIX_MCA_", "OMPI_MCA_", "OMPI_ALLOW_")
_OUTER_MPIRUN = ("OMPI_MCA_orte_", "OMPI_MCA_ess_")
"""mpirun writes its own address into variables that look like settings."""
_RANK_NAMES = frozenset(
    {
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "ROLE_RANK",
        "ROLE_WORLD_SIZE",
        "ROLE_NAME",
        "NODE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    }
)
_DEVICES = frozenset(
    {"CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"}
)


def for_slurm() -> dict[str, str]:
    """Environment of sbatch, squeue, scontrol and scancel, and of the jobs that sbatch submits.

    Slurm sets the devices of a job; those of the caller do not apply to it.
    """
    # sbatch exports this environment to the job (--export=ALL), where stale devices would win over
    # those that Slurm gives.
    kept = {k: v for k, v in os.environ.items() if not _is_order(k) and k not in _DEVICES}
    return {**kept, **_chosen(_WHERE)}


def for_steps() -> dict[str, str]:
    """Environment of a stage's programs, started here or by ``srun``."""
    kept = {k: v for k, v in os.environ.items() if not _is_order(k)}
    return {**kept, **_chosen(_WHERE | _ABOUT_THE_JOB)}


def for_srun() -> dict[str, str]:
    """Environment of ``srun``: a step's devices are those that it asks for, not all of the job."""
    # Slurm sets CUDA_VISIBLE_DEVICES for the batch script; srun hands its environment on to steps.
    return {k: v for k, v in for_steps().items() if k not in _DEVICES}


def _chosen(names: frozenset[str]) -> Mapping[str, str]:
    return {name: os.environ[name] for name in names if name in os.environ}


def _is_order(name: str) -> bool:
    # Asked first: OMPI_MCA_btl begins like OMPI_, which is for ranks.
    if name.startswith(_LIBRARY_SETTINGS):
        return name.startswith(_OUTER_MPIRUN)
    return name in _RANK_NAMES or name.startswith((*_SLURM, *_RANKS))
