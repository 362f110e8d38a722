"""The stages from one recipe, on files, as the command line runs them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from test_tuning import logits_of, untied
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from caftune.cli import app
from caftune.demo.chemistry import completion, molecules, prompt
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.pipeline.finetune import export_checkpoint, finetune_model
from caftune.pipeline.label import label_prompts
from caftune.pipeline.pretrain import pretrain_heads
from caftune.pipeline.preview import preview_rows
from caftune.pipeline.schema import Recipe
from caftune.report.render import read_run

FAST = {"per_device_train_batch_size": 8, "use_cpu": True, "gradient_checkpointing": False, "logging_steps": 2}


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    rows = [{"name": prompt(m), "smiles": completion(m)} for m in molecules(24, seed=5, substituents=(0, 2))]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "output": str(folder / "out"),
        "model": {"name": str(BASE)},
        "labels": {"prompts": str(folder / "data.jsonl"), "columns": {"prompt": "name"}, "max_new_tokens": 30},
        "heads": {"count": 2},
        "pretrain": {**FAST, "max_steps": 4, "learning_rate": 2e-3},
        "data": {
            "train": str(folder / "data.jsonl"),
            "eval": str(folder / "data.jsonl"),
            "columns": {"prompt": "name", "completion": "smiles"},
        },
        "trainer": {**FAST, "max_steps": 4, "save_steps": 2},
    }


@pytest.fixture(scope="module")
def finished(values):
    recipe = Recipe.model_validate(values)
    label_prompts(recipe)
    pretrain_heads(recipe)
    finetune_model(recipe)
    return Path(values["output"])


def recipe_with(values, **sections) -> Recipe:
    merged = {**values, **{name: {**values.get(name, {}), **part} for name, part in sections.items()}}
    return Recipe.model_validate(merged)


def test_one_recipe_gives_an_ordinary_model(finished):
    base, model = load_file(BASE / "model.safetensors"), load_file(finished / "model" / "model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in model.items()} == {k: (v.shape, v.dtype) for k, v in base.items()}
    assert any(not torch.equal(model[key], base[key]) for key in base)
    loaded = AutoModelForCausalLM.from_pretrained(finished / "model")
    ids = AutoTokenizer.from_pretrained(finished / "model")("Name: ethanol\nSMILES:", return_tensors="pt")["input_ids"]
    assert loaded.generate(ids, max_new_tokens=3).shape[1] > ids.shape[1]


def test_a_run_whose_plan_fails_is_recorded_without_it(values, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("caftune.pipeline.finetune.plan_of_run", lambda *_: 1 / 0)
    recipe = recipe_with({**values, "output": str(tmp_path)}, loss={"weight": 0}, trainer={"max_steps": 1})
    assert (finetune_model(recipe) / "model.safetensors").is_file()
    result = json.loads((tmp_path / "results.jsonl").read_text())
    assert result["plan"] is None
    assert result["costs"]["flops"] > 0
    assert "This run has no plan next to its costs: division by zero" in capsys.readouterr().err
    assert read_run(tmp_path).plans == {}


def test_stage_one_lowers_the_loss_of_every_head(finished):
    rows = [json.loads(line) for line in (finished / "results.jsonl").read_text().splitlines()]
    result = next(row for row in rows if row["stage"] == "pretrain-heads")
    for horizon in ("2", "3"):
        assert result["quality"]["heads"]["loss"][horizon] < result["quality"]["untrained"]["loss"][horizon]


def test_every_stage_leaves_its_recipe_and_provenance(finished):
    for stage in ("labels", "pretrain", "train"):
        assert yaml.safe_load((finished / stage / "recipe.yaml").read_text())["seed"] == 42
        record = json.loads((finished / stage / "provenance.json").read_text())
        assert {"command", "time", "versions", "git", "device", "data"} <= record.keys()
        assert all(len(digest) == 64 for digest in record["data"].values())


def test_export_again_gives_the_same_weights(finished, values, tmp_path):
    first = load_file(finished / "model" / "model.safetensors")
    shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "model")
    folder = export_checkpoint(Recipe.model_validate({**values, "output": str(tmp_path / "out")}))
    again = load_file(folder / "model.safetensors")
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_lora_trains_and_exports_merged(finished, values, tmp_path):
    shared = {"output": str(tmp_path / "lora"), "heads": {"path": str(finished / "heads")}}
    recipe = Recipe.model_validate({**values, **shared, "model": {"name": str(BASE), "tuning": "lora"}})
    trained = load_file(finetune_model(recipe) / "model.safetensors")
    again = load_file(export_checkpoint(recipe) / "model.safetensors")
    base = load_file(BASE / "model.safetensors")
    assert trained.keys() == base.keys()
    for key, value in trained.items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=1e-6)
    assert any(not torch.equal(trained[key], base[key]) for key in base)


def test_an_interrupted_training_goes_on_to_the_same_weights(finished, values, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    recipe = Recipe.model_validate(
        {**values, "output": str(tmp_path / "out"), "heads": {"path": str(finished / "heads")}}
    )
    shutil.rmtree(tmp_path / "out" / "train")
    whole = load_file(finetune_model(recipe) / "model.safetensors")
    shutil.rmtree(tmp_path / "out" / "model")
    shutil.rmtree(tmp_path / "out" / "train" / "checkpoint-4")
    resumed = load_file(finetune_model(recipe) / "model.safetensors")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize(
    ("stage", "sections", "difference"),
    [
        (finetune_model, {"loss": {"weight": 0.5}}, "loss.weight: 0.01 -> 0.5"),
        (finetune_model, {"trainer": {"learning_rate": 1.0}}, "trainer.learning_rate: None -> 1.0"),
        (pretrain_heads, {"labels": {"keep_truncated": True}}, "labels.keep_truncated: False -> True"),
        (pretrain_heads, {"heads": {"kind": "mlp"}}, "heads.kind: 'decoder' -> 'mlp'"),
    ],
)
@pytest.mark.usefixtures("finished")
def test_the_folder_of_another_run_is_refused(values, stage, sections, difference):
    with pytest.raises(CaftuneError, match=f"of another recipe .{difference}"):
        stage(recipe_with(values, **sections))


def test_a_folder_of_something_else_is_refused(values, tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "thesis.txt").write_text("mine")
    with pytest.raises(CaftuneError, match="must be empty or a folder of caftune, got other files"):
        label_prompts(Recipe.model_validate({**values, "output": str(tmp_path)}))


@pytest.mark.parametrize(
    ("stage", "sections", "error", "message"),
    [
        (label_prompts, {"labels": {"prompts": None}}, CaftuneError, "labels.prompts must name a file"),
        (label_prompts, {"labels": {"max_new_tokens": 255}}, CaftuneError, "24 of 24 prompts"),
        (label_prompts, {"labels": {"columns": {"prompt": "q"}}}, CaftuneError, "no column 'q'.* Fix labels.columns"),
        (label_prompts, {"labels": {"columns": {"promt": "q"}}}, CaftuneError, "labels.columns.promt is not one"),
        (
            label_prompts,
            {"model": {"name": "./nothing"}},
            CaftuneError,
            "model.name must be a folder with a config.json",
        ),
        (pretrain_heads, {}, CaftuneError, "labels.jsonl is missing. Run `caftune label`"),
        (finetune_model, {}, CaftuneError, "heads is missing. Run `caftune pretrain-heads` first"),
        (
            finetune_model,
            {"loss": {"weight": 0}, "data": {"train": None}},
            CaftuneError,
            "data.train must name a file",
        ),
        (
            finetune_model,
            {"loss": {"weight": 0}, "data": {"max_length": 257}},
            CaftuneError,
            "the model's context of 256",
        ),
        (
            finetune_model,
            {"loss": {"weight": 0}, "data": {"columns": {"prompt": "name"}}},
            CaftuneError,
            "must have completions to train on, got",
        ),
        (
            finetune_model,
            {"loss": {"weight": 0}, "data": {"max_length": 5}},
            ValueError,
            "24 of 24 rows of the train data",
        ),
        (export_checkpoint, {}, CaftuneError, "holds no checkpoint"),
    ],
)
def test_wrong_things_are_refused_before_work_starts(values, tmp_path, stage, sections, error, message):
    recipe = recipe_with({**values, "output": str(tmp_path / "new")}, **sections)
    with pytest.raises(error, match=message):
        stage(recipe)
    assert not (tmp_path / "new").exists()


def test_preview_marks_trained_tokens_and_shifts_targets(values):
    tokens, trained, targets = next(preview_rows(Recipe.model_validate(values), 1))
    first = trained.index(True)
    assert tokens[:first] == AutoTokenizer.from_pretrained(BASE).tokenize(
        json.loads(Path(values["data"]["train"]).read_text().splitlines()[0])["name"], add_special_tokens=True
    )
    assert all(trained[first:])
    assert targets[1][first - 1] == tokens[first]
    assert targets[3][first] == tokens[first + 3]
    assert targets[3][-3:] == ["", "", ""]


def test_the_command_line_tells_errors_in_one_line(values, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**values, "output": str(tmp_path / "new")}))
    result = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml"), "los.weight=1"])
    assert result.exit_code == 2
    assert "Error: los is not a key of a recipe. Did you mean loss?" in result.output


def test_the_command_line_previews(values, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    result = CliRunner().invoke(app, ["preview", str(tmp_path / "recipe.yaml"), "--rows", "1"])
    assert result.exit_code == 0
    assert "Row 0:" in result.output
    assert "h=3" in result.output


def test_the_schema_is_json(values):
    schema = json.loads(CliRunner().invoke(app, ["schema"]).output)
    assert schema["required"] == ["output", "model"]
    assert set(values) <= set(schema["properties"])
    described = [schema, *schema["$defs"].values()]
    keys = {key: about for section in described for key, about in section["properties"].items()}
    assert [key for key, about in keys.items() if not {"description", "$ref"} & about.keys()] == []


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from typer.testing import CliRunner; from caftune.cli import app; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0; "
        "assert not {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_separator_stands_between_prompt_and_completion(values):
    plain = next(preview_rows(recipe_with(values), 1))
    separated = next(preview_rows(recipe_with(values, data={"separator": " #"}), 1))
    joined = ["".join(tokens) for tokens, _, _ in (plain, separated)]
    assert "#" not in joined[0]
    assert "#" in joined[1]
    assert sum(separated[1]) == sum(plain[1])  # the separator is not trained on


def test_a_stopped_training_goes_on_from_its_last_epoch(values, tmp_path, capsys):
    trainer = {key: value for key, value in values["trainer"].items() if key not in ("max_steps", "save_steps")}
    recipe = Recipe.model_validate(
        {**values, "output": str(tmp_path), "loss": {"weight": 0}, "trainer": {**trainer, "num_train_epochs": 2}}
    )
    whole = load_file(finetune_model(recipe) / "model.safetensors")
    shutil.rmtree(tmp_path / "train" / "checkpoint-6")
    resumed = load_file(finetune_model(recipe) / "model.safetensors")
    assert "Resuming from" in capsys.readouterr().err
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_messages_for_a_base_without_a_chat_template_are_refused(values, tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    chat = {"train": str(tmp_path / "chat.jsonl"), "eval": None, "columns": {}}
    recipe = recipe_with({**values, "output": str(tmp_path / "new"), "data": chat}, loss={"weight": 0})
    with pytest.raises(CaftuneError, match="must have a chat template for data with messages, got none"):
        finetune_model(recipe)
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("finished")
def test_a_checkpoint_of_another_run_is_not_exported_into_this_one(values, tmp_path):
    run = Recipe.model_validate(values)
    other = tmp_path / "other" / "checkpoint-1"
    other.mkdir(parents=True)
    (other / "config.json").write_text("{}")
    with pytest.raises(CaftuneError, match="it belongs to another run"):
        export_checkpoint(run, str(other))
    with pytest.raises(CaftuneError, match=r"holds no checkpoint\. Run `caftune train` first, or name one of"):
        export_checkpoint(run, str(tmp_path / "other"))
    (tmp_path / "pieces" / "pytorch_model_fsdp_0").mkdir(parents=True)
    with pytest.raises(CaftuneError, match=r"must hold whole weights, got FSDP's pieces.* Run `caftune train` again"):
        export_checkpoint(run, str(tmp_path / "pieces"))


@pytest.mark.filterwarnings("ignore:.*flash:UserWarning")
def test_heads_can_be_pretrained_on_packed_labels(finished, values, tmp_path):
    shutil.copytree(finished / "labels", tmp_path / "out" / "labels")
    recipe = recipe_with({**values, "output": str(tmp_path / "out")}, pretrain={"packing": True})
    assert (pretrain_heads(recipe) / "heads.safetensors").is_file()


@pytest.mark.parametrize("targets", ["tokens", "model"])
def test_heads_can_be_pretrained_on_text_without_labels(values, tmp_path, targets):
    text = values["labels"]["prompts"]
    recipe = recipe_with(
        {**values, "output": str(tmp_path / "out")},
        heads={"text": text, "targets": targets},
        labels={"columns": {"prompt": "name", "completion": "smiles"}},
    )
    heads = pretrain_heads(recipe)
    result = json.loads((tmp_path / "out" / "results.jsonl").read_text())
    assert result["quality"]["heads"]["loss"]["2"] < result["quality"]["untrained"]["loss"]["2"]
    assert json.loads((heads / "heads.json").read_text())["training"]["soft_targets"] is (targets == "model")
    assert not (tmp_path / "out" / "labels").exists()


def whole_or_alone(values, folder, base=BASE, **lora):
    """A plain LoRA run's recipe."""
    model = {"name": str(base), "tuning": "lora", "lora": {"r": 4, **lora}}
    trainer = {"learning_rate": 1e-2, "max_steps": 2}
    return recipe_with({**values, "output": str(folder), "model": model}, loss={"weight": 0}, trainer=trainer)


