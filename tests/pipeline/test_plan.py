"""The plan says what really happens: parameters to the last one, operations within 5%, memory within 15%."""

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from trainers import config as caft_config
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
)
from trl import SFTConfig, SFTTrainer
from typer.testing import CliRunner

from caftune import AuxiliaryHeads, Backbone, CAFTTrainer, HeadsConfig, save_heads
from caftune.cli import app
from caftune.demo.run import BASE
from caftune.pipeline.plan import measure_rows, plan, print_plan
from caftune.pipeline.schema import Recipe
from caftune.training.estimate import estimate, meta_model
from caftune.training.flops import Step, anatomy_of, flops, overhead
from caftune.training.measured_cost import FlopCount
from caftune.training.memory import state_bytes
from caftune.training.run_setup import Setup

ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
QWEN = {
    "vocab_size": 151936,
    "head_dim": 128,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
LLAMA = {"vocab_size": 128256, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
PUBLIC = {
    "Qwen3-0.6B": Qwen3Config(hidden_size=1024, intermediate_size=3072, tie_word_embeddings=True, **QWEN),
    "Llama-3.1-8B": LlamaConfig(hidden_size=4096, intermediate_size=14336, **LLAMA),
}
# Step FLOPs over an SFT step, K = 4, 1024 tokens, all labelled: full, heads trained; heads and unembedding frozen; LoRA.
TABLE = {"Qwen3-0.6B": (2.06, 1.77, 2.02), "Llama-3.1-8B": (1.39, 1.27, 1.39)}


def small(family, vocabulary=512, width=64):
    shape = {"vocab_size": vocabulary, **ENDS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    sizes = {"hidden_size": width, "intermediate_size": width * 43 // 16}
    if family == "gpt2":
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2Config(n_embd=width, n_layer=3, n_head=4, n_positions=512, **dropout, **shape)
    if family == "qwen3":
        return Qwen3Config(head_dim=32, tie_word_embeddings=True, **sizes, **heads, **shape)
    return LlamaConfig(**sizes, **heads, **shape)


def adapter(family):
    return LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2"
    )


@pytest.fixture(scope="module")
def anatomies():
    found = {}
    for name, config in PUBLIC.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        found[name] = anatomy_of(model, list(model.model.layers))
    return found


@pytest.mark.parametrize("model", TABLE)
def test_the_table_of_step_operations_is_reproduced(anatomies, model):
    whole = Step(1024, 1.0, heads=4)
    frozen = replace(whole, trains_unembedding=False)
    steps = [replace(whole, trains_heads=True), frozen, replace(frozen, trains="adapters")]
    for step, expected in zip(steps, TABLE[model], strict=True):
        assert abs(overhead(anatomies[model], step) - expected) < 0.006


def test_the_forward_pass_of_four_heads_is_two_fifths_of_an_8b_model(anatomies):
    """forward K (P_l + P_u) / (P_t + P_u) = 39.6% for Llama-3.1-8B and K = 4, attention left out."""
    step = Step(1e9, 1.0, heads=4, attention_share=0.0)
    ratio = (
        flops(anatomies["Llama-3.1-8B"], step).forward
        / flops(anatomies["Llama-3.1-8B"], replace(step, heads=0)).forward
    )
    assert abs(ratio - 1.396) < 5e-4


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("kind", ["decoder", "mlp"])
def test_parameters_are_those_of_the_real_model(family, kind):
    real = AutoModelForCausalLM.from_config(small(family))
    heads = AuxiliaryHeads.build(Backbone.of(real), HeadsConfig(3, kind))
    found = estimate(small(family), Setup(heads=3, head_kind=kind, batch_size=1, length=16)).parameters
    total = sum(p.numel() for p in real.parameters())
    is_tied = real.get_output_embeddings().weight is real.get_input_embeddings().weight
    assert is_tied == (family != "llama")
    assert found.total == found.trained == total
    assert found.heads == sum(p.numel() for p in heads.parameters())
    own = 0 if is_tied else found.unembedding
    assert found.trunk == total - found.embeddings - own
    assert found.trained_heads == 0


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_a_lora_has_as_many_trained_parameters_as_peft_makes(family):
    real = get_peft_model(AutoModelForCausalLM.from_config(small(family)), adapter(family))
    setup = Setup(tuning="lora", batch_size=1, length=16)
    found = estimate(small(family), setup, adapter(family)).parameters
    assert found.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert found.total == sum(p.numel() for name, p in real.named_parameters() if "lora_" not in name)


def test_stage_one_trains_the_heads_and_a_lora_on_heads_less():
    heads = estimate(small("llama"), Setup(stage="heads", batch_size=1, length=16)).parameters
    assert heads.trained == heads.trained_heads == heads.heads
    lora = estimate(small("llama"), Setup(trains_heads=True, heads_lora_rank=2, batch_size=1, length=16)).parameters
    assert 0 < lora.trained_heads < heads.heads / 5


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_frozen_unembedding_is_not_trained_and_costs_less(family, tmp_path):
    plain = Setup(batch_size=1, length=16)
    free, frozen = (estimate(small(family), replace(plain, freezes_unembedding=on)) for on in (False, True))
    assert free.parameters.trained - frozen.parameters.trained == free.parameters.unembedding
    assert frozen.flops.unembedding < free.flops.unembedding
    assert frozen.memory.peak < free.memory.peak
    values = {
        "output": str(tmp_path),
        "model": {"name": str(BASE), "freeze_unembedding": True},
        "trainer": {"use_cpu": True},
    }
    assert plan(Recipe.model_validate(values)).setup.freezes_unembedding


def trainer_of(config, folder, *, lora=None, heads=4, batch=2, length=64, labelled=0.5, attention="eager", **options):
    """A trainer of a random model of this configuration, all rows alike, the last part of each labelled."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = torch.randint(3, config.vocab_size, (4 * batch, length))
    labels = ids.clone()
    labels[:, : round(length * (1 - labelled))] = -100
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    options = {"per_device_train_batch_size": batch, "max_length": None, "max_steps": 1, **options}
    given = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": lora}
    if heads == 0:
        plain = {**vars_of(caft_config(folder, aux_weight=0.0, **options)), "output_dir": str(folder)}
        return SFTTrainer(model, SFTConfig(**plain), **given)
    backbone = Backbone.of(model)
    save_heads(folder / "heads", AuxiliaryHeads.build(backbone, HeadsConfig(heads)), backbone, tokenizer)
    return CAFTTrainer(model, caft_config(folder / "out", heads=str(folder / "heads"), **options), **given)


def vars_of(args):
    names = ("max_steps", "per_device_train_batch_size", "max_length", "gradient_checkpointing", "use_cpu", "bf16")
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "dataloader_pin_memory": False}
    return {**{name: getattr(args, name) for name in names}, **quiet}


def planned(config, trainer, *, lora=None, heads=4, batch=2, length=64, labelled=0.5, attention="eager"):
    """The estimate for what `trainer_of` built."""
    config._attn_implementation = attention
    args = trainer.args
    setup = Setup(
        stage="heads" if getattr(args, "pretrain_heads", False) else "train",
        tuning="full" if lora is None else "lora",
        heads=heads,
        trains_heads=getattr(args, "train_heads", False),
        target_share=getattr(args, "aux_target_share", 1.0),
        batch_size=batch,
        accumulation=args.gradient_accumulation_steps,
        length=length,
        mean_length=length,
        labelled=labelled,
        checkpointing=args.gradient_checkpointing,
        optimizer=str(args.optim.value),
    )
    return setup, estimate(config, setup, lora)


MODES = {
    "plain": {"heads": 0},
    "heads trained": {},
    "LoRA, checkpointed": {"lora": True, "gradient_checkpointing": True},
    "LoRA, a quarter of the rows, heads frozen": {"lora": True, "aux_target_share": 0.25, "train_heads": False},
    "stage 1": {"pretrain_heads": True},
    "all labelled, heads frozen": {"labelled": 1.0, "train_heads": False},
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize(
    ("family", "mode"),
    [*(("llama", mode) for mode in MODES), ("qwen3", "heads trained"), ("gpt2", "LoRA, checkpointed")],
)
def test_operations_are_those_of_a_real_step(family, mode, tmp_path, monkeypatch):
    """Attention written out computes the whole square of a row, so the plan is asked for that here."""
    options = dict(MODES[mode])
    lora = adapter(family) if options.pop("lora", False) else None
    shape = {name: options.pop(name) for name in ("heads", "labelled") if name in options}
    trainer = trainer_of(small(family), tmp_path, lora=lora, **shape, **options)
    with FlopCount() as counter:
        trainer.train()
    monkeypatch.setattr("caftune.training.estimate.ATTENTION_SHARE", 1.0)
    _, found = planned(small(family), trainer, lora=lora, **shape)
    assert abs(found.flops.total * 2 * 64 / counter.total - 1) < 0.05


def test_operations_of_padding_are_those_of_a_real_step(tmp_path, monkeypatch):
    trainer = trainer_of(small("llama"), tmp_path)
    ids = [list(range(3, 67)), list(range(3, 19))]
    trainer.train_dataset = Dataset.from_dict({"input_ids": ids, "labels": ids})
    with FlopCount() as counter:
        trainer.train()
    monkeypatch.setattr("caftune.training.estimate.ATTENTION_SHARE", 1.0)
    rows = measure_rows(trainer.train_dataset, 64, 2)
    shape = {"length": 64, "mean_length": 40, "labelled": rows.labelled, "padding": rows.padded_length / 40}
    config = small("llama")
    config._attn_implementation = "eager"
    found = estimate(config, Setup(batch_size=2, trains_heads=True, checkpointing=False, is_padded=True, **shape))
    assert abs(found.flops.total * 80 / counter.total - 1) < 0.05


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize(("vocabulary", "tuning"), [(512, "lora"), (8192, "full"), (8192, "lora")])
def test_peak_memory_is_that_of_a_real_run(vocabulary, tuning, tmp_path):
    """In a process of its own: what other tests have left would be taken for the step's, or would serve it."""
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "step_memory.py"),
        str(tmp_path),
        str(vocabulary),
        tuning,
    ]
    paths = os.pathsep.join(sys.path)  # for the helpers of these tests
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True, check=True
    )
    found, expected = map(int, done.stdout.splitlines()[-1].split())
    assert abs(expected / found - 1) < 0.15


