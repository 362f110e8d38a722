"""The script of the GPU checks, without a GPU: its parts at tiny size, its table, and that a failure loses nothing."""

import argparse
import inspect
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import gpu
from gpu_parts import correctness, labels, plan, stage_one, step, study

ROOT = Path(__file__).parents[1]
MEASURED = {"correctness": correctness.ROWS, "step": [case.name for case in step.cases()], "stage_one": stage_one.ROWS}
CASES = {case.name: case for case in step.cases()}


def measure(part, name):
    return dict(part.rows(True, "cpu"))[name]()


@pytest.fixture
def options(tmp_path):
    values = {
        "device": "cpu",
        "small": True,
        "model": None,
        "recipe": None,
        "seconds": 60,
        "parts": ["labels", "study"],
    }
    return argparse.Namespace(output=tmp_path / "gpu.json", **values)


def results(options):
    return json.loads(options.output.read_text())["parts"]


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("float32, LoRA, heads trained through LoRA", 1e-5),
        ("bfloat16, heads trained in full", 0.02),
        pytest.param("float32, packed", 1e-5, marks=pytest.mark.filterwarnings("ignore:.*flash:UserWarning")),
    ],
)
def test_losses_and_gradients_are_compared_with_the_formula(name, most):
    found = measure(correctness, name)
    assert found.keys() == ({"loss", "gradient", "gradient_of_heads"} if "trained" in name else {"loss", "gradient"})
    assert all(0 < error < most for error in found.values()), found


def test_a_wrong_gradient_shows(monkeypatch):
    def watch(self, *_given, model, **_named):
        self.gradients = {name: 1.1 * gradient for name, gradient in correctness.gradients_of(model).items()}

    monkeypatch.setattr(correctness.Watch, "on_pre_optimizer_step", watch)
    assert measure(correctness, "float32, sdpa")["gradient"] == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    "name", ["8B, 150k, 50% labelled, K=4, trained along, exact", "1.7B, 150k, 50% labelled, SFTTrainer"]
)
def test_a_step_is_timed_in_a_run_of_its_trainer(name):
    found = measure(step, name)
    assert 0 < found["fastest_s"] <= found["step_s"] <= found["slowest_s"]
    assert found["runs"][0]["layers"] == step.shapes(True)[CASES[name].shape].num_hidden_layers


def test_the_compiled_loss_is_the_plain_one(monkeypatch):
    plain = inspect.unwrap(step.cross_entropy._loss_and_slope)  # torch cannot trace checked annotations
    monkeypatch.setattr(step.cross_entropy, "_loss_and_slope", plain)
    given = torch.randn(5, 7), torch.randint(7, (5,)), 1.0, None
    expected = plain(given[0].clone(), *given[1:])
    with step.compiled_loss("cpu"):
        assert step.cross_entropy._loss_and_slope is not plain
        found = step.cross_entropy._loss_and_slope(given[0].clone(), *given[1:])
    torch.testing.assert_close(found, expected)
    assert step.cross_entropy._loss_and_slope is plain


def test_each_row_is_compared_with_the_same_run_of_sft_trainer():
    names = list(CASES)
    for name, case in CASES.items():
        assert names.index(case.plain.name) <= names.index(name)
        assert case.plain.heads == 0 or case.heads == 0


def test_what_does_not_fit_follows_from_two_depths():
    shape = step.shapes(False)["8B"]

    def run(layers):
        if layers == shape.num_hidden_layers:
            raise torch.OutOfMemoryError
        return {"layers": layers, "step_s": 1 + 0.5 * layers, "peak_gib": 2.0 + layers, "waits": 7}

    found = step.at_depths(run, shape)
    assert (found["step_s"], found["peak_gib"]) == (19.0, 38.0)
    assert [one["layers"] for one in found["runs"]] == [4, 8]
    assert found["scaled"] == "the line through 4 and 8 layers, at 36"


