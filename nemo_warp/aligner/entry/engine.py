"""TensorRT-LLM's engine: what it is built for, and where. No NeMo, no TensorRT-LLM."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any


def engine_batch_size(rollout: Any, evaluation: Any) -> int:
    """Sequences that TensorRT-LLM's engine must take together.

    Raises:
        ValueError: fewer than rollouts or evaluations generate at a time.
    """
    # One engine serves both, and its batch size is fixed when it is built.
    largest = max(rollout["micro_batch_size"], evaluation["micro_batch_size"])
    given = rollout["trt_llm"]["batch_size"]
    if given is not None and given < largest:
        raise ValueError(
            f"rollout.trt_llm.batch_size is {given}, but up to {largest} sequences are generated "
            "together (rollout.micro_batch_size, evaluation.micro_batch_size)"
        )
    return given or largest


def engine_directory(plain: dict[str, Any]) -> str:
    """Where TensorRT-LLM builds its engine: of this member, on this node's own disk.

    Upstream's default is one directory for all: of two members on a node, or of the member before
    on the same one, each would load what the other has just written.
    """
    # A member's configuration has a section `run`; an evaluation's directory is at the top.
    own = plain["run"]["directory"] if "run" in plain else plain["directory"]
    digest = hashlib.sha256(str(own).encode()).hexdigest()[:12]
    # The job's id as well: a requeued attempt must not load the weights that an earlier one left.
    job = os.environ.get("SLURM_JOB_ID", "local")
    # Upstream's default is /tmp/trt_llm_model for all (NeMo-Aligner 0.7, utils/trt_llm.py l.69).
    return str(Path(tempfile.gettempdir()) / f"nemo-warp-engine-{job}-{digest}")
