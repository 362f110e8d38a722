"""What makes a comparison fair: control heads, the order of rows, and the test for arms by one number a run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from trainers import config

from caftune import CAFTTrainer
from caftune.checkpoints.heads_folder import DESCRIPTION_FILE, describe_heads, load_heads
from caftune.compare.control_heads import write_control_heads
from caftune.compare.runner import arm_recipe
from caftune.demo.run import BASE
from caftune.evals.statistics import compare_runs
from caftune.pipeline.schema import Recipe


def test_random_heads_have_the_same_values_in_another_order(heads, tmp_path, base_backbone):
    write_control_heads("random_heads", Path(heads), tmp_path / "one", seed=1)
    before, after = load_file(f"{heads}/heads.safetensors"), load_file(tmp_path / "one" / "heads.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.flatten().sort().values, after[name].flatten().sort().values)
        assert tensor.numel() < 100 or not torch.equal(tensor, after[name])
    load_heads(tmp_path / "one", base_backbone)
    write_control_heads("random_heads", Path(heads), tmp_path / "two", seed=2)
    assert describe_heads(tmp_path / "one")["weights_sha256"] != describe_heads(tmp_path / "two")["weights_sha256"]


def test_shuffled_horizons_are_the_same_heads_each_one_place_on(heads, tmp_path, base_backbone):
    write_control_heads("shuffled_horizons", Path(heads), tmp_path / "heads", seed=1)
    before, after = load_heads(heads, base_backbone).heads, load_heads(tmp_path / "heads", base_backbone).heads
    for place, head in enumerate(after):
        source = before[(place - 1) % len(before)].state_dict()
        assert all(torch.equal(value, source[name]) for name, value in head.state_dict().items())


def test_one_head_cannot_be_shuffled(heads, tmp_path):
    one = tmp_path / "one"
    shutil.copytree(heads, one)
    description = json.loads((one / DESCRIPTION_FILE).read_text())
    (one / DESCRIPTION_FILE).write_text(json.dumps({**description, "horizons": [2]}))
    with pytest.raises(ValueError, match="shuffled_horizons needs at least 2 heads, got 1"):
        write_control_heads("shuffled_horizons", one, tmp_path / "none", seed=1)


@pytest.fixture
def base_backbone():
    from transformers import AutoModelForCausalLM

    from caftune.core.backbone import Backbone

    return Backbone.of(AutoModelForCausalLM.from_pretrained(BASE))


def test_arms_by_one_number_a_run_are_compared_by_the_paired_t_test():
    rng = np.random.default_rng(3)
    ours, theirs = rng.normal(1, 0.1, 5), rng.normal(0.9, 0.1, 5)
    one, expected = compare_runs(ours, theirs), stats.ttest_rel(ours, theirs)
    assert one.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    reach = expected.confidence_interval(0.95)
    assert (one.low, one.high) == pytest.approx((reach.low, reach.high), rel=1e-9)
    same = compare_runs([0.5, 0.25], [0.5, 0.25])
    assert (same.difference, same.p_value, same.low, same.high) == (0.0, 1.0, 0.0, 0.0)
    assert compare_runs([0.5, 0.25], [0.25, 0.0]).p_value == 1.0  # no spread to hold the difference against
    with pytest.raises(ValueError, match="the same 2 or more runs, got 3 and 2"):
        compare_runs([1, 2, 3], [1, 2])


def test_seeds_share_the_order_of_no_epoch(rows, tmp_path):
    """Accelerate orders epoch e by seed + e, so neighbouring seeds would see the same orders one epoch apart."""
    orders = []
    for seed in (42, 43):
        recipe = Recipe.model_validate({"output": str(tmp_path), "model": {"name": str(BASE)}, "heads": {}})
        options = arm_recipe(recipe, "ntp", seed).trainer
        chosen = {"seed": seed, "data_seed": options["data_seed"], "num_train_epochs": 3, "max_steps": -1}
        trainer = CAFTTrainer(str(BASE), config(tmp_path / str(seed), aux_weight=0.0, **chosen), train_dataset=rows)
        loader = trainer.get_train_dataloader()
        for epoch in range(3):
            loader.set_epoch(epoch)
            orders.append(tuple(tuple(batch["input_ids"].flatten().tolist()) for batch in loader))
    assert len(set(orders)) == 6
