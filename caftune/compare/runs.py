"""The run folders of a comparison, output/compare/ARM/SEED, and what is in them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caftune.compare.summary import EvaluatedTask
from caftune.evals.task import answers_file
from caftune.evals.tasks import TASKS


@dataclass(frozen=True)
class ComparedRun:
    """The results of one arm with one seed, or of the base."""

    trained: dict[str, Any]  # its line of stage `train`; empty for the base
    answers: dict[str, list[dict[str, Any]]]  # by task: the lines of TASK.jsonl; empty for a diverged run
    concepts: list[dict[str, Any]]
    evaluated: dict[str, dict[str, Any]] = field(default_factory=dict)  # by task: the line of its evaluation

    @classmethod
    def read(cls, folder: Path, model: str = "model") -> "ComparedRun":
        """The finished run in `folder`, with the answers of its evaluated model `model`."""
        stages = {row["stage"]: row for row in lines_of(folder / "results.jsonl")}
        tasks = stages["compare"]["tasks"]
        answers = {task: lines_of(folder / "eval" / model / answers_file(task)) for task in tasks}
        evaluated = {task: stages.get(f"eval {model} {task}", {}) for task in tasks}
        return cls(stages.get("train", {}), answers, lines_of(folder / "concepts.jsonl"), evaluated)

    @property
    def log(self) -> list[dict[str, Any]]:
        """The entries of its training."""
        return self.trained["log"]


def evaluated_task(name: str, examples: int, harness: Mapping[str, Any] | None) -> EvaluatedTask:
    """The task `name`, one of ours or, as recorded with its results, of lm-evaluation-harness."""
    if name in TASKS:
        return EvaluatedTask(name, TASKS[name].primary, examples, sorted(TASKS[name].lower_is_better))
    about = harness or {"primary": "score", "lower_is_better": []}  # where every run diverged, nothing is known of it
    return EvaluatedTask(name, about["primary"], examples, about["lower_is_better"])


def run_is_done(folder: Path) -> bool:
    """Whether a run, or the base, is trained, evaluated and studied."""
    stages = {row["stage"] for row in lines_of(folder / "results.jsonl")}
    return "compare" in stages and (folder / "compare" / "recipe.yaml").is_file()


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; an empty list where there is no file."""
    if not path.is_file():
        return []
    # splitlines would also split at characters that JSON leaves unescaped
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def ids_of(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """The examples of a TASK.jsonl, in its order."""
    return list(dict.fromkeys(line["id"] for line in lines))