def test_peak_does_not_grow_with_the_number_of_heads_beyond_their_weights():
    one, eight = (
        estimate(small("llama"), Setup(heads=k, batch_size=4, length=256, mean_length=256)).memory for k in (1, 8)
    )
    assert eight.peak - eight.heads == one.peak - one.heads
    assert eight.heads == 8 * one.heads


def test_checkpointing_and_fewer_rows_need_less():
    setup = Setup(batch_size=8, length=256, mean_length=256, checkpointing=False)
    whole = estimate(small("llama"), setup).memory
    assert estimate(small("llama"), replace(setup, checkpointing=True)).memory.activations < whole.activations / 5
    half = estimate(small("llama"), replace(setup, batch_size=4)).memory.activations
    assert 0.49 < half / whole.activations < 0.52


@pytest.mark.parametrize(
    ("name", "expected"),
    [("adamw_torch", 800), ("sgd", 0), ("adamw_bnb_8bit", 800), ("adafactor", 80), ("lion_32bit", 800)],
)
def test_the_state_of_an_optimizer(name, expected):
    found, is_known = state_bytes(name, [torch.nn.Parameter(torch.zeros(10, 10))], torch.nn.Identity())
    assert found == expected
    assert is_known == (name != "lion_32bit")


@pytest.fixture
def folder(tmp_path):
    """A base without its weights, so that nothing can load them, and some rows."""
    (tmp_path / "base").mkdir()
    for file in BASE.iterdir():
        if "safetensors" not in file.name:
            shutil.copy(file, tmp_path / "base")
    lines = [json.dumps({"prompt": "a name\n", "completion": "CCO" * (1 + i % 3)}) for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path


def recipe_of(folder, **sections):
    model = {"name": str(folder / "base"), **sections.pop("model", {})}
    return Recipe(output=str(folder / "run"), model=model, data={"train": str(folder / "rows.jsonl")}, **sections)


def test_a_plan_needs_neither_weights_nor_heads(folder):
    found = plan(recipe_of(folder, model={"tuning": "lora"}))
    assert found.rows.read == 20
    assert 0 < found.rows.labelled < 1
    assert found.fits
    assert not (folder / "run").exists()


def test_what_cannot_be_read_is_assumed_and_said(folder):
    found = plan(recipe_of(folder), stage="heads")
    assert "does not exist yet" in found.rows.assumed
    assert found.setup.labelled == 0.5
    assert found.setup.stage == "heads"


def test_remedies_come_in_order_until_it_fits(folder, monkeypatch):
    monkeypatch.setattr("caftune.training.memory._PROCESS", 0)  # of which a model of this size is a small part
    options = {"gradient_checkpointing": False, "per_device_train_batch_size": 16}
    recipe = recipe_of(folder, trainer=options, heads={"train": False})
    whole = plan(recipe).estimate.memory.peak
    monkeypatch.setattr("caftune.pipeline.plan._device", lambda: ("a small device", whole // 2, 0))
    found = plan(recipe)
    assert not found.fits
    assert [remedy.change.split("=")[0] for remedy in found.remedies[:2]] == [
        "trainer.gradient_checkpointing",
        "trainer.per_device_train_batch_size",
    ]
    peaks = [remedy.peak for remedy in found.remedies]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] <= whole // 2 < peaks[-2]


@pytest.mark.parametrize(
    ("sections", "ways"),
    [
        ({}, "full, 4 heads trained along"),
        ({"heads": {"train": False}}, "full, 4 heads frozen"),
        ({"loss": {"weight": 0}}, "full, 0 heads"),
    ],
)
def test_a_plan_names_whether_heads_are_trained_and_frozen_ones_as_the_cheaper_change(
    folder, monkeypatch, sections, ways
):
    monkeypatch.setattr("caftune.pipeline.plan._device", lambda: ("a small device", 1, 0))
    found = plan(recipe_of(folder, trainer={"per_device_train_batch_size": 1}, **sections))
    console = Console(file=io.StringIO(), record=True, width=200)
    print_plan(console, found)
    assert f"({ways})" in " ".join(console.export_text().split())  # a title may go on in a second line
    changes = [remedy.change for remedy in found.remedies]
    assert "model.tuning=lora" in changes
    assert changes[0] == ("model.tuning=lora" if sections else "heads.train=false")


def test_by_default_a_loras_heads_are_planned_as_a_lora_and_cost_less_than_in_full():
    kinds = [{"trains_heads": False}, {"trains_heads": True}, {"trains_heads": True, "heads_lora_rank": 0}]
    setups = [Setup(tuning="lora", batch_size=1, length=64, mean_length=64, **kind) for kind in kinds]
    found = [estimate(small("llama"), setup, LoraConfig(r=8, target_modules=["q_proj"])) for setup in setups]
    frozen, along, full = (one.parameters.trained_heads for one in found)
    assert frozen == 0 < along < full == found[2].parameters.heads
    wide = [replace(setup, heads_lora_rank=8) for setup in setups[1:2]]  # the adapters' rank, though on other layers
    assert estimate(small("llama"), *wide, LoraConfig(r=2, target_modules=["q_proj"])).parameters.trained_heads == along
    assert found[0].flops.total < found[1].flops.total < found[2].flops.total


def test_the_command_prints_a_table_or_json(folder):
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {"output": "run", "model": {"name": str(folder / "base")}, "data": {"train": str(folder / "rows.jsonl")}}
        )
    )
    shown = CliRunner().invoke(app, ["plan", str(recipe), "loss.weight=0"])
    assert shown.exit_code == 0
    assert "It fits" in shown.output
    found = json.loads(CliRunner().invoke(app, ["plan", str(recipe), "--json"]).stdout)
    assert found["estimate"]["parameters"]["heads"] == 4 * found["estimate"]["parameters"]["layer"]
    assert found["fits"] is True


