"""``conf/cluster/*.yaml``: a Slurm cluster."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_warp.schema.key import REQUIRED, key, section


@dataclass
class Container:
    """``container``: Pyxis."""

    image: str | None = key(None, ".sqsh file or registry reference; null is no container")
    mounts: list[str] = key([], "host:container[:ro]")
    options: list[str | int | float] = key(["--no-container-mount-home"], "further options of srun")


@dataclass
class Cluster:
    """A cluster."""

    account: str = key(REQUIRED, "sbatch --account", nonempty=True)
    partition: str = key(REQUIRED, "sbatch --partition", nonempty=True)
    driver_partition: str = key("${partition}", "of the small driver job", nonempty=True)
    gpus_per_node: int = key(8, "GPUs of a node", low=0)
    gpu_memory: float | None = key(
        None, "of one of them, that `plan` compares a member's estimate with", unit="GB", above=0
    )
    cpus_per_node: int | None = key(None, "null: not asked for", low=1)
    memory: str | int | None = key(None, "per node, e.g. 0 for all of it; null: not asked for")
    exclusive: bool = key(True, "whole nodes")
    gpu_option: str = key(
        "--gpus-per-node", "how GPUs are asked for",
        pattern=r"--gpus-per-node|--gres", pattern_help="--gpus-per-node or --gres",
    )  # fmt: skip
    gpu_type: str | None = key(
        None, "named where the site wants it, as in gpu:h100:8",
        pattern=r"[A-Za-z][\w.-]*", pattern_help="such as h100",
    )  # fmt: skip
    mpi: str = key("pmix", "srun --mpi= of steps with TensorRT-LLM, whose ranks are MPI's",
                   pattern=r"pmix\w*|pmi2", pattern_help="pmix, pmix_v4 or pmi2")  # fmt: skip
    signal_margin_s: int = key(
        900, "before the time limit, when members are told to save and stop", unit="s", low=0
    )
    container: Container = section(Container)
    python: str | None = key(
        "python3", "on the nodes, outside the container; null: the one that submits", nonempty=True
    )
    step_python: str | None = key(
        "${python}", "inside the steps (inside the container)", nonempty=True
    )
    max_array_size: int = key(
        1001, "MaxArraySize (scontrol show config): more members are several arrays", low=2
    )
    environment: dict[str, str] = key({}, "exported to every job")
    sbatch: list[str | int | float] = key([], "further options of every sbatch")
    srun: list[str | int | float] = key([], "further options of every srun")
