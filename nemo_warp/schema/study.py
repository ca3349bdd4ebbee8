"""A study's file: variants of a recipe, their seeds, and the pictures they go into."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_warp.schema.key import REQUIRED, key


@dataclass
class Variant:
    """An entry of ``variants``: what differs from the recipe."""

    overrides: list[str] = key([], "key=value each, as for nemo-warp run")
    seeds: list[int] | None = key(None, "other seeds than the study's", low=0, nonempty=True)
    members_of: str | None = key(
        None, "take the finished members of this variant's first iteration instead of training",
        nonempty=True,
    )  # fmt: skip


@dataclass
class Picture:
    """An entry of ``pictures``: curves of some variants, each with a band over seeds."""

    title: str = key(REQUIRED, "what is shown", nonempty=True)
    variants: dict[str, str] = key({}, "variant -> its label", nonempty=True)
    sweeps: dict[str, dict[str, float]] = key(
        {}, "label -> variant -> its place on the horizontal axis: a line through the ends of the "
        "variants' curves, in place of or beside `variants`", nonempty=True,
    )  # fmt: skip
    curves: list[str] = key(
        ["final"], "which measurements; several are lines of their own", nonempty=True,
        choices=("final", "front", "trajectory", "anchor", "benchmarks", "layers"),
    )  # fmt: skip
    iteration: int | None = key(None, "of which iteration; null: the last, or all", low=1)
    x: str = key("kl_to_sft", "metric on the horizontal axis; step, eta and layer are metrics, "
                 "too; of sweeps its name")  # fmt: skip
    y: str = key("reward", "metric on the vertical axis")
    x_max: float | None = key(None, "end of the horizontal axis; null: of the longest curve")


@dataclass
class Study:
    """A study: variants of a recipe times seeds."""

    name: str = key(REQUIRED, "of the study", pattern=r"[\w.-]+", pattern_help="letters and digits")
    recipe: str = key(REQUIRED, "recipe that all variants change", nonempty=True)
    directory: str = key(REQUIRED, "gets VARIANT/seed_N for each run", nonempty=True)
    seeds: list[int] = key([1, 2, 3], "of every variant", low=0, nonempty=True)
    overrides: list[str] = key([], "of every variant")
    variants: dict[str, Variant] = key({}, "name -> what differs", nonempty=True)
    compare: list[str] | None = key(
        None, "variants in the table, the first is what the others are compared with; null: all",
        nonempty=True,
    )  # fmt: skip
    pictures: dict[str, Picture] = key({}, "file name without suffix -> picture")
