"""Which options may change when a run resumes, and the result then."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from opened import base_of
from safetensors.torch import load_file
from test_run_folder import FAST, recipe_in, write

from caftune.errors import CaftuneError
from caftune.pipeline.finetune import export_checkpoint, finetune_model
from caftune.pipeline.folder import RunFolder, Stage
from caftune.pipeline.schema import Recipe
from caftune.training.progress import depends_on_length
from caftune.training.resumption import remove_allowed_changes

CONSTANT = {"lr_scheduler_type": "constant", "learning_rate": 1e-3, "max_steps": -1, "save_steps": None}
DATA = {"train": "data.jsonl"}


def run_of(folder, name, *, loss=None, **trainer):
    """A recipe without heads: 20 rows, 3 steps an epoch, the last of them smaller."""
    options = {**CONSTANT, **trainer}
    kept = {key: value for key, value in {**FAST, **options}.items() if value is not None}
    recipe = recipe_in(folder, loss=loss or {"weight": 0}, data={"limit": 20})
    return recipe.model_copy(update={"output": str(folder / name), "trainer": kept})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write(tmp_path / "data.jsonl", seed=5)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(recipe):
    return load_file(Path(recipe.output, "model", "model.safetensors"))


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def log_of(recipe):
    lines = [json.loads(line) for line in Path(recipe.output, "results.jsonl").read_text().splitlines()]
    entries = next(line for line in lines if line["stage"] == "train")["log"]
    return [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"num_train_epochs": 1}, {"num_train_epochs": 2}),
        ({"max_steps": 2, "num_train_epochs": None}, {"max_steps": 6}),
    ],
)
def test_a_finished_run_goes_on_to_the_weights_and_losses_of_a_longer_one(folder, first, then, capsys):
    options = {"logging_steps": 1}
    finetune_model(run_of(folder, "short", **options, **first))
    assert "Changed" not in capsys.readouterr().err
    longer, whole = (run_of(folder, name, **options, **then) for name in ("short", "whole"))
    before = weights(longer)
    finetune_model(longer)
    said = capsys.readouterr().err
    finetune_model(whole)
    assert not equal(before, weights(longer))
    assert equal(weights(longer), weights(whole))
    assert log_of(longer) == log_of(whole)
    assert f"Changed since {folder}/short/train was begun: trainer." in said
    assert "ends at step 6 instead of" in said
    assert "with the result of a run of that length from the start" in said
    kept = yaml.safe_load((folder / "short/train/recipe.yaml").read_text())["trainer"]
    assert then.items() <= kept.items()
    (entry,) = json.loads((folder / "short/train/provenance.json").read_text())["went_on"]
    assert any("-> " in change for change in entry["changes"])


def test_with_heads_and_a_constant_gamma_a_finished_run_goes_on_to_the_weights_of_a_longer_one(folder, heads):
    def run(name, steps):
        loss = {"weight": 0.5, "schedule": "constant"}
        recipe = run_of(folder, name, loss=loss, max_steps=steps, num_train_epochs=None)
        section = recipe.heads.model_copy(update={"path": heads, "count": 3})
        return recipe.model_copy(update={"heads": section})

    finetune_model(run("short", 2))
    before = weights(run("short", 2))
    for name in ("short", "whole"):
        finetune_model(run(name, 4))
    assert not equal(before, weights(run("short", 4)))
    assert equal(weights(run("short", 4)), weights(run("whole", 4)))


def test_when_a_run_is_evaluated_changes_no_random_draw_and_so_no_weight(folder):
    def run(name, **trainer):
        cadence = {"eval_strategy": "steps", "eval_steps": 3, "max_steps": 4, "num_train_epochs": None, **trainer}
        recipe = run_of(folder, name, **cadence)
        lora = recipe.model.lora.model_copy(update={"dropout": 0.5})
        changes = {"data": recipe.data.model_copy(update={"eval": "data.jsonl"})}
        return recipe.model_copy(
            update={"model": recipe.model.model_copy(update={"tuning": "lora", "lora": lora}), **changes}
        )

    finetune_model(run("longer", max_steps=2))  # transformers evaluates after the last step, too
    for recipe in (run("longer"), run("whole"), run("often", eval_steps=1), run("never", eval_strategy="no")):
        finetune_model(recipe)
    assert not equal(weights(run("whole")), load_file(Path(run("whole").model.name, "model.safetensors")))
    for name in ("longer", "often", "never"):
        assert equal(weights(run(name)), weights(run("whole"))), name


def test_a_schedule_that_depends_on_the_length_is_named(folder, capsys):
    options = {"lr_scheduler_type": "linear", "logging_steps": 1}
    finetune_model(run_of(folder, "short", **options, num_train_epochs=1))
    capsys.readouterr()
    finetune_model(run_of(folder, "short", **options, num_train_epochs=2))
    said = capsys.readouterr().err
    assert "with another result than a run of that length from the start: lr_scheduler_type=linear depend" in said
    whole = run_of(folder, "whole", **options, num_train_epochs=2)
    finetune_model(whole)
    assert not equal(weights(whole), weights(run_of(folder, "short")))


def test_a_stopped_run_goes_on_in_smaller_batches_with_the_same_rows_and_its_new_cadence(folder, capsys):
    options = {"num_train_epochs": 2, "logging_steps": 1}
    whole = run_of(folder, "whole", **options)
    finetune_model(whole)
    finetune_model(run_of(folder, "stopped", **options, save_strategy="steps", save_steps=2))
    shutil.rmtree(folder / "stopped/train/checkpoint-6")
    shutil.rmtree(folder / "stopped/train/checkpoint-4")
    capsys.readouterr()
    smaller = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_strategy": "steps"}
    changed = run_of(folder, "stopped", **options, **smaller, save_steps=3, dataloader_num_workers=0)
    finetune_model(changed)
    said = capsys.readouterr().err
    for text in (
        "per_device_train_batch_size: 8 -> 4",
        "gradient_accumulation_steps: default -> 2",
        "save_steps: 2 -> 3",
    ):
        assert f"trainer.{text}" in said
    assert "ends at step" not in said
    assert {path.name for path in (folder / "stopped/train").glob("checkpoint-*")} == {
        *("checkpoint-2", "checkpoint-3", "checkpoint-6"),
    }
    assert [step for step, _ in log_of(changed)] == [step for step, _ in log_of(whole)]
    # The loss of a step is that of its rows: rounding apart, it differs with any other row.
    assert [loss for _, loss in log_of(changed)] == pytest.approx([loss for _, loss in log_of(whole)], rel=1e-4)


def test_a_run_cannot_end_before_where_it_is(folder):
    finetune_model(run_of(folder, "short", num_train_epochs=2))
    with pytest.raises(CaftuneError, match=r"must not end before step 6, which .*checkpoint-6 has reached, got step 3"):
        finetune_model(run_of(folder, "short", num_train_epochs=1))
    with pytest.raises(CaftuneError, match=r"must not end before step 6, .* got step 5"):
        finetune_model(run_of(folder, "short", max_steps=5, num_train_epochs=2))
    assert_as_it_was(run_of(folder, "short", num_train_epochs=2))


def assert_as_it_was(recipe):
    """A refused change has left the run as it was: finished, and of its recipe."""
    assert RunFolder(recipe.output).is_done("train")
    assert not list(Stage(recipe, "train", {"train": "data.jsonl", "eval": None}).refuse_other())
    assert "went_on" not in json.loads(Path(recipe.output, "train/provenance.json").read_text())


@pytest.mark.parametrize("lost", ["optimizer.pt", "*"])
def test_a_run_whose_optimizer_or_checkpoints_are_gone_cannot_go_on(folder, lost):
    finetune_model(run_of(folder, "short", max_steps=1))
    checkpoint = folder / "short/train/checkpoint-1"
    if lost == "*":
        shutil.rmtree(checkpoint)
    else:
        (checkpoint / lost).unlink()
    before = weights(run_of(folder, "short"))
    with pytest.raises(CaftuneError, match=r"must hold (an optimizer's state|a checkpoint) to resume from"):
        finetune_model(run_of(folder, "short", max_steps=2))
    assert equal(before, weights(run_of(folder, "short")))
    assert_as_it_was(run_of(folder, "short", max_steps=1))


def test_an_export_needs_no_run_of_the_new_cadence_but_one_of_the_new_length(folder):
    finetune_model(run_of(folder, "short", max_steps=1))
    export_checkpoint(run_of(folder, "short", max_steps=1, save_steps=7))
    with pytest.raises(
        CaftuneError, match=r"trainer.max_steps: 1 -> 2\). Run `caftune train` to continue to that length"
    ):
        export_checkpoint(run_of(folder, "short", max_steps=2))
    assert RunFolder(run_of(folder, "short").output).is_done("train")


BEST = {"load_best_model_at_end": True}


def identity(**trainer):
    return {"trainer": trainer, "heads": {"keep": False}, "model": {"lora": {"merge": True}}}


@pytest.mark.parametrize(
    ("before", "now", "left"),
    [
        ({}, {"logging_steps": 1, "save_total_limit": 3, "dataloader_num_workers": 2}, False),
        ({"gradient_checkpointing": True}, {"gradient_checkpointing": False}, False),
        ({"per_device_train_batch_size": 16}, {"gradient_accumulation_steps": 2}, False),
        ({"per_device_train_batch_size": 16}, {"gradient_accumulation_steps": 3}, True),
        ({"per_device_train_batch_size": 4}, {}, True),
        (
            {"per_device_train_batch_size": 16, "dataloader_drop_last": True},
            {"gradient_accumulation_steps": 2, "dataloader_drop_last": True},
            True,
        ),
        (
            {"per_device_train_batch_size": 16, "auto_find_batch_size": True},
            {"gradient_accumulation_steps": 2, "auto_find_batch_size": True},
            True,
        ),
        ({}, {"learning_rate": 1.0}, True),
        ({}, {"data_seed": 1}, True),
        ({}, {"bf16": True}, True),
        ({"max_steps": 3}, {"num_train_epochs": 2}, False),
        ({"eval_steps": 2, **BEST}, {"eval_steps": 4, **BEST}, True),
        ({"save_steps": 2, **BEST}, {"save_steps": 4, **BEST}, True),
        ({"logging_steps": 2, **BEST}, {"logging_steps": 4, "per_device_eval_batch_size": 1, **BEST}, False),
        (
            {"eval_steps": 2, "lr_scheduler_type": "reduce_lr_on_plateau"},
            {"lr_scheduler_type": "reduce_lr_on_plateau"},
            True,
        ),
        ({"eval_delay": 2, "lr_scheduler_type": "greedy"}, {"eval_delay": 3, "lr_scheduler_type": "greedy"}, True),
        ({"eval_steps": 2, "lr_scheduler_type": "cosine"}, {"lr_scheduler_type": "cosine"}, False),
    ],
)
def test_what_leaves_alone_what_was_learnt_may_change_and_nothing_else(before, now, left):
    kept, wanted = identity(**before), identity(**now)
    changes = remove_allowed_changes(kept, wanted, "train")
    assert (kept != wanted) is left
    assert bool(list(changes)) is not left


def test_in_a_comparison_no_option_may_change():
    kept, wanted = identity(logging_steps=1), identity(logging_steps=2)
    assert not list(remove_allowed_changes(kept, wanted, "compare"))
    assert kept != wanted


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, ["lr_scheduler_type=linear"]),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5}, []),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1}, ["warmup_steps=0.1"]),
        ({"lr_scheduler_type": "cosine"}, ["lr_scheduler_type=cosine"]),
        ({"lr_scheduler_type": "constant", "aux_weight": 0.1}, ["loss.schedule=reflected_sine"]),
        ({"lr_scheduler_type": "constant", "aux_weight": 0.1, "aux_schedule": "constant"}, []),
    ],
)
def test_the_options_that_depend_on_the_length_are_known(tmp_path, options, found):
    from trainers import config

    given = config(tmp_path, **{"aux_weight": 0.0, "heads": "x" if "aux_weight" in options else None, **options})
    assert depends_on_length(given) == found


# What an older or a newer version left


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    write(folder / "data.jsonl", seed=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        finetune_model(run_of(folder, "run", max_steps=1))
    return folder


def places(values, above=()):
    for key, value in values.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from places(value, (*above, key))


def without(values, place):
    *above, key = place
    for part in above:
        values = values[part]
    del values[key]


def test_a_kept_recipe_without_any_one_key_that_has_a_default_is_the_same_recipe(trained, monkeypatch):
    monkeypatch.chdir(trained)
    recipe, file = run_of(trained, "run", max_steps=1), trained / "run/train/recipe.yaml"
    whole = file.read_text()
    has_default = [
        place
        for place in places(yaml.safe_load(whole))
        if place[0] not in ("trainer", "files") and place not in SET_HERE
    ]
    assert len(has_default) > 30
    try:
        for place in has_default:
            kept = yaml.safe_load(whole)
            without(kept, place)
            file.write_text(yaml.safe_dump(kept))
            Stage(recipe, "train", {"train": "data.jsonl", "eval": None}).refuse_other()
        export_checkpoint(recipe)
    finally:
        file.write_text(whole)


SET_HERE = {("model",), ("model", "name"), ("heads", "count"), ("heads",), ("loss", "weight"), ("loss",)} | {
    ("data",),
    ("data", "train"),
    ("data", "limit"),
}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (
            ("loss", "sharpness"),
            2,
            r"recipe.yaml must be a recipe that caftune .* can read: loss.sharpness is not a key of a recipe",
        ),
        (("model", "lora", "flavour"), "x", "model.lora.flavour is not a key"),
        (("heads", "kind"), "linear", "heads.kind must be 'decoder' or 'mlp', got 'linear'"),
        (("loss", "decay"), 0.5, "of another recipe .loss.decay: 0.5 -> 0.8"),
    ],
)
def test_a_key_or_value_of_another_version_is_named(trained, monkeypatch, place, value, message):
    monkeypatch.chdir(trained)
    recipe, file = run_of(trained, "run", max_steps=1), trained / "run/train/recipe.yaml"
    whole = file.read_text()
    kept = yaml.safe_load(whole)
    section = kept
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    file.write_text(yaml.safe_dump(kept))
    try:
        with pytest.raises(CaftuneError, match=message):
            export_checkpoint(recipe)
    finally:
        file.write_text(whole)


def test_values_that_are_one_under_the_schema_are_no_difference(trained, monkeypatch):
    monkeypatch.chdir(trained)
    recipe, file = run_of(trained, "run", max_steps=1), trained / "run/train/recipe.yaml"
    whole = file.read_text()
    kept = yaml.safe_load(whole)
    kept["loss"] |= {"decay": "8e-1", "target_share": 1, "weight": 0}
    kept["heads"] |= {"count": 2.0, "held_out": "0.1"}
    kept["trainer"]["learning_rate"] = "1e-3"
    file.write_text(yaml.safe_dump(kept))
    try:
        Stage(recipe, "train", {"train": "data.jsonl", "eval": None}).refuse_other()
    finally:
        file.write_text(whole)


def test_labels_of_an_older_version_are_trained_on(tmp_path):
    from caftune.pipeline.stage_rows import _finished_labels

    recipe = recipe_in(tmp_path, labels={"limit": None})
    made = tmp_path / "out/labels"
    made.mkdir(parents=True)
    label = {"row": 0, "turn": 0, "prompt": "a", "completion": "b", "finish": "stop", "exact": True}
    (made / "labels.jsonl").write_text(json.dumps({**label, "prompt_ids": [5], "completion_ids": [6]}) + "\n")
    kept = {"model.name": recipe.model.name, "labels": {"prompts": "data.jsonl", "max_new_tokens": 30}}
    (made / "recipe.yaml").write_text(yaml.safe_dump(kept))
    assert _finished_labels(recipe.labels, RunFolder(recipe.output), base_of(recipe))[0]["input_ids"] == [[5, 6]]
    (made / "recipe.yaml").write_text(yaml.safe_dump({**kept, "labels": {"prompts": "data.jsonl"}}))
    with pytest.raises(CaftuneError, match=r"labels.max_new_tokens: 256 -> 30"):
        _finished_labels(recipe.labels, RunFolder(recipe.output), base_of(recipe))


def test_heads_are_not_adapted_further_where_a_training_on_them_was_begun(folder, heads, monkeypatch):
    def run(epochs):
        recipe = run_of(folder, "run", loss={"weight": 0.5}, max_steps=1)
        section = recipe.heads.model_copy(update={"path": heads, "count": 3})
        adapt = {**FAST, "max_steps": epochs}
        return recipe.model_copy(update={"heads": section, "adapt": adapt})

    finetune_model(run(1))
    monkeypatch.setattr("caftune.pipeline.finetune.adapt_heads_of", lambda _: pytest.fail("adapted"))
    with pytest.raises(CaftuneError, match=r"of another recipe \(adapt.max_steps: 1 -> 2\)"):
        finetune_model(run(2))


def stage(folder, name, length, **sections):
    """A recipe, and its stage, begun with a length."""
    values = {"output": str(folder), "model": {"name": "x"}, "data": {"max_length": length}, **sections}
    return Recipe.model_validate(values), name


def begun(folder, name, length, **sections):
    recipe, name = stage(folder, name, length, **sections)
    (Stage(recipe, name, {}).open() / "checkpoint-1").mkdir()


STAGES = [("train", {}), ("adapt", {"adapt": {}}), ("pretrain", {"heads": {"text": "x.txt"}})]


@pytest.mark.parametrize(("name", "sections"), STAGES)
def test_a_null_length_of_an_older_version_is_the_default_of_today(tmp_path, name, sections):
    begun(tmp_path, name, "auto", **sections)
    file = tmp_path / name / "recipe.yaml"
    assert "max_length: auto" in file.read_text()
    older = file.read_text().replace("max_length: auto", "max_length: null")
    file.write_text(older)
    assert not list(Stage(stage(tmp_path, name, "auto", **sections)[0], name, {}).refuse_other())
    for length in (None, 1024):
        with pytest.raises(CaftuneError, match=rf"data\.max_length: 'auto' -> {length}"):
            Stage(stage(tmp_path, name, length, **sections)[0], name, {}).refuse_other()


@pytest.mark.parametrize(("name", "sections"), STAGES)
def test_rows_that_are_not_cut_stay_so(tmp_path, name, sections):
    begun(tmp_path, name, None, **sections)
    assert not list(Stage(stage(tmp_path, name, None, **sections)[0], name, {}).refuse_other())
    with pytest.raises(CaftuneError, match=r"data\.max_length: None -> 'auto'"):
        Stage(stage(tmp_path, name, "auto", **sections)[0], name, {}).refuse_other()
