"""Two processes take the same steps as one."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from caftune import AuxiliaryHeads, Backbone, HeadsConfig, save_heads
from caftune.demo.run import BASE

SCRIPT = Path(__file__).with_name("two_ranks.py")


def test_two_ranks_of_four_equal_one_batch_of_eight(tmp_path):
    backbone = Backbone.of(AutoModelForCausalLM.from_pretrained(BASE))
    save_heads(tmp_path / "heads", AuxiliaryHeads.build(backbone, HeadsConfig(2)), backbone)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, command in (("one", [sys.executable]), ("two", launcher)):
        arguments = [*command, str(SCRIPT), str(tmp_path / name), str(tmp_path / "heads")]
        run = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=240)
        assert run.returncode == 0, run.stderr[-2000:]
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert one.keys() == two.keys()
    base = load_file(BASE / "model.safetensors")
    assert not torch.equal(one["two.model.embed_tokens.weight"], base["model.embed_tokens.weight"])  # steps were taken
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6)  # float32, another order of sums
