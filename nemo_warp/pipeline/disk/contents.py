"""Hashes of what stages read: pinned inputs, and what earlier stages published."""

from __future__ import annotations

from typing import Any, Protocol

from nemo_warp.pipeline.recipe.load import Recipe
from nemo_warp.pipeline.recipe.plan import PICK
from nemo_warp.records import Completion, RecordError, config_hash, read_completion


class Contents(Protocol):
    """Answers for the contents of files without reading them."""

    def pinned(self, name: str) -> str:
        """Fingerprint of an input of the run: ``sft``, ``prompts.train``, ``reward vader`` ..."""
        ...

    def published(self, stage: str, file: str) -> str:
        """Hash of an artifact of a stage that is done."""
        ...

    def all_published(self, stage: str) -> str:
        """One hash of all artifacts of a stage that is done."""
        ...

    def chosen(self) -> dict[str, Any] | None:
        """What the stage ``pick`` chose; None while nobody knows."""
        ...


class Unknown:
    """Of a run that has not begun: for `plan`."""

    def pinned(self, name: str) -> str:
        """Nothing is known yet."""
        return ""

    def published(self, stage: str, file: str) -> str:
        """Nothing is known yet."""
        return ""

    def all_published(self, stage: str) -> str:
        """Nothing is known yet."""
        return ""

    def chosen(self) -> dict[str, Any] | None:
        """Nothing is known yet."""
        return None


class OnDisk:
    """From the run directory's records."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def pinned(self, name: str) -> str:
        """Fingerprint of an input, as it was when the run began."""
        return self._recipe.pinned[name]

    def published(self, stage: str, file: str) -> str:
        """Hash of an artifact; whether the file is still there is not asked.

        Raises:
            RecordError: the stage is not done, or its record does not mention the file.
        """
        entry = self.completion(stage).files.get(file)
        if entry is None:
            path = self._recipe.paths.stage(stage).completion
            raise RecordError(f"{path} does not mention {file}; remove the stage to make it again")
        return entry.sha256

    def all_published(self, stage: str) -> str:
        """One hash of all artifacts."""
        files = self.completion(stage).files
        return config_hash({name: entry.sha256 for name, entry in files.items()})

    def chosen(self) -> dict[str, Any] | None:
        """Kappa and its measured point, from the stage's record."""
        return self.completion(PICK).details["chosen"]

    def completion(self, stage: str) -> Completion:
        """The stage's completion record.

        Raises:
            RecordError: there is none.
        """
        directory = self._recipe.paths.stage(stage).directory
        completion = read_completion(directory)
        if completion is None:
            raise RecordError(f"{directory} is not finished: it has no completion record")
        return completion


class Expected(OnDisk):
    """With inputs of these fingerprints; what an unfinished stage will publish is not known."""

    def __init__(self, recipe: Recipe, pins: dict[str, str]) -> None:
        super().__init__(recipe)
        self._pins = pins

    def pinned(self, name: str) -> str:
        """Fingerprint of an input, as it is now."""
        return self._pins[name]

    def published(self, stage: str, file: str) -> str:
        """Hash of an artifact, or nothing while the stage is not done."""
        done = self._recipe.paths.stage(stage).completion.exists()
        return super().published(stage, file) if done else ""

    def all_published(self, stage: str) -> str:
        """One hash of all artifacts, or nothing while the stage is not done."""
        done = self._recipe.paths.stage(stage).completion.exists()
        return super().all_published(stage) if done else ""

    def chosen(self) -> dict[str, Any] | None:
        """What was chosen, or nothing while the stage is not done."""
        done = self._recipe.paths.stage(PICK).completion.exists()
        return super().chosen() if done else None


def refuse_twins(members: dict[str, Completion]) -> None:
    """Refuse members that have the same seed: they are copies, and merging copies has no effect.

    The order of prompts is not compared: with one prompt, or duplicates of one, every order is the
    same, and members of different seeds still sample different responses.

    Raises:
        RecordError: two members have the same seed.
    """
    seen: dict[Any, str] = {}
    for name, completion in members.items():
        seed = completion.details.get("seed")
        if seed is not None and seed in seen:
            raise RecordError(
                f"{name} and {seen[seed]} have the same seed ({seed}): merging copies of one run "
                "is no merge; give the members different seeds and remove one of them"
            )
        seen[seed] = name
