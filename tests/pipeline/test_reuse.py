"""Heads used again: by another command, after a change of folder, from the hub; a finished stage run once more."""

import json
import shutil
import sys

import pytest
from datasets import Dataset
from hub import serve_hub
from safetensors.torch import load_file, save_file
from trainers import config

from caftune import CAFTTrainer
from caftune.checkpoints.cards import heads_card
from caftune.checkpoints.hub import pull_heads, push_heads
from caftune.demo.chemistry import completion, molecules, prompt
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.files import file_sha256, write_json
from caftune.pipeline.adapt import adapt_heads
from caftune.pipeline.finetune import export_checkpoint, finetune_model
from caftune.pipeline.pretrain import measure_quality, pretrain_heads
from caftune.pipeline.schema import Recipe

FAST = {"per_device_train_batch_size": 8, "use_cpu": True, "gradient_checkpointing": False, "logging_steps": 1}


@pytest.fixture
def folder(heads, tmp_path, monkeypatch):
    for name, value in {"HF_HUB_CACHE": tmp_path / "cache", "ENDPOINT": "http://127.0.0.1:9"}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(value))
    monkeypatch.setenv("HF_TOKEN", "hf_any")
    drawn = molecules(24, seed=5, substituents=(0, 2))
    Dataset.from_list([{"prompt": prompt(m), "completion": completion(m)} for m in drawn]).to_json(tmp_path / "d.jsonl")
    shutil.copytree(heads, tmp_path / "heads")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe_in(folder, **sections):
    values = {"output": str(folder / "run"), "model": {"name": str(BASE)}, "heads": {"path": "heads"}}
    values |= {"data": {"train": "d.jsonl"}, "adapt": FAST, "trainer": {**FAST, "max_steps": 3}}
    return Recipe.model_validate({**values, **sections})


def test_adapted_heads_have_a_card(folder):
    recipe = recipe_in(folder)
    adapted = adapt_heads(recipe)
    text = heads_card(adapted, "owner/heads", licence="mit")
    assert "d.jsonl" in text
    assert "{" not in text


def test_a_slip_in_the_trainers_section_is_told_before_the_heads_adapt(folder):
    with pytest.raises(CaftuneError, match="learnin_rate"):
        finetune_model(recipe_in(folder, trainer={"learnin_rate": 1.0}))
    assert not (folder / "run").exists()


@pytest.mark.parametrize("stage", [pretrain_heads, finetune_model])
def test_a_finished_stage_that_ended_within_an_epoch_trains_no_further_when_run_again(folder, stage):
    options = {**FAST, "max_steps": 2, "lr_scheduler_type": "constant", "learning_rate": 1e-3}
    heads = {"heads": {"count": 2, "text": "d.jsonl"}} if stage is pretrain_heads else {}
    recipe = recipe_in(folder, adapt=None, trainer=options, pretrain=options, **heads)
    files = [stage(recipe) / ("model.safetensors" if stage is finetune_model else "heads.safetensors")]
    before = file_sha256(files[0])
    stage(recipe)
    assert file_sha256(files[0]) == before


def test_the_same_heads_made_by_another_command_are_the_same_heads(folder, monkeypatch):
    recipe = recipe_in(folder)
    finetune_model(recipe)
    shutil.rmtree(folder / "run" / "adapt" / "heads")
    monkeypatch.setattr(sys, "argv", ["caftune", "train", "./recipe.yaml"])
    finetune_model(recipe)


def test_a_run_that_changes_its_folder_still_exports(folder, rows, monkeypatch, tmp_path_factory):
    trainer = CAFTTrainer(str(BASE), config("out", heads="heads", max_steps=1), train_dataset=rows)
    trainer.train()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    trainer.export(folder / "model")


def test_the_card_names_the_heads_that_were_loaded_and_not_what_was_pushed_since(folder, rows):
    first = file_sha256(folder / "heads" / "heads.safetensors")
    with serve_hub(folder / "hub"):
        push_heads(folder / "heads", "tester/heads", licence="mit")
        trainer = CAFTTrainer(str(BASE), config("out", heads="tester/heads", max_steps=1), train_dataset=rows)
        trainer.train()
        weights = {name: tensor + 1 for name, tensor in load_file(folder / "heads" / "heads.safetensors").items()}
        save_file(weights, folder / "other.safetensors")
        shutil.move(folder / "other.safetensors", folder / "heads" / "heads.safetensors")
        described = json.loads((folder / "heads" / "heads.json").read_text())
        sha256 = file_sha256(folder / "heads" / "heads.safetensors")
        write_json(folder / "heads" / "heads.json", described | {"weights_sha256": sha256})
        push_heads(folder / "heads", "tester/heads", licence="mit")
        trainer.export(folder / "model")
    assert first in (folder / "model" / "README.md").read_text()


def test_pulling_onto_a_file_is_refused(folder):
    with pytest.raises(CaftuneError):
        pull_heads("tester/heads", folder / "d.jsonl")


@pytest.mark.parametrize(("name", "what"), [("tester/nothing", "repository"), ("tester/heads@nope", "revision")])
def test_a_refusal_of_the_hub_says_what_does_not_exist(folder, name, what):
    with serve_hub(folder / "hub"):
        push_heads(folder / "heads", "tester/heads", licence="mit")
        with pytest.raises(CaftuneError, match=what):
            pull_heads(name, folder / "new")


def test_a_refused_repository_is_named_and_not_the_cache(folder):
    with serve_hub(folder / "hub") as hub:
        hub.record("tester/other", "by hand", {"README.md": b"x"})
        hub.private["tester/other"] = False
        with pytest.raises(CaftuneError, match="^tester/other"):
            pull_heads("tester/other", folder / "new")


def test_heads_are_not_measured_on_rows_they_may_have_been_trained_on(folder):
    options = {**FAST, "max_steps": 1}
    sections = {"adapt": None, "pretrain": options, "heads": {"count": 2, "text": "d.jsonl"}}
    pretrain_heads(recipe_in(folder, **sections))
    before = (folder / "run" / "heads" / "quality.json").read_text()
    sections["heads"] = {**sections["heads"], "held_out": 0.3}
    with pytest.raises(CaftuneError, match="heads.held_out: 0.1 -> 0.3"):
        measure_quality(recipe_in(folder, **sections))
    assert (folder / "run" / "heads" / "quality.json").read_text() == before


def test_an_exported_checkpoint_has_a_card_of_its_own(folder):
    recipe = recipe_in(folder, adapt=None, trainer={**FAST, "max_steps": 3, "save_steps": 1, "save_total_limit": 5})
    model = finetune_model(recipe)
    assert "- **settings**: steps 3, " in (model / "README.md").read_text()
    export_checkpoint(recipe, str(folder / "run" / "train" / "checkpoint-2"))
    text = (model / "README.md").read_text()
    assert "- **settings**: steps 2, " in text
    assert file_sha256(folder / "heads" / "heads.safetensors") in text


def test_an_adapter_is_not_called_a_checkpoint(folder):
    lora = {"name": str(BASE), "tuning": "lora", "lora": {"merge": False}}
    model = finetune_model(recipe_in(folder, adapt=None, model=lora))
    assert "An adapter: load it with PEFT." in (model / "README.md").read_text()
