"""torch_compile with heads compiles what it compiles without them, no more often, and gives the same losses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def found():
    script = Path(__file__).parents[1].joinpath("compiled_steps.py")
    ran = subprocess.run([sys.executable, str(script)], check=True, capture_output=True, text=True, timeout=600)
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("heads", ["frozen", "trained"])
def test_ten_steps_of_unequal_lengths_are_compiled_as_those_of_sft_trainer(found, heads):
    plain, own = found["sft"], found[heads]
    assert plain["graphs"] > 0
    assert own["breaks"] <= plain["breaks"]
    assert sorted(own["again"]) == sorted(plain["again"])  # once each, when lengths are found to differ


@pytest.mark.parametrize("heads", ["frozen", "trained"])
def test_compiled_steps_have_the_losses_of_uncompiled_ones(found, heads):
    assert found[heads]["apart"] < 1e-4  # float32
