"""CAFTPlugin in real Axolotl, on a tiny Llama: its losses are CAFTTrainer's, and its result is an ordinary checkpoint."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from trainers import config
from transformers import AutoModelForCausalLM, AutoTokenizer

from caftune import CAFTTrainer
from caftune.demo.run import BASE

ROOT = Path(__file__).parents[2]
ROWS, STEPS = 8, 3
PLUGIN = "caftune.integrations.axolotl.CAFTPlugin"
COMMON = {
    "base_model": str(BASE),
    "sequence_len": 256,
    "attn_implementation": "sdpa",
    "micro_batch_size": ROWS,
    "gradient_accumulation_steps": 1,
    "max_steps": STEPS,
    "num_epochs": STEPS,
    "optimizer": "adamw_torch",
    "learning_rate": 1e-3,
    "lr_scheduler": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 1.0,
    "bf16": False,
    "fp16": False,
    "logging_steps": 1,
    "save_steps": STEPS,
    "val_set_size": 0,
    "seed": 42,
    "dataset_num_proc": 1,
}
PACKED = {"sample_packing": True, "micro_batch_size": 2}
LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_linear": True,
    **{f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")},
}
AUXILIARY = {"weight": 0.5, "schedule": "constant"}  # large enough to be seen in the weights
STAGE_ONE = {"pretrain_heads": True, "num_heads": 2}


def write(folder, name, **options):
    data = [{"path": str(folder / "rows.jsonl"), "ds_type": "json", "type": ""}]
    places = {"output_dir": str(folder / name), "dataset_prepared_path": str(folder / "prepared")}
    options = {**COMMON, "datasets": data, **places, **options}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(options))


@pytest.fixture(scope="module")
def tokenized(rows):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    made = []
    for row in rows.select(range(ROWS)):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        made.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return made


@pytest.fixture(scope="module")
def runs(peer, tokenized, tmp_path_factory):
    """The folder of all runs: two by Axolotl's command, the others by the function that it calls, in one process."""
    python, folder = peer("axolotl") / "bin" / "python", tmp_path_factory.mktemp("axolotl")
    lines = [json.dumps({**row, "attention_mask": [1] * len(row["input_ids"])}) for row in tokenized]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(BASE),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    adapted.save_pretrained(folder / "adapter")
    given = {"heads": str(folder / "one"), **AUXILIARY}
    write(folder, "one", plugins=[PLUGIN], caft=STAGE_ONE)
    write(folder, "bare")
    write(folder, "absent", plugins=[PLUGIN])
    write(folder, "zero", plugins=[PLUGIN], caft={**given, "weight": 0})
    write(folder, "one_packed", plugins=[PLUGIN], caft=STAGE_ONE, **PACKED)
    write(folder, "full", plugins=[PLUGIN], caft=given)
    write(folder, "full_packed", plugins=[PLUGIN], caft=given, **PACKED)
    write(
        folder, "lora", plugins=[PLUGIN], caft={**given, "train": False}, lora_model_dir=str(folder / "adapter"), **LORA
    )
    kernels = {"lora_qkv_kernel": True, "lora_o_kernel": True}  # those that also run on a CPU
    write(folder, "lora_packed", plugins=[PLUGIN], caft=given, **{**LORA, **PACKED, **kernels})
    write(folder, "other", plugins=[PLUGIN], caft=given, base_model=other_base(folder))
    write(folder, "preferences", plugins=[PLUGIN], caft=given, rl="dpo")
    names = [path.stem for path in sorted(folder.glob("*.yaml")) if path.stem not in ("one", "bare")]
    environment = {
        **os.environ,
        **{"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        "PYTHONPATH": str(ROOT),
    }
    command = ["-m", "axolotl.cli.train"]  # "bare" in a separate process, which the plugin never enters
    together = [Path(__file__).with_name("axolotl_runs.py"), folder, *names]
    for arguments in ([*command, folder / "one.yaml"], [*command, folder / "bare.yaml"], together):
        with (folder / "log").open("a") as log:
            subprocess.run([python, *arguments], env=environment, cwd=folder, stdout=log, stderr=log, check=True)
    return folder


def other_base(folder):
    """The base with other weights in its last layer."""
    model = AutoModelForCausalLM.from_pretrained(BASE)
    with torch.no_grad():
        model.model.layers[-1].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder / "base")
    return str(folder / "base")


