"""The run folder of a single `caftune train` or `caftune eval`, read as a comparison of one arm."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from caftune.compare.runs import evaluated_task, lines_of
from caftune.compare.summary import (
    BASE,
    BASELINE,
    HELD_OUT,
    TREATMENT,
    ComparedExample,
    Comparison,
    Costs,
    EvaluatedTask,
    MarkedText,
    Measured,
    ScoredText,
)
from caftune.evals.task import answers_file
from caftune.evals.tasks import TASKS
from caftune.files import read_json

EXAMPLES = 4  # of each task


def read_single_run(folder: Path) -> Comparison:
    """The results of `folder`, which has a results.jsonl."""
    stages = {row["stage"]: row for row in lines_of(folder / "results.jsonl")}
    stage = next((folder / name for name in ("train", "pretrain", "labels") if (folder / name).is_dir()), folder)
    kept = stage / "recipe.yaml"
    recipe = yaml.safe_load(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    provenance = read_json(stage / "provenance.json")
    trained = stages.get("train", {})
    arm = stages.get("compare", {}).get("arm") or (TREATMENT if recipe.get("loss", {}).get("weight") else BASELINE)
    evaluated = [
        row for name, row in stages.items() if name.startswith("eval ") and (row["task"] in TASKS or row.get("harness"))
    ]
    tasks = [
        evaluated_task(row["task"], row["examples"], row.get("harness"))
        for row in {row["task"]: row for row in evaluated}.values()
    ]
    measures = [
        Measured.of(row["task"], name, _model_name(row["model"], arm), values)
        for row in evaluated
        for name, values in row["measures"].items()
    ]
    loss = trained.get("metrics", {}).get("loss")
    if loss is not None:
        measures.append(Measured.of(HELD_OUT, "loss", arm, [loss]))
    costs, plan = trained.get("costs"), trained.get("plan")
    known = [field.name for field in fields(Costs)]
    return Comparison(
        title=folder.resolve().name,
        arms=[arm] if trained else [],
        seeds=[],
        verdict="One arm, so nothing is compared. `caftune compare` makes several.",
        recipe=recipe,
        tasks=tasks,
        measures=measures,
        costs={arm: Costs(**{name: [costs[name]] for name in known if name in costs})} if costs else {},
        plans={arm: {name: [value] for name, value in plan.items()}} if plan else {},
        device=provenance.get("device", "an unknown device"),
        logs={arm: [trained["log"]]} if trained else {},
        examples=[example for task in tasks for example in _examples(folder, task, arm)],
        quality=_quality(folder, stages),
        provenance=provenance,
    )


def _model_name(model: str, arm: str) -> str:
    """The name of an evaluated model in the report: that of the run folder is the arm."""
    return arm if model == "model" else model


def _examples(folder: Path, task: EvaluatedTask, arm: str) -> list[ComparedExample]:
    """The first examples of a task, with the answers of all models that were evaluated on them."""
    files = sorted(
        folder.glob(f"eval/*/{answers_file(task.name)}"), key=lambda file: (file.parent.name != BASE, file.parent.name)
    )
    shown: dict[str, ComparedExample] = {}
    for file in files:
        lines = [line for line in lines_of(file) if line["run"] == 0]
        if not any(task.primary in line["scores"] for line in lines):
            continue  # a measure of whole runs
        for line in lines[:EXAMPLES]:
            reference = line["reference"] if isinstance(line["reference"], str) else json.dumps(line["reference"])
            new = ComparedExample(task.name, line["id"], line["prompt"], MarkedText(reference, []), {})
            score = line["scores"].get(task.primary, 0.0)
            answers = shown.setdefault(line["id"], new).answers
            answers[_model_name(file.parent.name, arm)] = ScoredText(line["completion"], [], score)
    return list(shown.values())


def _quality(folder: Path, stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """How good the heads are: as measured last, else as stage 1 recorded it."""
    found = read_json(folder / "heads" / "quality.json") or read_json(folder / "quality.json")
    return found or stages.get("pretrain-heads", {}).get("quality")
