"""Options of a merge, validated in one place for the command line, recipes and notebooks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_warp.merge.eta_scale import EtaScale, largest_factor, parse_eta_scale
from nemo_warp.merge_arguments import (
    DTYPES,
    GRANULARITIES,
    METHODS,
    ROUNDINGS,
    SOURCES,
    STOCHASTIC,
    check_numbers,
    one_weight,
)

MAX_ETA = 2.0
# What decides bytes. Workers, memory, report and verification do not: they are not in the identity,
# so that a merge which was killed can be finished with others.
_RECORDED = (
    *("method", "granularity", "weight", "dtype"),
    *("rounding", "seed", "source", "vocab_size"),
)


__all__ = ["STOCHASTIC", "MergeOptions", "outputs_of"]


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """What is merged into what.

    Attributes:
        init: theta_init, whose format, layout, configuration and artifacts the outputs take.
        policies: theta_1 .. theta_M, in the order of slerpm.
        outputs: eta -> path; a path ending in ``.nemo`` is written as a tar, others as folders.
        method: ``slerp`` or ``karcher`` of task vectors, ``lerp``, or ``slerp-full`` of full
            weights.
        granularity: what shares one angle: ``layer``, ``tensor`` or ``model``.
        weight: lambda of the second of two policies, or a share per policy; None is uniform.
        eta_scale: times the eta of each layer, see `nemo_warp.merge.eta_scale`; None is 1.
        liti_towards: interpolate towards this checkpoint instead of the init.
        dtype: ``same`` as the init per tensor, ``float32`` or ``bfloat16``.
        rounding: ``nearest``, or seeded ``stochastic`` for bfloat16 outputs.
        source: ``weights``, or fp32 ``masters`` from training checkpoints where there are any.
        vocab_size: true rows of the embedding; None reads it from the configuration or tokenizer.
        allow_similar: accept policies whose task vectors have a cosine above 0.99.
        allow_different_configs: merge models that compute different things with equal weights.
        workers: processors to use per process; the result does not depend on it.
        memory_gb: gigabytes that layers may take in memory per process; None is most of what is
            free. A layer that is larger is read twice.
        report: directory for report.json, table and pictures; None writes none.
        verify: None, ``sample`` or ``full``.
        overwrite: replace existing outputs.
    """

    init: Path
    policies: tuple[Path, ...]
    outputs: dict[float, Path]
    method: str = "slerp"
    granularity: str = "layer"
    weight: float | tuple[float, ...] | None = None
    eta_scale: EtaScale | None = None
    liti_towards: Path | None = None
    dtype: str = "same"
    rounding: str = "nearest"
    seed: int = 0
    source: str = "weights"
    vocab_size: int | None = None
    allow_similar: bool = False
    allow_different_configs: bool = False
    workers: int = 1
    memory_gb: float | None = None
    report: Path | None = None
    verify: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        # The dataclass is frozen: this is its own __init__, still.
        object.__setattr__(self, "weight", one_weight(self.weight))
        object.__setattr__(self, "eta_scale", parse_eta_scale(self.eta_scale))
        _one_of("method", self.method, METHODS)
        _one_of("granularity", self.granularity, GRANULARITIES)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("rounding", self.rounding, ROUNDINGS)
        _one_of("source", self.source, SOURCES)
        _one_of("verify", self.verify, (None, "sample", "full"))
        if not self.policies:
            raise ValueError("no policy to merge; pass at least one with --policies")
        check_numbers(len(self.policies), self.weight, self.workers, self.vocab_size)
        if self.memory_gb is not None and not self.memory_gb > 0:
            raise ValueError(f"--memory-gb must be positive, found {self.memory_gb}")
        if self.eta_scale is not None and self.granularity == "model":
            raise ValueError("--eta-scale is per layer; it needs --granularity layer or tensor")
        for eta in self.outputs:
            furthest = eta * max(1.0, largest_factor(self.eta_scale))
            if not -MAX_ETA <= furthest <= MAX_ETA:
                raise ValueError(
                    f"--eta must lie in [{-MAX_ETA:g}, {MAX_ETA:g}], found {furthest:g}"
                )
        self._check_paths()

    def _check_paths(self) -> None:
        # Resolved: two names may be links to one place.
        outputs = [path.resolve() for path in self.outputs.values()]
        if len(set(outputs)) != len(outputs):
            raise ValueError("several etas share one output; put {eta} into --output")
        for source in self.inputs:
            for output in outputs:
                _keep_apart(source, output)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Init, policies, and the LITI anchor if there is one: the order of all coefficients."""
        anchor = () if self.liti_towards is None else (self.liti_towards,)
        return (self.init, *self.policies, *anchor)

    @property
    def etas(self) -> tuple[float, ...]:
        """The etas, ascending."""
        return tuple(sorted(self.outputs))

    def recorded(self) -> dict[str, Any]:
        """The options that decide the outputs' bytes, as plain values without any path."""
        values = {name: getattr(self, name) for name in _RECORDED}
        if self.eta_scale is not None:
            values["eta_scale"] = self.eta_scale
        return {**values, "etas": list(self.etas), "liti_towards": self.liti_towards is not None}


def outputs_of(template: str, etas: list[float]) -> dict[float, Path]:
    """Output path of each eta, from a template that holds ``{eta}`` when there are several.

    Raises:
        ValueError: several etas but one path, an unknown placeholder, or a repeated eta.
    """
    if len(set(etas)) != len(etas):
        raise ValueError(f"--eta repeats a value: {' '.join(f'{eta:g}' for eta in etas)}")
    if "{eta}" not in template and len(etas) > 1:
        raise ValueError(f"{len(etas)} etas but one output; put {{eta}} into --output {template}")
    return {eta: Path(template.replace("{eta}", f"{eta:g}")) for eta in etas}


def _keep_apart(source: Path, output: Path) -> None:
    """Refuse an output whose writing or replacing could touch an input.

    Raises:
        ValueError: says how they meet.
    """
    place = source.resolve()
    if place == output:
        raise ValueError(f"{source} is both input and output; a merge never overwrites an input")
    if output in place.parents:
        raise ValueError(f"the output {output} would take the place of the folder of {source}")
    if place in output.parents:
        raise ValueError(f"the output {output} would lie inside the input {source}")


def _one_of(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        listed = ", ".join(str(choice) for choice in choices)
        raise ValueError(f"unknown {name} {value!r}; choose one of {listed}")
