"""The script of the GPU checks, without a GPU: what it measures is what the trainer does, and a failure loses nothing."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import caftune

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import gpu


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run(*options):
        file = tmp_path / "gpu.json"
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--small", "--output", str(file), *options])
        gpu.main()
        return json.loads(file.read_text())["checks"]

    return run


def test_the_measured_step_is_the_trainers_heads_one_at_a_time(monkeypatch):
    steps = []
    real = caftune.core.heads.weighted_sum
    monkeypatch.setattr(caftune.core.heads, "weighted_sum", lambda *given: steps.append("at once") or real(*given))
    model, heads = gpu.model_of(True, "sdpa", 4)
    model.double()
    batch = gpu.batch_of(True, "cpu")
    loss = gpu.loss_of(model, heads, batch)
    assert steps == ["at once"]
    outputs = model(**batch, fused_lm_head=True, auxiliary="add")
    scores, weights = outputs["auxiliary"], gpu.WEIGHTS.at(0, 100, heads.config.horizons)
    expected = outputs.loss + caftune.auxiliary_loss(scores["nll"], scores["count"], weights)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)  # the trainer's weights are float32


def test_a_check_that_fails_says_why_and_the_others_are_made(run, monkeypatch):
    def broken(*_given):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(gpu, "step_cost", broken)
    found = run("--checks", "step", "correctness sdpa")
    assert found.pop("step") == "failed: RuntimeError: CUDA out of memory"
    assert found["correctness sdpa, float32"]["gradient_error"] < 1e-5
    assert set(found) == {"correctness sdpa, float32", "correctness sdpa, bfloat16"}


def test_what_was_found_is_on_disk_before_the_next_check_begins(run, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "step_cost", lambda *_given: "done")
    monkeypatch.setattr(gpu, "labels", lambda *_given: (tmp_path / "gpu.json").read_text())
    assert json.loads(run("--checks", "step", "labels")["labels"])["checks"] == {"step": "done"}


def test_without_time_left_nothing_begins(run):
    assert set(run("--limit-s", "0").values()) == {"not run: no time left"}


def test_names_of_no_check_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("--checks", "stp")
    assert "--checks must begin names of correctness eager, float32" in capsys.readouterr().err


@pytest.fixture
def started(monkeypatch):
    """The processes that trainer runs start; each trains at once."""
    seen = []

    def start(command, *, env, **_options):
        seen.append((command, env))
        Path(command[-1]).write_text("[[1.0, 2.0, 3.0]]")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(gpu.subprocess, "run", start)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _name: True)
    gpu._losses.cache_clear()
    yield seen
    gpu._losses.cache_clear()


def test_each_kind_of_run_is_made_once_on_a_cpu_that_sees_no_gpu(started):
    until = time.monotonic() + 100
    for name in gpu.RUNS:
        assert gpu.trainer_run(name, "cuda", until) == {"largest_loss_difference_nats": 0.0}
    on = [(command[command.index("--device") + 1], command[command.index("--once") + 1]) for command, _ in started]
    references = [json.loads(options) for device, options in on if device == "cpu"]
    assert references == [{}, {"lora": True}, {"lora": True, "four_bits": True}, {"packing": True}]
    assert len(on) == len(gpu.RUNS) + len(references)
    assert all(
        env.get("CUDA_VISIBLE_DEVICES") == ""
        for (_, env), (device, _) in zip(started, on, strict=True)
        if device == "cpu"
    )


def test_a_trainer_run_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(gpu.sys, "executable", "sleep")
    monkeypatch.setattr(gpu, "__file__", "60")
    monkeypatch.setattr(gpu, "LIMIT_S", 1)
    real = subprocess.run
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **options: real(command[:5], **options))
    gpu._losses.cache_clear()
    assert gpu.trainer_run("float32", "cuda", time.monotonic() + 100) == "failed: not done after 1 s"
    gpu._losses.cache_clear()