@pytest.mark.parametrize("again", [export_checkpoint, finetune_model])
def test_an_adapter_alone_and_a_whole_model_take_each_others_place(values, rows, tmp_path, again):
    merged, alone = (whole_or_alone(values, tmp_path, merge=merge) for merge in (True, False))
    model = finetune_model(alone)
    adapter = load_file(model / "adapter_model.safetensors")
    expected = logits_of(AutoPeftModelForCausalLM.from_pretrained(model), rows)
    again(merged)
    found = logits_of(AutoModelForCausalLM.from_pretrained(model), rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)  # float32: W x + B A x, (W + B A) x
    assert "An ordinary checkpoint" in (model / "README.md").read_text()
    again(alone)
    found = load_file(model / "adapter_model.safetensors")
    assert all(torch.equal(found[key], value) for key, value in adapter.items())
    assert not [*model.glob("config.json"), *model.glob("model*.safetensors")]
    assert "An adapter" in (model / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(model).get_vocab() == AutoTokenizer.from_pretrained(BASE).get_vocab()


def test_the_adapter_of_a_base_that_is_published_quantised_is_exported_alone(values, tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    merged, alone = (
        whole_or_alone(values, tmp_path / "run", tmp_path / "base", merge=merge) for merge in (True, False)
    )
    model = finetune_model(alone)
    shutil.rmtree(model)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(CaftuneError, match="which is published quantised: an adapter cannot be merged into it"):
        export_checkpoint(merged)
    assert (export_checkpoint(alone) / "adapter_model.safetensors").is_file()


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A base that is not tied, a chat template, and a tokenizer with another end and one token more."""
    folder = tmp_path_factory.mktemp("chat")
    untied(folder / "base")
    (folder / "chat.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = (folder / "chat.jinja").read_text()
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # PEFT's news of added tokens
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize(
    "options", [{"eos_token": "<unk>"}, {"chat_template_path": "chat.jinja"}, {"chat_template_path": "tokenizer"}]
)
def test_export_writes_the_tokenizer_and_the_end_tokens_that_train_writes(values, chat, tmp_path, tuning, options):
    options = {name: str(chat / value) if "path" in name else value for name, value in options.items()}
    recipe = whole_or_alone(values, tmp_path, chat / "base")
    model = {**recipe.model.model_dump(), "tuning": tuning}
    recipe = Recipe.model_validate({**recipe.model_dump(), "model": model, "trainer": {**recipe.trainer, **options}})
    folder = finetune_model(recipe)
    (tokenizer, trained), (again, exported) = (
        (AutoTokenizer.from_pretrained(found), AutoModelForCausalLM.from_pretrained(found))
        for found in (folder.rename(tmp_path / "first"), export_checkpoint(recipe))
    )
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (again.eos_token, again.chat_template) == (tokenizer.eos_token, tokenizer.chat_template)
    assert exported.config.to_dict() | {"_name_or_path": ""} == trained.config.to_dict() | {"_name_or_path": ""}
    ends, expected = (found.generation_config.eos_token_id for found in (exported, trained))
    # Where the template is another tokenizer's, TRL lets the base's own end go; here it stays as a second one.
    assert ends in (expected, [expected, 1])
    for key, value in trained.state_dict().items():
        torch.testing.assert_close(exported.state_dict()[key], value, rtol=0, atol=1e-6)
