"""What stage 1 does where a recipe leaves it open: the base's own dtype, a quarter of the targets, a rate for its width."""

import json
import types

import pytest
import torch
from bases import load_base
from opened import stage_one_config
from transformers import AutoTokenizer, LlamaConfig

from caftune.checkpoints.heads_folder import describe_heads
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.pipeline import stage_config
from caftune.pipeline.pretrain import pretrain_heads
from caftune.pipeline.recipe import parse_recipe

TEXT = '{"text": "Once upon a time there was a little dog."}\n{"text": "The sun was hot and the bird sang."}\n'


def recipe_in(folder, *, base="base", **sections):
    """A recipe whose heads learn from four texts."""
    (folder / "text.jsonl").write_text(TEXT * 2)
    values = {
        "output": str(folder / "run"),
        "model": {"name": str(folder / base)},
        "heads": {"text": str(folder / "text.jsonl"), "count": 1, "held_out": 0.25},
        "pretrain": {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no"},
    }
    return parse_recipe(values | {name: values.get(name, {}) | more for name, more in sections.items()})


@pytest.fixture
def base(tmp_path):
    """A function that writes a base in a dtype."""

    def write(dtype):
        load_base("llama").to(dtype).save_pretrained(tmp_path / "base")
        AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "base")

    return write


@pytest.mark.parametrize(
    ("width", "rate"), [(64, 3e-3), (576, 3e-3), (1152, 1.5e-3), (4096, 3e-3 * 576 / 4096), (None, 3e-3)]
)
def test_the_learning_rate_falls_with_the_width_of_the_base(width, rate):
    config = LlamaConfig(hidden_size=width) if width else types.SimpleNamespace()
    base = types.SimpleNamespace(config=types.SimpleNamespace(get_text_config=lambda: config))
    assert stage_config._stage_one_rate(base) == pytest.approx(rate)


def test_what_the_recipe_says_goes_before_the_defaults(base, tmp_path):
    base(torch.float32)
    found = stage_one_config(recipe_in(tmp_path), tmp_path)
    assert (found.learning_rate, found.lr_scheduler_type, found.warmup_steps) == (3e-3, "cosine", 0.05)
    assert (found.model_init_kwargs, found.aux_target_share) == ({"dtype": "float32"}, 0.25)
    given = {
        "learning_rate": 1e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 3,
        "model_init_kwargs": {"dtype": "float32"},
    }
    own = recipe_in(tmp_path, pretrain=given, heads={"target_share": 1.0})
    found = stage_one_config(own, tmp_path)
    assert {name: getattr(found, name) for name in given} == given
    assert found.aux_target_share == 1.0


@pytest.mark.parametrize("is_named", [True, False])
def test_a_base_in_float16_is_loaded_in_float32(is_named, base, tmp_path):
    base(torch.float16)
    file = tmp_path / "base" / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in values.items() if is_named or key != "dtype"}))
    assert stage_one_config(recipe_in(tmp_path), tmp_path).model_init_kwargs == {"dtype": "float32"}


def test_another_share_of_the_targets_is_another_stage_one(base, tmp_path):
    base(torch.float32)
    pretrain_heads(recipe_in(tmp_path))
    with pytest.raises(CaftuneError, match=r"heads\.target_share"):
        pretrain_heads(recipe_in(tmp_path, heads={"target_share": 1.0}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_base_runs_in_its_own_dtype_and_new_heads_learn_in_float32(base, tmp_path, dtype, monkeypatch):
    base(dtype)
    seen = {}

    def watch(trainer, **_):
        seen.update(trunk={p.dtype for n, p in trainer.model.named_parameters() if "auxiliary" not in n})
        seen.update(heads={p.dtype for p in trainer.heads.parameters()})
        return trainer.train()

    monkeypatch.setattr("caftune.pipeline.pretrain.run_training", watch)
    heads = pretrain_heads(recipe_in(tmp_path))
    assert seen == {"trunk": {dtype}, "heads": {torch.float32}}
    assert describe_heads(heads)["horizons"] == [2]
