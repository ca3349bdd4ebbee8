"""How large the job is that this process is part of. No NeMo."""

from __future__ import annotations

import os


def job_size() -> tuple[int, int]:
    """Ranks and nodes of this job, as torchrun or Slurm say; (1, 1) without either."""
    # torchrun first: inside one srun task per node, SLURM_NTASKS counts nodes.
    ranks = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or "1"
    nodes = os.environ.get("GROUP_WORLD_SIZE") or os.environ.get("SLURM_NNODES") or "1"
    return int(ranks), int(nodes)