def logged(runs, name):
    """What a run logged in each step."""
    error = runs / f"{name}.error"
    assert not error.exists(), error.read_text()
    state = json.loads((runs / name / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def reference(folder, tokenized, model=str(BASE), **options):
    """The same with CAFTTrainer."""
    options = {
        "per_device_train_batch_size": ROWS,
        "max_steps": STEPS,
        "max_length": 256,
        "lr_scheduler_type": "constant",
        **options,
    }
    trainer = CAFTTrainer(model, config(folder, **options), train_dataset=Dataset.from_list(tokenized))
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry], trainer


def assert_close(found, expected):
    assert len(found) == len(expected) == STEPS
    names = [name for name in expected[0] if name.endswith(("loss", "_weight", "_accuracy"))]
    assert {"h2_loss", "h3_loss"} <= set(names)
    for one, other in zip(found, expected, strict=True):
        assert {name: one[name] for name in names if name in one} == pytest.approx(
            {name: other[name] for name in names if name in one}, abs=1e-5
        )
        assert {"h2_loss", "h3_loss"} <= set(one)


def test_stage_one_gives_the_heads_that_CAFTTrainer_gives(runs, tokenized, tmp_path):
    expected, trainer = reference(tmp_path, tokenized, pretrain_heads=True, num_heads=2)
    trainer.export(tmp_path / "heads")
    assert_close(logged(runs, "one"), expected)
    mine, theirs = (load_file(folder / "heads.safetensors") for folder in (tmp_path / "heads", runs / "one"))
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        torch.testing.assert_close(theirs[key], value, atol=1e-5, rtol=1e-4)
    assert not list((runs / "one").glob("*model*.safetensors"))


@pytest.mark.parametrize("packed", ["one", "full"])
def test_packed_rows_have_the_losses_of_unpacked_ones(packed, runs):
    assert_close(logged(runs, f"{packed}_packed"), logged(runs, packed))


def test_stage_two_in_full_has_the_losses_of_CAFTTrainer(runs, tokenized, tmp_path):
    expected, _ = reference(tmp_path, tokenized, heads=str(runs / "one"), aux_weight=0.5, aux_schedule="constant")
    assert_close(logged(runs, "full"), expected)


def test_stage_two_through_LoRA_has_the_losses_of_CAFTTrainer(runs, tokenized, tmp_path):
    options = {"heads": str(runs / "one"), "aux_weight": 0.5, "aux_schedule": "constant", "train_heads": False}
    expected, _ = reference(tmp_path, tokenized, str(runs / "adapter"), **options)
    assert_close(logged(runs, "lora"), expected)


def test_a_new_adapter_begins_with_the_losses_of_the_base(runs):
    first, full = logged(runs, "lora_packed")[0], logged(runs, "full")[0]
    assert {key: first[key] for key in ("h2_loss", "h3_loss")} == pytest.approx(
        {key: full[key] for key in ("h2_loss", "h3_loss")}, abs=1e-5
    )


@pytest.mark.parametrize("name", ["absent", "zero"])
def test_without_weight_or_section_it_is_axolotl_bit_for_bit(name, runs):
    ours, plain = logged(runs, name), logged(runs, "bare")
    assert [(one["loss"], one["grad_norm"]) for one in ours] == [(one["loss"], one["grad_norm"]) for one in plain]
    mine, theirs = (load_file(runs / folder / "model.safetensors") for folder in (name, "bare"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("folder", ["full", "full_packed", f"full/checkpoint-{STEPS}", "zero"])
def test_a_model_is_saved_with_the_keys_of_its_base(folder, runs):
    base = load_file(BASE / "model.safetensors")
    saved = load_file(runs / folder / "model.safetensors")
    assert {key: value.shape for key, value in saved.items()} == {key: value.shape for key, value in base.items()}
    AutoModelForCausalLM.from_pretrained(runs / folder)


@pytest.mark.parametrize("folder", ["lora", "lora_packed", f"lora_packed/checkpoint-{STEPS}"])
def test_an_adapter_is_saved_without_that_of_the_heads(folder, runs):
    saved = load_file(runs / folder / "adapter_model.safetensors")
    assert saved.keys() == load_file(runs / "adapter" / "adapter_model.safetensors").keys()


def test_trained_heads_are_kept_in_checkpoints_only(runs):
    assert (runs / "full" / f"checkpoint-{STEPS}" / "heads" / "heads.safetensors").is_file()
    assert not (runs / "full" / "heads").exists()


def test_the_log_says_which_heads_are_active_and_their_first_losses(runs):
    log = (runs / "log").read_text()
    assert "CAFT, stage 1: 2 decoder heads (horizons 2 to 3, new) are trained; the model stays as it is." in log
    assert (
        f"CAFT, stage 2: 2 decoder heads (horizons 2 to 3, {runs / 'one'}), trained with the model, weight 0.5 constant."
        in log
    )
    assert f"CAFT: first losses of the heads, step 1: h2_loss {logged(runs, 'one')[0]['h2_loss']:.3f}, h3_loss " in log


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other", "were trained for .* differs in its last_layer"),
        ("preferences", "rl must not be set with a caft section, got 'dpo'"),
    ],
)
def test_what_does_not_work_is_one_error(name, words, runs):
    assert re.search(f"^CaftuneError: .*{words}", (runs / f"{name}.error").read_text())
