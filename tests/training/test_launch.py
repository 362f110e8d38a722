"""Runs over several processes, as a user launches them, against a run in one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import kills
import pytest
import torch
import yaml
from bases import write_llama
from safetensors.torch import load_file
from sharded import CASES

from caftune.pipeline.finetune import finetune_model
from caftune.pipeline.recipe import load_recipe

SCRIPT = Path(__file__).parents[1].joinpath("sharded.py")
CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"


def finished(command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-20000:]  # of all ranks: what killed one stands well before the end
    return run


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)  # float32, another order of sums


def test_accelerate_launch_on_two_ranks_equals_one_process(tmp_path):
    kills.prepare(tmp_path)
    options = ["model.lora.dropout=0", "trainer.save_strategy=epoch", "trainer.max_steps=5"]
    # As a user without GPUs writes it: use_cpu stands in accelerate's configuration alone.
    sections = yaml.safe_load((tmp_path / "lora.yaml").read_text())
    del sections["trainer"]["use_cpu"]
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(sections))
    recipe = [tmp_path / "lora.yaml", *options]
    finetune_model(load_recipe(str(recipe[0]), [*options, f"output={tmp_path / 'one'}"]))
    config = tmp_path / "ddp.yaml"
    config.write_text((CONFIGS / "ddp.yaml").read_text() + "use_cpu: true\n")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    recipe += ["trainer.per_device_train_batch_size=2", f"output={tmp_path / 'two'}"]
    finished([*launcher, "-m", "caftune.cli", "train", *recipe])
    one, two = (tmp_path / name for name in ("one", "two"))
    assert_close(load_file(two / "model" / "model.safetensors"), load_file(one / "model" / "model.safetensors"))
    logs = [json.loads((run / "results.jsonl").read_text())["log"] for run in (one, two)]
    steps = [[(e["loss"], e["main_loss"], e["h1_loss"], e["h2_loss"]) for e in log if "loss" in e] for log in logs]
    assert len(steps[0]) == 5
    assert json.loads((two / "train" / "checkpoint-5" / "trainer_state.json").read_text())["train_batch_size"] == 2
    for ours, theirs in zip(*steps, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert (two / "train" / "recipe.yaml").is_file()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Every case on one rank, and on two with either kind of checkpoint."""
    folder = tmp_path_factory.mktemp("sharded")
    for name in ("tied", "untied"):
        write_llama(folder / name, is_tied=name == "tied")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, SCRIPT]
    finished([sys.executable, SCRIPT, folder, "FULL_STATE_DICT", *CASES])
    finished([*launcher, folder, "FULL_STATE_DICT", *CASES])
    finished([*launcher, folder, "SHARDED_STATE_DICT", "full_untied_heads", "lora_heads"])
    return folder


RUNS = [(name, "FULL_STATE_DICT") for name in CASES]
RUNS += [(name, "SHARDED_STATE_DICT") for name in ("full_untied_heads", "lora_heads")]


@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_a_model_sharded_by_fsdp2_learns_resumes_and_exports_as_one_process_does(sharded, name, kind):
    one = sharded / f"{name}-FULL_STATE_DICT-one-whole"
    runs = [one, *(sharded / f"{name}-{kind}-sharded-{attempt}" for attempt in ("whole", "resumed"))]
    steps = [json.loads((run / "steps.json").read_text()) for run in runs]
    assert len(steps[0]) == 4
    for found in steps[1:]:
        for ours, theirs in zip(found, steps[0], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)  # float32, another order of sums
    file = "heads.safetensors" if name == "stage_one" else "model.safetensors"
    before = "untied-heads" if name == "stage_one" else ("tied" if CASES[name][0] else "untied")
    start = load_file(sharded / before / file)
    expected = load_file(one / "model" / file)
    assert any(not torch.equal(expected[key], start[key]) for key in start)
    for run in runs[1:]:
        assert_close(load_file(run / "model" / file), expected)
        assert not list(run.glob(".export-*"))
    if CASES[name][1]:
        adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in runs]
        assert_close(adapters[1], adapters[0])
        assert_close(adapters[2], adapters[0])
        assert {path.name for path in (runs[1] / "adapter").iterdir()} == {
            path.name for path in (one / "adapter").iterdir()
        }
    if CASES[name][3].get("train_heads", name != "stage_one"):
        heads = [load_file(run / "checkpoint-4" / "heads" / "heads.safetensors") for run in runs]
        assert_close(heads[1], heads[0])
        assert_close(heads[2], heads[0])


@pytest.mark.parametrize("path", sorted(CONFIGS.iterdir()), ids=lambda path: path.stem)
def test_launch_configurations_are_read_by_accelerate(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes == 2
    assert f"recipes/accelerate/{path.name}" in path.read_text()
    assert yaml.safe_load(path.read_text())["distributed_type"] in ("MULTI_GPU", "FSDP", "DEEPSPEED")
