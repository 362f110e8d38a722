"""A compiled model with heads: the same losses and gradients, and no new compilation for each call of a head."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("kind", ["decoder", "mlp"])
def test_ten_steps_of_unequal_lengths_compile_at_most_two_functions_again(kind):
    script = Path(__file__).parents[1].joinpath("compiled_steps.py")
    ran = subprocess.run([sys.executable, str(script), kind], check=True, capture_output=True, text=True, timeout=300)
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["compiled"] > 0
    assert len(found["again"]) <= 2, found["again"]
    assert found["apart"] < 1e-4  # float32
