"""Short runs that accelerate launches on several processes, and the same in one, for the tests of DeepSpeed and two hosts."""

import json
import os
import subprocess
from pathlib import Path

import kills
import pytest
import torch
import yaml
from safetensors.torch import load_file

from caftune.pipeline.finetune import finetune_model
from caftune.pipeline.recipe import load_recipe

CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"
SCRIPT = Path(__file__).with_name("launched.py")
STEPS = 10


def write_recipe(folder, name, tuning="full", *, batch, base=None, heads=(), trainer=()):
    """A recipe of ten steps on the demo's base, with a checkpoint after five; the first call writes rows and heads."""
    if not (folder / "heads").is_dir():
        kills.prepare(folder)
    recipe = yaml.safe_load((folder / f"{tuning}.yaml").read_text())
    recipe["model"]["lora"]["dropout"] = 0
    recipe["model"]["name"] = str(base or recipe["model"]["name"])
    recipe["heads"] |= dict(heads)
    recipe["trainer"] |= {"max_steps": STEPS, "save_steps": STEPS // 2, "per_device_train_batch_size": batch}
    # Adam divides by the root of a gradient's square, so that rounding would grow where gradients are small.
    recipe["trainer"] |= {"save_total_limit": None, "adam_epsilon": 1e-4, **dict(trainer)}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run_in_one_process(recipe):
    """The same folder as one of `launched.py`."""
    output = recipe.with_name(f"{recipe.stem}-whole")
    finetune_model(load_recipe(str(recipe), [f"output={output}"]))
    return output


def launch(python, config, recipes, *, prefix=(), options=(), environment=()):
    """Begin `accelerate launch` of `launched.py`."""
    command = [*prefix, python, "-m", "accelerate.commands.launch", "--config_file", config, *options, SCRIPT, *recipes]
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    added = {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    log = recipes[0].with_name(f"{recipes[0].stem}-{len(list(recipes[0].parent.glob('*.log')))}.log").open("w+")
    process = subprocess.Popen(
        list(map(str, command)), env={**os.environ, **added, **dict(environment)}, stdout=log, stderr=subprocess.STDOUT
    )
    process.log = log
    return process


def finish(*processes):
    """Wait for all; the others are killed where one fails."""
    try:
        for process in processes:
            status = process.wait(900)
            process.log.seek(0)
            assert status == 0, process.log.read()[-8000:]
    finally:
        for process in processes:
            process.kill()


def assert_equals_one_process(recipe, one):
    """The run, and that resumed from its middle: losses of every step, export and trained heads."""
    start = load_file(Path(yaml.safe_load(recipe.read_text())["model"]["name"]) / "model.safetensors")
    expected, logged = load_file(one / "model" / "model.safetensors"), steps(one)
    assert expected.keys() == start.keys()
    assert any(not torch.equal(expected[key], start[key]) for key in start)
    for attempt in ("whole", "resumed"):
        run = recipe.with_name(f"{recipe.stem}-{attempt}")
        found = steps(run)
        assert len(found) == len(logged) == STEPS
        for ours, theirs in zip(found, logged, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        assert_close(load_file(run / "model" / "model.safetensors"), expected)
        heads = Path("train", f"checkpoint-{STEPS}", "heads", "heads.safetensors")
        assert (run / heads).is_file() == (one / heads).is_file()
        if (one / heads).is_file():
            assert_close(load_file(run / heads), load_file(one / heads))


def steps(run):
    log = json.loads((run / "results.jsonl").read_text())["log"]
    return [{name: e[name] for name in e if name.endswith("loss")} for e in log if "loss" in e]


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-5)  # float32, another order of sums
