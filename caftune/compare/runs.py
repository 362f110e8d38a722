"""One arm and seed of a comparison, as its run folder holds it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caftune.compare.verdict import BASE
from caftune.pipeline.folder import RunFolder
from caftune.pipeline.schema import Recipe


def seeds_of(recipe: Recipe) -> list[int]:
    """The seeds of a comparison."""
    return list(range(recipe.seed, recipe.seed + recipe.compare.seeds))


def run_folder(recipe: Recipe, arm: str, seed: int) -> Path:
    """The folder of one run."""
    return Path(recipe.output, "compare", arm, str(seed))


@dataclass(frozen=True)
class ComparedRun:
    """What one arm and seed left behind."""

    trained: dict[str, Any]  # its line of stage `train`
    answers: dict[str, list[dict[str, Any]]]  # by task: the lines of TASK.jsonl
    concepts: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "ComparedRun":
        """The run in `folder`, which is done."""
        results = lines_of(folder / "results.jsonl")
        trained = next(row for row in results if row["stage"] == "train")
        done = next(row for row in results if row["stage"] == "compare")
        answers = {task: lines_of(folder / "eval" / "model" / f"{task}.jsonl") for task in done["tasks"]}
        return cls(trained, answers, lines_of(folder / "concepts.jsonl"))

    @property
    def diverged(self) -> int | None:
        """The first step without a finite loss, where training diverged and there is no model; else None."""
        return self.trained.get("diverged")

    @property
    def log(self) -> list[dict[str, Any]]:
        """The entries of its training."""
        return self.trained["log"]


def lines_of(path: Path) -> list[dict[str, Any]]:
    """What a JSONL file holds; nothing where there is none."""
    if not path.is_file():
        return []
    # not splitlines: JSON leaves some characters as they are that it takes for the end of a line
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def ids_of(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The examples of a TASK.jsonl, in its order."""
    return list(dict.fromkeys(line["id"] for line in lines))


def base_folder(recipe: Recipe) -> Path:
    """The folder of the base's answers."""
    return Path(recipe.output, "compare", BASE)


def base_is_done(recipe: Recipe) -> bool:
    """Whether the base was asked and studied."""
    return RunFolder(base_folder(recipe)).is_done("compare")


def run_is_done(recipe: Recipe, arm: str, seed: int) -> bool:
    """Whether a run is trained, asked and studied."""
    return RunFolder(run_folder(recipe, arm, seed)).is_done("compare")
