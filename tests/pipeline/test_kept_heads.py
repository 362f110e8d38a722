"""Heads that are kept: `heads.keep`, `caftune generate`, and what their drafts are worth."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_adaptation import TRAINER, recipe_in, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from caftune.checkpoints.heads_folder import load_heads
from caftune.cli import app
from caftune.compare.runner import compare
from caftune.core.backbone import Backbone
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.pipeline.finetune import export_checkpoint, finetune_model
from caftune.pipeline.schema import Recipe

PROMPTS = ["2-chloropropane: ", "ethanol: ", "methyl 2-phenoxyacetate: "]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def kept(heads, tmp_path_factory):
    """A run that keeps its heads by the preset, one that keeps them frozen, one with a LoRA of the model and of the heads."""
    folder = tmp_path_factory.mktemp("kept")
    write_rows(folder / "data.jsonl", seed=5)
    common = {
        "data": {"train": str(folder / "data.jsonl")},
        "adapt": None,
        "trainer": {**TRAINER, "learning_rate": 1e-2},
    }
    path = {"path": heads, "keep": True}
    finetune_model(recipe_in(folder, "preset", **common, heads=path))
    finetune_model(recipe_in(folder, "frozen", **common, heads={**path, "train": False}))
    lora = {"name": str(BASE), "tuning": "lora", "lora": {"r": 4}}
    finetune_model(recipe_in(folder, "lora", **common, model=lora, heads={**path, "lora_rank": 2}))
    return folder


def loaded(run):
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    return Backbone.of(model), AutoTokenizer.from_pretrained(run / "model")


@pytest.mark.parametrize("run", ["preset", "frozen", "lora"])
def test_kept_heads_are_those_of_the_exported_model(kept, run, heads):
    backbone, tokenizer = loaded(kept / run)
    load_heads(kept / run / "model-heads", backbone, tokenizer)  # not by force
    with pytest.raises(CaftuneError, match="other weights|another base|base"):
        load_heads(heads, backbone, tokenizer)


def test_the_preset_trains_them_along_and_frozen_ones_stay(kept, heads):
    trained, frozen, before = (
        load_file(folder / "heads.safetensors")
        for folder in (kept / "preset" / "model-heads", kept / "frozen" / "model-heads", Path(heads))
    )
    assert all(torch.equal(frozen[name], value) for name, value in before.items())
    assert any(not torch.equal(trained[name], value) for name, value in before.items())
    last = kept / "preset" / "train" / "checkpoint-3" / "heads" / "heads.safetensors"
    assert all(torch.equal(trained[name], value) for name, value in load_file(last).items())


def test_heads_json_says_which_it_was(kept):
    said = {
        run: json.loads((kept / run / "model-heads" / "heads.json").read_text())["training"]
        for run in ("preset", "frozen", "lora")
    }
    assert [said[run]["train_heads"] for run in said] == [True, False, True]
    assert [said[run]["aux_schedule"] for run in said] == ["sine", "sine", "sine"]
    assert said["lora"]["heads_lora_rank"] == 2
    assert said["preset"]["aux_weight"] == 0.01
    assert {(run["stage"], run["steps"]) for run in said.values()} == {(2, 3)}


def test_the_preset_gives_way_to_what_the_recipe_says():
    values = {"output": "run", "model": {"name": str(BASE)}}
    for heads, loss, expected in (
        ({"keep": True}, {}, (True, "sine")),
        ({"keep": True, "train": False}, {}, (False, "sine")),
        ({"keep": True}, {"schedule": "constant"}, (True, "constant")),
        ({}, {}, (True, "reflected_sine")),
    ):
        recipe = Recipe.model_validate({**values, "heads": heads, "loss": loss})
        assert (recipe.heads.train, recipe.loss.schedule) == expected
        again = Recipe.model_validate(recipe.model_dump())
        assert again == recipe


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": {"weight": 0.0}}, "heads.keep needs loss.weight above 0"),
        (
            {"model": {"name": str(BASE), "tuning": "lora", "lora": {"merge": False}}},
            "heads.keep needs model.lora.merge",
        ),
    ],
)
def test_heads_that_cannot_be_kept_are_refused_before_training(kept, heads, changes, said):
    data = {"train": str(kept / "data.jsonl")}
    recipe = recipe_in(kept, "x", **{"adapt": None, "data": data, "heads": {"path": heads, "keep": True}, **changes})
    with pytest.raises(CaftuneError, match=said):
        finetune_model(recipe)
    assert not (kept / "x").exists()


def test_a_comparison_keeps_no_heads(kept, heads):
    data = {"train": str(kept / "data.jsonl"), "eval": str(kept / "data.jsonl")}
    with pytest.raises(CaftuneError, match="heads.keep must be false in a comparison"):
        compare(recipe_in(kept, "x", adapt=None, data=data, heads={"path": heads, "keep": True}))


def test_kept_heads_follow_the_checkpoint_that_is_exported(kept, heads, tmp_path):
    data, trainer = {"train": str(kept / "data.jsonl")}, {**TRAINER, "learning_rate": 1e-2, "save_strategy": "steps"}
    recipe = recipe_in(
        tmp_path,
        **{"data": data, "adapt": None, "heads": {"path": heads, "keep": True}},
        trainer={**trainer, "save_steps": 1},
    )
    finetune_model(recipe)
    run = tmp_path / "run"
    last = load_file(run / "model-heads" / "heads.safetensors")
    export_checkpoint(recipe, str(run / "train" / "checkpoint-2"))
    found = load_file(run / "model-heads" / "heads.safetensors")
    expected = load_file(run / "train" / "checkpoint-2" / "heads" / "heads.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(not torch.equal(found[name], value) for name, value in last.items())
    backbone, tokenizer = loaded(run)
    load_heads(run / "model-heads", backbone, tokenizer)  # not by force
    assert json.loads((run / "model-heads" / "heads.json").read_text())["training"]["steps"] == 2


def test_generate_writes_what_the_model_writes(kept, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPTS[2]}) + "\n")
    run = kept / "preset"
    options = ["--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", 30, "--alone", "--json"]
    result = invoke("generate", run / "model", run / "model-heads", *PROMPTS[:2], *options)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run / "model"), AutoTokenizer.from_pretrained(run / "model")
    config = GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[
            0, ids.shape[1] :
        ].tolist()
        assert row["ids"] == expected
        assert row["same"] is True
        assert row["prompt"] + row["text"] == tokenizer.decode(ids[0].tolist() + expected, skip_special_tokens=True)
        assert row["tokens"] == len(expected)
        assert row["passes"] <= row["tokens"]
    assert "passes of the model" in result.stderr
    assert "The same answers: 3 of 3" in result.stderr


def test_generate_repeats_samples_of_a_seed(kept):
    run = kept / "preset"
    options = ["--max-new-tokens", 20, "--temperature", 1.5, "--top-k", 20, "--repetition-penalty", 1.2, "--json"]
    one, two, other = (
        invoke("generate", run / "model", run / "model-heads", *PROMPTS, *options, "--seed", seed).stdout
        for seed in (1, 1, 2)
    )
    texts = [[json.loads(line)["text"] for line in said.splitlines()] for said in (one, two, other)]
    assert texts[0] == texts[1] != texts[2]


def test_generate_stops_at_a_stop_string(heads):
    def text(*options):
        said = invoke("generate", BASE, heads, PROMPTS[0], "--max-new-tokens", 20, "--json", *options)
        return json.loads(said.stdout.splitlines()[0])["text"]

    whole = text()
    stop = whole[len(whole) // 2]
    assert text("--stop", stop) == whole[: whole.index(stop) + 1] != whole


def test_heads_of_the_base_draft_for_its_child(kept, heads):
    result = invoke("generate", kept / "preset" / "model", heads, PROMPTS[0], "--max-new-tokens", 10, "--alone")
    assert result.exit_code == 0, result.output
    assert "The same answers: 1 of 1" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["/nowhere", "{heads}", "x"],
            "MODEL must be a folder with a config.json or a hub id, got /nowhere, which does not exist",
        ),
        (["{model}", "/nowhere", "x"], "/nowhere must be a folder with heads.json"),
        (["{model}", "{heads}"], "A prompt must be given, got none"),
        (["{model}", "{heads}", "x", "--max-new-tokens", "100000"], "--max-new-tokens must be at most"),
        (["{model}", "{heads}", "x", "--repetition-penalty", "0"], "--repetition-penalty must be above 0, got 0.0"),
        (["{model}", "{heads}", "x", "--draft", "9"], "--draft must be at most 3, the number of heads, got 9"),
        (["{model}", "{heads}", "x", "--top-p", "0.9"], "--temperature must be above 0 for --top-p and --top-k, got 0"),
        (["{model}", "{heads}", "x", "--top-k", "5"], "--temperature must be above 0 for --top-p and --top-k, got 0"),
    ],
)
def test_what_cannot_be_written_is_told_in_one_line(kept, arguments, said):
    places = {"model": kept / "preset" / "model", "heads": kept / "preset" / "model-heads"}
    result = invoke("generate", *(argument.format(**places) for argument in arguments))
    assert result.exit_code == 2
    assert said in result.stderr


@pytest.mark.parametrize("named", [True, False])
def test_info_measures_what_drafts_are_worth(kept, named, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    model = ["--model", kept / "preset" / "model"] if named else []  # else that beside the heads
    options = ["--measure", tmp_path / "prompts.jsonl", *model, "--max-new-tokens", 20, "--limit", 2]
    result = invoke("heads", "info", kept / "preset" / "model-heads", *options)
    assert result.exit_code == 0, result.output
    assert "a draft." in result.output
    assert "The same answers: 2 of 2" in result.output
