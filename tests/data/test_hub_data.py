"""Data by their hub id: a run stays with the commit that it began with, and says which that is."""

import json

import pytest
import yaml
from hub import serve_hub

from caftune.compare.runner import arm_recipe
from caftune.data.forms import load_rows
from caftune.data.readers import HubSource, hub_source
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.pipeline.evaluate import read_tasks
from caftune.pipeline.finetune import export_checkpoint, finetune_model
from caftune.pipeline.run import Run
from caftune.pipeline.schema import Recipe
from caftune.pipeline.stage_rows import read_task_rows

NAME = "owner/rows"
FAST = {"per_device_train_batch_size": 4, "use_cpu": True, "gradient_checkpointing": False, "max_steps": 1}


def lines(word, count=4):
    rows = [{"prompt": f"{word}{n}:", "completion": " CCO"} for n in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """One commit of a data set with two splits."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "rows")
    with serve_hub(tmp_path / "hub") as served:
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", served.url)
        served.private[NAME] = False
        served.record(NAME, "first", {"train.jsonl": lines("old"), "test.jsonl": lines("old test ")})
        yield served


def change(hub):
    return hub.record(NAME, "second", {"train.jsonl": lines("new", 5), "test.jsonl": lines("new test ", 5)})


def recipe_in(folder, **sections):
    values = {
        "output": str(folder / "run"),
        "model": {"name": str(BASE)},
        "loss": {"weight": 0.0},
        "data": {"train": NAME, "eval": f"{NAME}:test"},
        "trainer": FAST,
        "eval": {"tasks": ["exact_match"], "data": {"exact_match": f"{NAME}:test"}, "max_new_tokens": 4},
    }
    return Recipe.model_validate(values | sections)


def first_prompt(recipe):
    return read_task_rows(recipe.data, recipe.data.train, limit=None, chat=False)[0]["prompt"]


def test_rows_that_change_between_two_commands_stay_those_of_the_first(hub, tmp_path):
    (commit,) = hub.commits[NAME]
    recipe = recipe_in(tmp_path)
    finetune_model(recipe)
    made = json.loads((tmp_path / "run" / "train" / "provenance.json").read_text())
    assert made["data"] == {"train": f"{NAME}@{commit}", "eval": f"{NAME}@{commit}:test"}
    change(hub)
    again = Run.open(recipe).recipe
    assert first_prompt(again) == "old0:"
    ((_, examples),) = read_tasks(again.eval)
    assert [example.prompt for example in examples][:1] == ["old test 0:"]
    finetune_model(recipe)  # goes on: it is the same run
    export_checkpoint(recipe)
    (other := tmp_path / "other").mkdir()
    assert first_prompt(Run.open(recipe_in(other)).recipe) == "new0:"


def test_prompts_and_texts_for_heads_are_pinned_too(hub, tmp_path):
    (commit,) = hub.commits[NAME]
    recipe = Run.open(recipe_in(tmp_path, labels={"prompts": f"{NAME}:test"}, heads={"text": NAME})).recipe
    change(hub)
    assert (recipe.labels.prompts, recipe.heads.text) == (f"{NAME}@{commit}:test", f"{NAME}@{commit}")
    assert load_rows(recipe.labels.prompts)[0]["prompt"] == "old test 0:"


def test_all_arms_of_a_comparison_have_the_commit_of_the_first(hub, tmp_path):
    (commit,) = hub.commits[NAME]
    recipe = recipe_in(tmp_path, loss={"weight": 0.1})
    first = Run.open(arm_recipe(Run.open(recipe).recipe, "ntp", 42)).recipe
    change(hub)
    second = Run.open(arm_recipe(Run.open(recipe).recipe, "no_pretraining", 43)).recipe  # of another process, say
    assert first.data == second.data
    assert first.eval.data == second.eval.data == {"exact_match": f"{NAME}@{commit}:test"}


def test_a_commit_that_is_known_is_not_looked_up_again(hub, tmp_path):
    Run.open(recipe_in(tmp_path))
    asked = len(hub.requests)
    Run.open(recipe_in(tmp_path))
    assert len(hub.requests) == asked


def test_a_revision_in_the_name_is_the_one_that_is_read(hub, tmp_path):
    first = next(iter(hub.commits[NAME]))
    second = change(hub)
    assert load_rows(f"{NAME}@{first}:test", limit=1)[0]["prompt"] == "old test 0:"
    assert load_rows(f"{NAME}@main:test", limit=1)[0]["prompt"] == "new test 0:"
    named = Run.open(recipe_in(tmp_path, data={"train": f"{NAME}@main"})).recipe
    assert named.data.train == f"{NAME}@{second}"
    with pytest.raises(CaftuneError, match=r"owner/rows@nothing must be a file or a data set on the hub, got neither"):
        load_rows(f"{NAME}@nothing")


def test_another_revision_is_another_run(hub, tmp_path):
    first = next(iter(hub.commits[NAME]))
    change(hub)
    finetune_model(recipe_in(tmp_path))
    with pytest.raises(CaftuneError, match=r"holds the train stage of another recipe \(data.train: "):
        finetune_model(recipe_in(tmp_path, data={"train": f"{NAME}@{first}", "eval": f"{NAME}:test"}))


def test_a_folder_from_before_commits_were_kept_goes_on(hub, tmp_path):
    recipe = recipe_in(tmp_path)
    finetune_model(recipe)
    kept = tmp_path / "run" / "train" / "recipe.yaml"
    sections = yaml.safe_load(kept.read_text())
    sections["data"] |= {"train": NAME, "eval": f"{NAME}:test"}
    kept.write_text(yaml.safe_dump(sections))
    export_checkpoint(recipe)
    with pytest.raises(CaftuneError, match="holds the train stage of another recipe"):
        export_checkpoint(recipe_in(tmp_path, data={"train": f"{NAME}:test", "eval": f"{NAME}:test"}))


def test_without_the_hub_the_rows_are_of_the_commit_that_is_known_or_refused(hub, tmp_path, monkeypatch):
    recipe = Run.open(recipe_in(tmp_path)).recipe
    assert first_prompt(recipe) == "old0:"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert first_prompt(Run.open(recipe_in(tmp_path)).recipe) == "old0:"
    with pytest.raises(
        CaftuneError, match=r"owner/rows must be in the local cache at commit 0{40} when .* got another commit only"
    ):
        load_rows(f"{NAME}@{'0' * 40}")


def test_a_local_file_that_changed_is_another_run(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(lines("old"))
    recipe = recipe_in(tmp_path, data={"train": str(tmp_path / "rows.jsonl"), "eval": str(tmp_path / "rows.jsonl")})
    finetune_model(recipe)
    (tmp_path / "rows.jsonl").write_bytes(lines("new"))
    with pytest.raises(CaftuneError, match=r"the contents of train changed"):
        export_checkpoint(recipe)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("a/b", ("a/b", None, None, None)),
        ("a/b:test[:5%]", ("a/b", None, None, "test[:5%]")),
        ("a/b/main:train+test", ("a/b", None, "main", "train+test")),
        ("a/b@v1.0/main", ("a/b", "v1.0", "main", None)),
    ],
)
def test_what_a_hub_id_names(source, parts):
    found = hub_source(source)
    assert found == HubSource(*parts)
    assert str(found) == source


@pytest.mark.parametrize("source", ["./a/b", "/a/b", "a/b.jsonl", "a/b.json.gz", "a", "a/b/c/d", "a/b@", "a/b c"])
def test_what_is_no_hub_id(source):
    assert hub_source(source) is None
