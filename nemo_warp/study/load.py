"""A study's file, checked, and the runs it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_warp import yaml_text
from nemo_warp.schema.check import check
from nemo_warp.schema.study import Picture, Study, Variant


@dataclass(frozen=True)
class Run:
    """One variant under one seed.

    Attributes:
        variant: its name in the study.
        seed: of the recipe (``seed``).
        directory: its run directory.
        recipe: what `nemo-warp run` is given.
        overrides: key=value each, the run directory and the seed among them.
        members_from: run directory whose members of the first iteration this one takes, or None.
    """

    variant: str
    seed: int
    directory: Path
    recipe: str
    overrides: tuple[str, ...]
    members_from: Path | None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.variant}/seed_{self.seed}"

    @property
    def is_done(self) -> bool:
        """Whether its last stage has ended well."""
        return (self.directory / "report" / "completion.json").exists()


def load_study(file: Path, directory: Path | None = None) -> Study:
    """A study's file.

    Args:
        file: YAML.
        directory: in place of the file's ``directory``.

    Raises:
        ValueError: one sentence that names the key.
    """
    if not file.is_file():
        raise ValueError(f"no study {file}; give a file such as recipes/study/tiny.yaml")
    values = check(yaml_text.load_file(file), Study, str(file), complete=True)
    values["variants"] = {n: Variant(**v) for n, v in values.get("variants", {}).items()}
    values["pictures"] = {n: Picture(**p) for n, p in values.get("pictures", {}).items()}
    study = Study(**values)
    if directory is not None:
        study.directory = str(directory)
    for name, picture in study.pictures.items():
        if not picture.variants and not picture.sweeps:
            raise ValueError(f"pictures.{name} in {file} shows nothing: give variants or sweeps")
    for where, wanted in _mentioned(study):
        for name in wanted:
            if name not in study.variants:
                known = ", ".join(study.variants)
                raise ValueError(f"{where} in {file}: no variant '{name}'; there are {known}")
    return study


def runs_of(study: Study, only: Sequence[str] = ()) -> list[Run]:
    """The runs, in the order in which they can be made.

    Args:
        study: from `load_study`.
        only: names of variants; empty: all.

    Raises:
        ValueError: a name that is no variant.
    """
    unknown = sorted(set(only) - study.variants.keys())
    if unknown:
        raise ValueError(f"no variant '{unknown[0]}'; there are {', '.join(study.variants)}")
    runs = [
        _run(study, name, seed)
        for name, variant in study.variants.items()
        if not only or name in only
        for seed in variant.seeds or study.seeds
    ]
    return sorted(runs, key=lambda run: run.members_from is not None)


def _run(study: Study, name: str, seed: int) -> Run:
    root, variant = Path(study.directory), study.variants[name]
    directory = root / name / f"seed_{seed}"
    places = (f"run_directory={directory}", f"seed={seed}")
    overrides = (*study.overrides, *variant.overrides, *places)
    source = variant.members_of
    members = None if source is None else root / source / f"seed_{seed}"
    return Run(name, seed, directory, study.recipe, overrides, members)


def _mentioned(study: Study) -> Iterator[tuple[str, Sequence[str]]]:
    yield "compare", study.compare or ()
    for name, variant in study.variants.items():
        yield f"variants.{name}.members_of", [variant.members_of] if variant.members_of else ()
    for name, picture in study.pictures.items():
        yield f"pictures.{name}.variants", tuple(picture.variants)
        for label, places in picture.sweeps.items():
            yield f"pictures.{name}.sweeps.{label}", tuple(places)
