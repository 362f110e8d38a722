"""Every family is planned, or refused with a sentence; mixtures of experts as they are trained."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import config_of
from models import build
from test_families import KNOWN
from test_plan import ENDS, planned, trainer_of
from test_plan_memory import Watched
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig
from typer.testing import CliRunner

from caftune.cli import app
from caftune.core.backbone import UnsupportedModelError, last_layer
from caftune.errors import CaftuneError
from caftune.pipeline.plan import plan
from caftune.pipeline.schema import Recipe
from caftune.training.estimate import estimate
from caftune.training.flops import anatomy_of
from caftune.training.run_setup import Setup

# Families that are not planned with decoder heads: they carry none, or what they compute depends on the tokens.
NOT_PLANNED = {
    **dict.fromkeys(
        ["dbrx", "jetmoe", "longcat_flash", "qwen4_exp", "xlm"], r"on tensors without values, got .*: aten\."
    ),
    "mllama_crossing": "on tensors without values, got .*cross_attention_states",
    "hrm_text": "has no list of 16 decoder layers",
    "xlnet": "data.max_length must be",
}


def recipe_of(family, folder, **options):
    config_of(family).save_pretrained(folder / "base")
    model, trainer = {"name": str(folder / "base")}, {"per_device_train_batch_size": 2, **options}
    return Recipe(output=str(folder / "run"), model=model, data={"max_length": 16}, trainer=trainer)


@pytest.mark.parametrize("family", KNOWN)
def test_a_family_is_planned_or_refused_with_a_sentence(family, tmp_path, caplog):
    recipe = recipe_of(family, tmp_path, gradient_checkpointing=False)
    if family in NOT_PLANNED:
        with pytest.raises((CaftuneError, UnsupportedModelError), match=NOT_PLANNED[family]):
            plan(recipe)
    else:
        assert plan(recipe).estimate.memory.activations > 0
    assert not [told for told in caplog.records if told.levelname == "ERROR"]  # torch logs what it raises


def test_the_command_says_in_one_line_what_cannot_be_planned(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_of("dbrx", tmp_path).model_dump_json())
    shown = CliRunner().invoke(app, ["plan", str(recipe)])
    assert shown.exit_code == 2
    assert re.fullmatch(r"Error: model\.name must be .*/base \(DynamicOutputShapeException: .*\)\. .*\n", shown.output)


def test_what_a_model_cannot_take_is_no_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("caftune.pipeline.plan._device", lambda: ("a small device", 1, 0))
    found = plan(recipe_of("falcon_mamba", tmp_path))
    assert not found.fits
    assert not any("lora" in remedy.change for remedy in found.remedies)  # PEFT adapts no output projection of Mamba


@pytest.mark.parametrize("family", ["gemma4", "minicpm3", "aria_text"])
def test_operations_of_a_forward_pass_are_those_of_the_real_model(family):
    """Heads whose size differs from layer to layer, or is not the configuration's head_dim; experts by another name."""
    model = build(family, dtype=torch.float32)
    model.set_experts_implementation("eager")  # the counter knows no product of all experts at once
    anatomy = anatomy_of(model, list(model.get_submodule(last_layer(model).rpartition(".")[0])))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(2, 32, dtype=torch.long), use_cache=False)
    expected = 2 * anatomy.trunk + 4 * 32 * anatomy.attention + 2 * anatomy.unembedding
    assert abs(expected * 2 * 32 / counter.get_total_flops() - 1) < 0.02


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of memory")
def test_peak_memory_of_a_mixture_of_experts_is_that_of_a_real_step(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 344, "num_hidden_layers": 3, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=32768, num_attention_heads=4, num_key_value_heads=2, **sizes, **ENDS)
    shape = {"batch": 4, "length": 256, "attention": "sdpa"}
    trainer = trainer_of(config, tmp_path, max_steps=3, **shape)
    watch = Watched()
    trainer.add_callback(watch)
    trainer.train()
    memory = planned(config, trainer, **shape)[1].memory
    state = memory.weights + memory.heads + memory.optimizer + memory.process
    assert abs((memory.peak - state) / watch.allocations.bytes - 1) < 0.15


def test_experts_are_planned_in_half_precision():
    setup = Setup(batch_size=2, length=256, mean_length=256.0, checkpointing=False)
    given = ({}, {"half": True}, {"half": True, "dtype": torch.bfloat16})
    kept = [estimate(config_of("mixtral"), replace(setup, **more)).memory.activations for more in given]
    # Autocast leaves the products of experts in the precision of their weights.
    assert kept[2] < 0.6 * kept[0] < kept[1] < kept[0]
