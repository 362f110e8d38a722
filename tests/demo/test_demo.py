"""The embedded default, in small."""

import json

import pytest
from rich.console import Console

from caftune.demo import run
from caftune.demo.chemistry import completion, molecules, prompt
from caftune.demo.run import BASE, demo, demo_recipe
from caftune.errors import CaftuneError
from caftune.pipeline.evaluate import evaluate_model
from caftune.pipeline.recipe import load_recipe
from caftune.pipeline.schema import Recipe


def test_the_demo_runs_from_data_to_report(tmp_path, capsys):
    pytest.importorskip("rdkit")
    pytest.importorskip("jinja2")
    folder = tmp_path / "demo"
    found = demo(str(folder), train_rows=176, test_rows=8, prompts=16)
    said = " ".join(capsys.readouterr().out.split())
    assert found.verdict.startswith("One seed cannot tell CAFT from chance: exact_match on molecules is")
    assert found.verdict in said
    assert found.verdict.split(":")[0] in (folder / "report.html").read_text()
    for arm in ("ntp", "caft"):
        assert (folder / "compare" / arm / "42" / "model" / "model.safetensors").is_file()
    assert load_recipe(folder / "recipe.yaml") == demo_recipe(folder)


def test_without_the_extras_the_demo_asks_for_the_letter_and_says_how_to_get_a_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "find_spec", lambda _: None)
    recipe = demo_recipe(tmp_path)
    assert (recipe.eval.tasks, recipe.eval.columns, recipe.compare.concepts.kind) == (["exact_match"], {}, "words")
    run._write_report(Console(), tmp_path)
    assert "pip install 'caftune[report]'" in capsys.readouterr().out


def test_the_base_scores_as_its_provenance_says(tmp_path):
    stated = json.loads((BASE / "provenance.json").read_text())["greedy_decoding"]
    drawn = molecules(100, seed=2, substituents=(2, 4))
    rows = [json.dumps({"prompt": prompt(m), "completion": completion(m)}) for m in drawn]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    section = {"tasks": ["exact_match"], "data": {"exact_match": str(tmp_path / "rows.jsonl")}, "model": "base"}
    values = {"output": str(tmp_path), "model": {"name": str(BASE)}, "eval": {**section, "max_new_tokens": 100}}
    (result,) = evaluate_model(Recipe.model_validate(values))
    # two standard errors of 100 answers
    expected = stated["300 held-out names with 2 to 4 substituents"]["exact_match"]
    assert result.measures["exact_match"][0] == pytest.approx(expected, abs=0.08)


def test_the_demo_clears_only_its_own_folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "recipe.yaml").write_text("output: x")
    with pytest.raises(CaftuneError, match="must be empty or a folder of caftune demo"):
        demo(str(tmp_path))
    assert (tmp_path / "data").is_dir()
