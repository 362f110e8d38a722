"""`caftune eval`: from rows to numbers, on the embedded base, resumable, and computed again without the model."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from caftune import evaluation
from caftune.cli import app
from caftune.demo.chemistry import completion, molecules, prompt
from caftune.demo.run import BASE
from caftune.evals.task import TaskError, means, until_stop
from caftune.evals.tasks import TASKS
from caftune.recipe import Recipe, RecipeError


@pytest.fixture
def values(tmp_path):
    pytest.importorskip("rdkit")
    rows = [
        {"id": m.name, "description": prompt(m), "smiles": completion(m)}
        for m in molecules(12, seed=5, substituents=(0, 2))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {"tasks": ["molecules"], "data": {"molecules": str(tmp_path / "rows.jsonl")}, "model": "base"}
    section |= {"max_new_tokens": 40, "batch_size": 4}
    return {"output": str(tmp_path / "run"), "model": {"name": str(BASE)}, "eval": section}


def evaluated(values, **changes):
    recipe = Recipe.model_validate({**values, "eval": {**values["eval"], **changes}})
    (result,) = evaluation.evaluate(recipe)
    return result


def lines_of(values):
    path = Path(values["output"], "eval", "base", "molecules.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_example_and_run_has_a_line_from_which_the_numbers_follow(values):
    result = evaluated(values, runs=2, temperature=0.8)
    lines = lines_of(values)
    assert [(line["run"], line["seed"]) for line in lines] == [(0, 42)] * 12 + [(1, 43)] * 12
    assert (result.examples, result.runs) == (12, 2)
    assert evaluation.summarise(TASKS["molecules"], "base", lines) == result
    assert result.measures["valid"] == [
        sum(line["scores"]["valid"] for line in lines[i : i + 12]) / 12 for i in (0, 12)
    ]


def test_answers_are_scored_against_their_own_examples(values):
    evaluated(values)
    task = TASKS["molecules"]
    rows = [json.loads(line) for line in Path(values["eval"]["data"]["molecules"]).read_text().splitlines()]
    for number, (row, line) in enumerate(zip(rows, lines_of(values), strict=True)):
        example = task.read(row, number)
        assert (line["id"], line["prompt"], line["reference"]) == (example.id, example.prompt, example.reference)
        assert line["scores"] == task.score(example, line["completion"])


def test_a_second_evaluation_asks_nothing_and_a_third_run_only_itself(values, monkeypatch):
    first = evaluated(values, runs=2, temperature=0.8)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "answer_backend", lambda *_, **__: pytest.fail("asked"))
        assert evaluated(values, runs=2, temperature=0.8) == first
    cache = Path(values["output"], "eval", "cache.jsonl")
    before = cache.read_text().count("\n")
    third = evaluated(values, runs=3, temperature=0.8)
    assert cache.read_text().count("\n") == before + 12
    assert third.measures["valid"][:2] == first.measures["valid"]


def test_results_hold_the_measures_of_each_run(values):
    result = evaluated(values)
    (row,) = [json.loads(line) for line in Path(values["output"], "results.jsonl").read_text().splitlines()]
    assert row["stage"] == "eval base molecules"
    assert row["measures"] == result.measures


def test_the_command_prints_a_table(values, tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    ran = CliRunner().invoke(app, ["eval", str(tmp_path / "recipe.yaml")])
    assert ran.exit_code == 0, ran.output
    assert "molecules: base (12 examples, 1 run)" in " ".join(ran.output.split())
    assert "valid" in ran.output


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tasks": []}, RecipeError, r"eval\.tasks must name tasks, got none\. Known: humaneval"),
        ({"tasks": ["molecule"]}, RecipeError, r"eval\.tasks must hold names of tasks, got 'molecule'\. .* molecules"),
        ({"data": {}}, RecipeError, r"eval\.data\.molecules must name a file or hub id"),
        ({"runs": 2}, RecipeError, "eval.runs must be 1 with eval.temperature 0"),
        (
            {"model": None},
            RecipeError,
            "run/model is missing. Run `caftune train` first, or name a model in eval.model",
        ),
        ({"columns": {"smiles": "nothing"}}, TaskError, r"rows\.jsonl: .*eval\.columns"),
        ({"max_new_tokens": 250}, RecipeError, "prompts of molecules .* leave no room for 250 tokens"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_the_model_is_asked(values, monkeypatch, changes, error, message):
    monkeypatch.setattr(evaluation, "answer_backend", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(error, match=message):
        evaluated(values, **changes)


def test_every_task_has_rows_of_its_own_and_takes_any_completion():
    for name, task in TASKS.items():
        if name in ("humaneval", "mbpp"):
            continue  # they run what was written: see test_code_tasks.py
        examples = [task.read(row, number) for number, row in enumerate(task.rows)]
        assert len({example.id for example in examples}) == len(examples) >= 3
        scores = [task.score(example, text) for example in examples for text in ("", "\x00 ]]{", "a" * 500)]
        assert task.primary in task.combine(scores), name


def test_means_are_over_those_that_have_the_measure():
    assert means([{"a": 1.0, "b": 0.5}, {"a": 0.0}]) == {"a": 0.5, "b": 0.5}


def test_an_answer_ends_where_the_first_stop_text_begins():
    assert until_stop("one\n\nQ: two###", ["###", "\n\nQ:"]) == "one"
    assert until_stop("one", ["###"]) == "one"
