"""What a plan knows of the rows, and of the recipe's options."""

import json
from dataclasses import asdict, replace
from itertools import combinations
from statistics import fmean

import pytest
import torch
from datasets import Dataset
from models import config_of
from opened import load_config
from test_plan import small
from transformers import AutoModelForCausalLM

from caftune.demo.run import BASE
from caftune.generation.labels import Label
from caftune.pipeline.plan import measure_rows, plan
from caftune.pipeline.schema import Recipe
from caftune.training.estimate import estimate
from caftune.training.run_setup import Setup


def test_rows_are_measured():
    rows = Dataset.from_dict({"labels": [[-100, -100, 5, 6], [-100, 7, -100, 8, 9, 9]]})
    found = measure_rows(rows, 5, 1)  # the second row is cut to five
    assert (found.read, found.mean_length, found.longest) == (2, 4.5, 5)
    assert found.labelled == 5 / 9


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_a_batch_is_padded_to_its_longest_row(size):
    lengths = [3, 9, 4, 4, 17]
    rows = Dataset.from_dict({"labels": [[5] * length for length in lengths]})
    longest = [max(batch) for batch in combinations(lengths, min(size, 5))]
    assert measure_rows(rows, 100, size).padded_length == pytest.approx(fmean(longest), rel=1e-12)


def test_stage_one_on_a_sample_keeps_less_by_what_is_not_scored():
    setup = Setup(stage="heads", batch_size=8, length=256, mean_length=256.0, checkpointing=False)
    whole, sample = (estimate(config_of("llama"), replace(setup, target_share=share)).memory for share in (1.0, 0.25))
    assert sample.logits == whole.logits / 4
    # In a Llama's layer more is kept behind the attention, of scored rows alone, than in it, of all rows.
    assert 0.25 < sample.head_activations / whole.head_activations < 0.7
    assert whole.peak > sample.peak


@pytest.mark.parametrize(("stage", "says"), [("heads", False), ("train", True)])
def test_fewer_heads_are_a_remedy_of_stage_two_where_stage_one_makes_them(stage, says, tmp_path, monkeypatch):
    monkeypatch.setattr("caftune.pipeline.plan._device", lambda: ("nothing", 0, 0))
    found = plan(Recipe(output=str(tmp_path / "run"), model={"name": str(BASE)}), stage)
    changes = [remedy.change for remedy in found.remedies if remedy.change.startswith("heads.count=2")]
    assert changes == ["heads.count=2" + " (with heads that `caftune pretrain-heads` made with it)" * says]


def recipe_of(folder, *, completion=24, **sections):
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": "a name\n", "completion": "C" * completion}) for _ in range(20)))
    labels = {"prompts": str(rows), "max_new_tokens": 256}
    return Recipe(
        output=str(folder / "run"),
        labels=labels,
        **{"model": {"name": str(BASE)}, "data": {"train": str(rows)}, **sections},
    )


def test_what_raises_the_peak_is_no_remedy(tmp_path, monkeypatch):
    """Passes of smaller batches keep the gradients meanwhile, which are more than the activations of such short rows."""
    for part in ("_PROCESS", "_HOLES"):  # of which a model of this size is a small part
        monkeypatch.setattr(f"caftune.training.memory.{part}", 0)

    def of(size, steps, **model):
        options = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": steps,
            "gradient_checkpointing": False,
        }
        sections = {"heads": {"train": False}, "model": {"name": str(BASE), **model}}
        return recipe_of(tmp_path, completion=2, trainer=options, **sections)

    recipe = of(4, 1)
    whole, half, adapted = (plan(r).estimate.memory.peak for r in (recipe, of(2, 2), of(4, 1, tuning="lora")))
    assert adapted < whole < half
    monkeypatch.setattr("caftune.pipeline.plan._device", lambda: ("a small device", adapted - 1, 0))
    changes = [remedy.change.partition("=")[0] for remedy in plan(recipe).remedies]
    # Without checkpointing, which would not help either. Beside an adapter gradients are next to nothing.
    assert changes == ["model.tuning", "trainer.per_device_train_batch_size"]
    peaks = [remedy.peak for remedy in plan(recipe).remedies]
    assert peaks[0] == adapted > peaks[1]


def test_packed_rows_are_full(tmp_path):
    recipe = recipe_of(tmp_path, trainer={"packing": True})
    found = plan(recipe)
    assert found.setup.length > 7 * found.setup.mean_length
    full = replace(found.setup, is_packed=False, mean_length=float(found.setup.length))
    assert found.estimate.memory == estimate(load_config(recipe), full).memory


def labelled_by_the_base(folder, **sections):
    """A recipe whose labels, of 250 tokens, are longer than `data.max_length`."""
    recipe = recipe_of(folder, data={"max_length": 128}, **sections)
    made = folder / "run" / "labels"
    made.mkdir(parents=True)
    identity = {"model.name": recipe.model.name, "model.revision": None, "labels": recipe.labels.model_dump()}
    (made / "recipe.yaml").write_text(json.dumps(identity))
    labels = [Label(i, 0, "p", "c", "stop", True, [5] * 100, [6] * 150) for i in range(20)]
    (made / "labels.jsonl").write_text("".join(json.dumps(asdict(label)) + "\n" for label in labels))
    return recipe


def test_labels_are_as_long_in_the_plan_as_in_stage_one(tmp_path):
    found = plan(labelled_by_the_base(tmp_path), stage="heads")
    assert (found.setup.length, found.rows.labelled) == (250, 0.6)


@pytest.mark.parametrize("is_packed", [False, True])
def test_shorter_rows_are_a_remedy_where_rows_are_cut(is_packed, tmp_path, monkeypatch):
    monkeypatch.setattr("caftune.pipeline.plan._device", lambda: ("a small device", 1, 0))
    monkeypatch.setattr("caftune.pipeline.plan._SHORTEST", 32)
    recipe = labelled_by_the_base(tmp_path, pretrain={"packing": is_packed})
    changes = [remedy.change for remedy in plan(recipe, stage="heads").remedies]
    assert any("data.max_length" in change for change in changes) == is_packed


def test_attention_written_out_keeps_more(tmp_path):
    given = ({}, {"model_init_kwargs": {"attn_implementation": "eager"}})
    kept = {"gradient_checkpointing": False}
    recipes = [recipe_of(tmp_path, completion=200, trainer=kept | options) for options in given]
    fused, written_out = (plan(recipe).estimate.memory for recipe in recipes)
    assert written_out.peak > fused.peak


def test_states_of_embeddings_and_of_small_weights_stay_in_32_bits():
    setup = Setup(batch_size=1, length=16, mean_length=16.0, heads=0)
    config = small("qwen3")  # its embeddings are tied
    states = [
        estimate(config, replace(setup, optimizer=name)).memory.optimizer for name in ("adamw_8bit", "adamw_torch_8bit")
    ]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    of_small = 2 * 3 * sum(weight.numel() for weight in model.parameters() if weight.numel() < 4096)
    whole = 2 * sum(weight.numel() for weight in model.parameters())
    assert states == [whole + of_small + 2 * 3 * model.get_input_embeddings().weight.numel(), whole + of_small]


def test_the_buffer_of_trls_loss_is_whole_on_a_gpu():
    setup = Setup(batch_size=1, length=256, mean_length=256.0, labelled=0.5, heads=0, on_gpu=True)
    memory = estimate(small("llama", vocabulary=512, width=64), setup).memory
    assert (
        memory.logits == 128 * 32768 * 4 + 128 * 64 * 4
    )  # rows times the columns of its buffer, and the rows' gradient
    assert memory.process == 0  # which the allocator of a GPU does not count
