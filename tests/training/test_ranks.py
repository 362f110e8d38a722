"""Two processes take the same steps as one, on both bases, fully fine-tuned and by LoRA, and in stage 1."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bases import write_heads
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[1].joinpath("two_ranks.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What two_ranks.py writes, on one rank and on two."""
    folder = tmp_path_factory.mktemp("ranks")
    for base in ("llama", "gpt2"):
        write_heads(base, folder / "heads" / base)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, command in (("one", [sys.executable]), ("two", launcher)):
        arguments = [*command, str(SCRIPT), str(folder / name), str(folder / "heads")]
        run = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=240)
        assert run.returncode == 0, run.stderr[-2000:]
    return load_file(folder / "one"), load_file(folder / "two")


@pytest.mark.parametrize("run", ["heads", "llama full", "llama lora", "gpt2 full", "gpt2 lora", "llama own"])
def test_two_ranks_of_four_equal_one_batch_of_eight(results, run):
    one, two = ({key: value for key, value in result.items() if key.startswith(f"{run}/")} for result in results)
    assert one.keys() == two.keys()
    assert one[f"{run}/losses"].shape[0] == 3
    moved = [(value - one[key.replace("/end/", "/start/")]).abs().max() for key, value in one.items() if "/end/" in key]
    assert max(moved) > 0.004
    for key, value in one.items():  # float32, another order of sums
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")