def test_plain_fine_tuning_has_no_overhead_and_steps_without_heads_are_planned_for(folder):
    assert plan(recipe_of(folder, loss={"weight": 0})).estimate.overhead == 1
    frozen = {"train": False}
    setups = [plan(recipe_of(folder, heads=frozen, loss={"min_weight": bound})).setup for bound in (0, 1e-4)]
    assert [setup.leaves_out_heads for setup in setups] == [False, True]


def test_the_adapter_of_a_meta_model_is_in_its_last_layer_but_not_in_its_heads():
    setup = Setup(tuning="lora", heads=1)
    backbone, heads = meta_model(small("llama"), setup, adapter("llama"))
    assert any("lora_" in name for name, _ in backbone.layer.named_parameters())
    assert not any("lora_" in name for name, _ in heads.named_parameters())
    anatomy = anatomy_of(backbone.model, list(backbone.model.model.layers))
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(small("llama"))
    assert anatomy == anatomy_of(plain, list(plain.model.layers))


def test_overhead_is_of_a_step_over_the_same_step_without_heads(anatomies):
    step = Step(1024, 1.0, heads=2)
    anatomy = anatomies["Qwen3-0.6B"]
    assert overhead(anatomy, step) == flops(anatomy, step).total / flops(anatomy, replace(step, heads=0)).total
