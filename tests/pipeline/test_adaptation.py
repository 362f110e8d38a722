"""Heads and tasks: an epoch of the heads on the task's own rows before stage 2, and one folder of heads for many tasks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file, save_file
from trainers import config
from transformers import AutoConfig, AutoTokenizer

from caftune import CAFTTrainer
from caftune.demo.chemistry import completion, molecules, prompt
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.files import file_sha256, write_json
from caftune.pipeline.adapt import adapt_heads
from caftune.pipeline.finetune import export_checkpoint, finetune_model
from caftune.pipeline.pretrain import pretrain_heads
from caftune.pipeline.schema import Recipe
from caftune.pipeline.stage_config import inherited_options

# 24 rows in batches of 8: an epoch has three steps.
FAST = {"per_device_train_batch_size": 8, "use_cpu": True, "gradient_checkpointing": False, "logging_steps": 1}
ADAPT = {**FAST, "learning_rate": 3e-3, "lr_scheduler_type": "constant", "max_steps": 6}
TRAINER = {**FAST, "learning_rate": 1e-4, "max_steps": 3}


def write_rows(path, *, seed):
    drawn = molecules(24, seed=seed, substituents=(0, 2))
    Dataset.from_list([{"prompt": prompt(m), "completion": completion(m)} for m in drawn]).to_json(path)


def recipe_in(folder, output="run", **sections):
    # Data and heads are named from the folder, so that a copied folder is the same run.
    values = {
        "output": str(folder / output),
        "model": {"name": str(BASE)},
        "heads": {"path": "heads"},
        "data": {"train": "data.jsonl"},
        "adapt": ADAPT,
        "trainer": TRAINER,
    }
    return Recipe.model_validate({**values, **sections})


@pytest.fixture(scope="module")
def finished(heads, tmp_path_factory):
    """The same task with adapted heads (run/) and with the heads as they are (plain/)."""
    folder = tmp_path_factory.mktemp("adaptation")
    write_rows(folder / "data.jsonl", seed=5)
    shutil.copytree(heads, folder / "heads")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        finetune_model(recipe_in(folder))
        finetune_model(recipe_in(folder, "plain", adapt=None))
    return folder


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def read(*parts):
    return json.loads(Path(*parts).read_text())


def fingerprint(folder):
    return file_sha256(Path(folder, "heads.safetensors"))


def results(output):
    return {row["stage"]: row for row in map(json.loads, (output / "results.jsonl").read_text().splitlines())}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def trained_states(output, stage):
    """The trainer's own record in the last checkpoint of a stage."""
    newest = max((output / stage).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return read(newest, "trainer_state.json")


def test_adaptation_changes_every_weight_matrix_of_the_heads(finished):
    before, after = (load_file(finished / name / "heads.safetensors") for name in ("heads", "run/adapt/heads"))
    assert before.keys() == after.keys()
    assert not [name for name in before if torch.equal(before[name], after[name])]


def test_adapted_heads_have_a_lower_loss_on_the_tasks_rows_at_every_horizon(finished, tmp_path):
    lines = (finished / "data.jsonl").read_text().splitlines()
    rows, found = Dataset.from_list([json.loads(line) for line in lines]), []
    for folder in ("heads", "run/adapt/heads"):
        args = config(tmp_path, pretrain_heads=True, heads=str(finished / folder))
        found.append(CAFTTrainer(str(BASE), args, train_dataset=rows, eval_dataset=rows).evaluate())
    for name in ("eval_loss", "eval_h2_loss", "eval_h3_loss", "eval_h4_loss"):
        assert found[1][name] < 0.9 * found[0][name]


def test_adaptation_leaves_the_pretrained_heads_as_they_were(finished, heads):
    assert contents(finished / "heads") == contents(Path(heads))


def test_adapted_heads_say_from_which_heads_and_on_which_rows_they_were_made(finished):
    training = read(finished, "run", "adapt", "heads", "heads.json")["training"]
    assert training["adapted_from"] == fingerprint(finished / "heads")
    assert "data.jsonl" in str(training["data"])
    assert (training["steps"], training["learning_rate"]) == (6, 3e-3)


def test_adaptation_is_a_stage_with_a_record_of_what_it_began_with(finished):
    record = read(finished, "run", "adapt", "provenance.json")
    assert record["heads"]["weights_sha256"] == fingerprint(finished / "heads")
    assert record["data"]["train"] == file_sha256(finished / "data.jsonl")
    assert yaml.safe_load((finished / "run" / "adapt" / "recipe.yaml").read_text())["adapt"] == ADAPT
    assert results(finished / "run")["adapt"]["rows"] == 24


@pytest.mark.parametrize(("run", "source"), [("run", "run/adapt/heads"), ("plain", "heads")])
def test_stage_two_records_the_heads_it_starts_from(finished, run, source):
    record = read(finished, run, "train", "provenance.json")["heads"]
    assert record["weights_sha256"] == fingerprint(finished / source)
    assert record["training"] == read(finished, source, "heads.json")["training"]
    assert Path(record["folder"]) == (finished / source if run == "run" else Path(source))


@pytest.mark.parametrize(("run", "source"), [("run", "run/adapt/heads"), ("plain", "heads")])
def test_the_card_of_the_model_names_the_heads_it_was_trained_with(finished, run, source):
    assert fingerprint(finished / source) in (finished / run / "model" / "README.md").read_text()


def test_stage_two_is_held_to_the_adapted_heads_from_its_first_step(finished):
    with_adapted, plain = (results(finished / run)["train"]["log"][0] for run in ("run", "plain"))
    assert with_adapted["h1_loss"] == plain["h1_loss"]  # the same model on the same rows
    for name in ("h2_loss", "h3_loss", "h4_loss"):
        assert with_adapted[name] < 0.9 * plain[name]


def test_adaptation_begins_with_the_pretrained_heads(finished):
    begun, plain = trained_states(finished / "run", "adapt"), trained_states(finished / "plain", "train")
    for name in ("h2_loss", "h3_loss", "h4_loss"):  # on the same first rows, before anything was changed
        assert begun["log_history"][0][name] == pytest.approx(plain["log_history"][0][name], rel=1e-5)


def test_the_learning_rate_of_adaptation_is_its_own(finished):
    rates = {
        stage: trained_states(finished / "run", stage)["log_history"][0]["learning_rate"]
        for stage in ("adapt", "train")
    }
    assert rates == {"adapt": 3e-3, "train": 1e-4}


@pytest.mark.parametrize(("options", "epochs"), [({}, 1), ({"num_train_epochs": 2}, 2)])
def test_heads_adapt_for_one_epoch_unless_the_recipe_says_otherwise(finished, tmp_path, monkeypatch, options, epochs):
    monkeypatch.chdir(finished)
    recipe = recipe_in(tmp_path, adapt={**FAST, **options})
    adapted = adapt_heads(recipe)
    state = trained_states(tmp_path / "run", "adapt")
    assert (state["epoch"], state["global_step"]) == (epochs, 3 * epochs)
    assert read(adapted, "heads.json")["training"]["num_train_epochs"] == epochs


@pytest.mark.parametrize("stage", ["pretrain", "adapt"])
def test_heads_are_the_bases_own_where_the_trainer_adds_tokens_to_it(copied, stage):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.add_tokens(["<|im_end|>"])
    tokenizer.save_pretrained("tokenizer")
    sections = {"trainer": {**TRAINER, "chat_template_path": "tokenizer"}}
    if stage == "pretrain":
        columns = {"columns": {"prompt": "prompt", "completion": "completion"}}
        sections |= {"heads": {"count": 3, "text": "data.jsonl"}, "labels": columns, "adapt": None}
        sections |= {"pretrain": {**ADAPT, "chat_template_path": "tokenizer"}}
        pretrain_heads(recipe_in(copied, "new", **sections))
    model = finetune_model(recipe_in(copied, "new", **sections))
    made = copied / "new" / ("heads" if stage == "pretrain" else "adapt/heads")
    assert read(made, "heads.json")["base"]["unembedding"] == read("heads", "heads.json")["base"]["unembedding"]
    assert len(AutoTokenizer.from_pretrained(model)) == AutoConfig.from_pretrained(model).vocab_size == 192


def test_a_second_call_does_not_adapt_again(copied):
    kept = [*(copied / "run" / "adapt").rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    finetune_model(recipe_in(copied))
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert sorted(results(copied / "run")) == ["adapt", "train"]


def test_removing_the_folder_as_the_refusal_says_adapts_anew(copied):
    before = contents(copied / "run" / "adapt" / "heads")
    recipe = recipe_in(copied, adapt={**ADAPT, "learning_rate": 1e-2})
    with pytest.raises(CaftuneError, match="Remove .*run/adapt"):
        adapt_heads(recipe)
    shutil.rmtree(copied / "run" / "adapt")
    assert contents(adapt_heads(recipe)) != before


def test_adaptation_trains_on_the_tokens_that_stage_two_trains_on(copied):
    recipe = recipe_in(copied, trainer={"completion_only_loss": False, "max_steps": 1}, adapt={"max_steps": 2})
    adapt = inherited_options(recipe.adapt, recipe.trainer)
    assert (adapt["completion_only_loss"], adapt["max_steps"]) == (False, 2)


def test_an_adaptation_that_stopped_in_its_evaluation_is_evaluated_and_recorded(copied, monkeypatch):
    shutil.rmtree(copied / "run" / "adapt")
    train = recipe_in(copied).data.train
    recipe = recipe_in(copied, data={"train": train, "eval": train})
    with monkeypatch.context() as patch:
        patch.setattr("caftune.pipeline.adapt.evaluated", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            adapt_heads(recipe)
    before = contents(adapt_heads(recipe))
    assert results(copied / "run")["adapt"]["metrics"]
    assert contents(adapt_heads(recipe)) == before


def test_lost_adapted_heads_come_back_from_the_last_checkpoint(copied, capsys):
    adapted = copied / "run" / "adapt" / "heads"
    before = contents(adapted)
    shutil.rmtree(adapted)
    recipe = recipe_in(copied)
    assert adapt_heads(recipe) == adapted
    assert f"Resuming from {copied}/run/adapt/checkpoint-6" in capsys.readouterr().err
    assert contents(adapted) == before


def test_an_interrupted_adaptation_goes_on_to_the_same_heads(copied, capsys):
    output = copied / "run"
    before = load_file(output / "adapt" / "heads" / "heads.safetensors")
    shutil.rmtree(output / "adapt" / "heads")
    shutil.rmtree(output / "adapt" / "checkpoint-6")  # an epoch is kept, as after a stop in the second
    (output / "results.jsonl").unlink()
    recipe = recipe_in(copied)
    after = load_file(adapt_heads(recipe) / "heads.safetensors")
    assert f"Resuming from {output}/adapt/checkpoint-3" in capsys.readouterr().err
    assert all(torch.equal(before[name], after[name]) for name in before)


def other_heads(folder):
    weights = {name: tensor + 1 for name, tensor in load_file(folder / "heads.safetensors").items()}
    save_file(weights, folder / "heads.safetensors")
    write_json(folder / "heads.json", read(folder, "heads.json") | {"weights_sha256": fingerprint(folder)})


@pytest.mark.parametrize(
    ("sections", "stage", "difference"),
    [
        ({"adapt": {**ADAPT, "learning_rate": 0.1}}, "adapt", r"adapt\.learning_rate: 0\.003 -> 0\.1"),
        ({"adapt": {**ADAPT, "weight_decay": 0.1}}, "adapt", r"adapt\.weight_decay: None -> 0\.1"),
        ({"heads": {"path": "copy-of-heads"}}, "adapt", r"heads\.path: 'heads' -> 'copy-of-heads'"),
        ({"data": {"train": "data.jsonl", "limit": 8}}, "adapt", r"data\.limit: None -> 8"),
        ({"adapt": None}, "train", r"adapt: \{.*\} -> None"),
    ],
)
def test_a_changed_recipe_is_refused_with_what_differs(copied, sections, stage, difference):
    shutil.copytree("heads", "copy-of-heads")
    before = contents(copied / "run")
    changed = recipe_in(copied, **sections)
    with pytest.raises(CaftuneError, match=rf"run/train holds the train stage of another recipe \({difference}\)"):
        finetune_model(changed)
    if stage == "adapt":
        with pytest.raises(CaftuneError, match=rf"run/adapt holds the adapt stage of another recipe \({difference}\)"):
            adapt_heads(changed)
    assert contents(copied / "run") == before


def test_adaptation_of_other_heads_under_the_same_name_is_refused(copied):
    other_heads(copied / "heads")
    with pytest.raises(CaftuneError, match=r"run/adapt holds .* of another recipe \(the contents of heads changed\)"):
        finetune_model(recipe_in(copied))


def test_adaptation_to_other_rows_under_the_same_name_is_refused(copied):
    write_rows(copied / "data.jsonl", seed=6)
    for stage, run in (("train", finetune_model), ("adapt", adapt_heads)):
        with pytest.raises(
            CaftuneError, match=rf"run/{stage} holds .* of another recipe \(the contents of train changed\)"
        ):
            run(recipe_in(copied))


def test_export_takes_a_run_with_adapted_heads(copied):
    before = load_file(copied / "run" / "model" / "model.safetensors")
    shutil.rmtree(copied / "run" / "model")
    again = load_file(export_checkpoint(recipe_in(copied)) / "model.safetensors")
    assert all(torch.equal(before[name], again[name]) for name in before)


def test_without_auxiliary_losses_no_heads_are_adapted(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(finished)
    finetune_model(recipe_in(tmp_path, loss={"weight": 0}))
    assert not (tmp_path / "run" / "adapt").exists()
    # Heads that are named are still measured, as they are.
    assert "adapt" not in read(tmp_path, "run", "train", "provenance.json")["heads"]["folder"]


@pytest.mark.parametrize(
    ("adapt", "message"),
    [
        (
            {"learnin_rate": 1.0},
            r"adapt\.learnin_rate is not an option of CAFTConfig\. Did you mean adapt\.learning_rate",
        ),
        ({"aux_decay": 0.5}, r"adapt\.aux_decay is set by loss\.decay in a recipe"),
        ({"learning_rate": "fast"}, r"adapt\.learning_rate must be a number, got 'fast'"),
    ],
)
def test_a_slip_in_the_section_is_told_before_work_starts(finished, tmp_path, monkeypatch, adapt, message):
    monkeypatch.chdir(finished)
    with pytest.raises(CaftuneError, match=message):
        finetune_model(recipe_in(tmp_path, adapt=adapt))
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def two_tasks(finished):
    """One folder of heads, a task learnt through a LoRA and another one in full."""
    write_rows(finished / "other.jsonl", seed=11)
    runs = {
        "lora": {"model": {"name": str(BASE), "tuning": "lora", "lora": {"r": 4}}},
        "full": {"data": {"train": "other.jsonl"}},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished)
        for output, sections in runs.items():
            finetune_model(recipe_in(finished, output, adapt=None, **sections))
    return finished


def test_the_same_heads_serve_two_tasks_and_two_ways_of_tuning(two_tasks, heads):
    records = {run: read(two_tasks, run, "train", "provenance.json") for run in ("lora", "full")}
    assert records["lora"]["data"]["train"] != records["full"]["data"]["train"]
    assert {record["heads"]["weights_sha256"] for record in records.values()} == {fingerprint(heads)}
    assert contents(two_tasks / "heads") == contents(Path(heads))


@pytest.mark.parametrize("run", ["lora", "full"])
def test_each_task_has_a_model_of_its_own(two_tasks, run):
    base, model = load_file(BASE / "model.safetensors"), load_file(two_tasks / run / "model" / "model.safetensors")
    assert base.keys() == model.keys()
    assert not all(torch.equal(base[name], model[name]) for name in base)
    assert fingerprint(two_tasks / "heads") in (two_tasks / run / "model" / "README.md").read_text()