def test_the_meter_on_a_gpu_counts_waits_in_its_last_step_and_takes_the_peak_of_the_others(monkeypatch):
    modes = []
    for name, value in {"memory_allocated": 2**30, "max_memory_allocated": 3 * 2**30}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    meter = step.Meter("cuda")
    for number in range(step.WARM + step.TIMED + 1):
        meter.on_step_begin(None, argparse.Namespace(global_step=number), None)
        if modes == ["warn"]:
            step.warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        meter.on_step_end(None, argparse.Namespace(global_step=number + 1), None)
    found = meter.found()
    assert modes == ["warn", "default"]
    assert (found["peak_gib"], found["waits"], len(meter.seconds)) == (2.0, 1, step.TIMED)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        (stage_one, "all tokens labelled, 25% of the targets", "step_s"),
        (labels, "generate", "tokens_per_s"),
        (labels, "static", "tokens_per_s"),
        (plan, "8B, 32k, 50% labelled, K=4, frozen, exact", "flops_ratio"),
        (plan, "all tokens labelled", "peak_gib"),
    ],
)
def test_the_other_parts_run(part, name, value):
    assert measure(part, name)[value] > 0


def test_the_study_needs_a_base_and_a_recipe():
    assert dict(study.rows(None, "recipe.yaml"))[study.ROW]() == "not run: needs --model and --recipe"


def test_a_row_that_fails_says_why_and_the_next_is_measured(options, monkeypatch):
    def broken():
        raise RuntimeError("CUDA out of memory")

    seen = []
    rows = {"one": broken, "two": lambda: seen.append(results(options)) or 2}
    monkeypatch.setattr(labels, "rows", lambda *_: rows.items())
    gpu.run_part("labels", options)
    failed = "failed: RuntimeError: CUDA out of memory"
    assert results(options)["labels"]["rows"] == {"one": failed, "two": 2}
    assert seen[0]["labels"]["rows"] == {"one": failed}  # on disk before the next began


def test_a_part_that_runs_out_of_time_is_ended_and_the_next_says_it_had_none(options, monkeypatch):
    monkeypatch.setattr(gpu, "SHORTEST_S", 0.2)
    options.seconds = 0.4
    gpu.run(options)
    found = results(options)
    assert found["labels"]["stopped"] == "ended after 0 s"
    assert found["study"] == {"rows": {}, "stopped": "not run: no time left", "seconds": 0.0}


def test_a_part_that_cannot_begin_says_why(options):
    options.output = options.output.parent / "missing" / "gpu.json"
    assert "No such file or directory" in gpu.stopped("labels", options, 60)


def test_what_is_missing_is_said_in_one_line(monkeypatch, capsys):
    real = gpu.importlib.util.find_spec
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name in ("trl", "yaml") else real(name))
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit):
        gpu.main()
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("not installed here: trl, pyyaml. Install them (pip install trl pyyaml).")


def test_without_results_every_row_of_the_table_is_not_measured():
    text = gpu.table({"parts": {}})
    for names in (*MEASURED.values(), ["caftune, static", "caftune, continuous"]):
        for name in names:
            assert f"| {name} | not measured |" in text


def test_the_table_compares_with_sft_trainer_and_the_plan():
    name = "8B, 150k, 50% labelled, K=4, frozen, exact"
    plain = CASES[name].plain.name
    measured = {
        plain: {"step_s": 0.5, "peak_gib": 20.0, "waits": 9},
        name: {"step_s": 0.6, "peak_gib": 22.0, "waits": 10},
    }
    planned = {name: {"flops_ratio": 1.25, "peak_gib": 20.0}}
    parts = {"step": {"rows": measured, "device": "a card", "stopped": "ended after 180 s"}, "plan": {"rows": planned}}
    text = gpu.table({"parts": parts})
    assert f"| {name} | 0.600 | 1.20 | 1.25 | 0.96 | 22.00 | 20.00 | 1.10 | 10 |" in text
    assert "a card; ended after 180 s." in text


def test_the_page_is_the_table_of_the_results_in_the_repository():
    assert (ROOT / "docs/results/gpu.md").read_text() == gpu.table(gpu.read(ROOT / "docs/results/gpu.json"))
