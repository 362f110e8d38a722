"""The embedded default, in small."""

import json

import pytest
import torch

from caftune.demo.chemistry import molecules
from caftune.demo.run import BASE, Score, _recipe, demo, score, verdict
from caftune.recipe import RecipeError


def test_the_demo_runs_from_data_to_verdict(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    scores = demo(str(tmp_path / "demo"), train_rows=32, test_rows=8, prompts=16)
    assert [item.name for item in scores] == ["base", "next-token", "CAFT"]
    said = json.loads((tmp_path / "demo" / "scores.json").read_text())["verdict"]
    assert said.split(":")[0] in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "demo" / "losses.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "demo" / "caft" / "model" / "model.safetensors").is_file()


def test_the_demo_leaves_other_files_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="holds thesis.txt, which is not of a demo"):
        demo(str(tmp_path))


def test_the_base_scores_as_its_provenance_says():
    stated = json.loads((BASE / "provenance.json").read_text())["greedy_decoding"]
    measured = score("base", BASE, molecules(100, seed=2, substituents=(2, 4))).percent
    # two standard errors of 100 answers
    assert 100 * stated["300 held-out names with 2 to 4 substituents"]["exact_match"] == pytest.approx(measured, abs=8)


def test_the_verdict_follows_the_paired_interval():
    right, wrong = Score("a", [True] * 50 + [False] * 50), Score("b", [True] * 20 + [False] * 80)
    assert verdict(wrong, right).startswith("In this run CAFT helped: +30.0 points")
    assert verdict(right, wrong).startswith("In this run CAFT did harm: -30.0 points")
    assert verdict(right, right).startswith("This run cannot tell whether CAFT helped: +0.0 points")


def test_the_interval_is_that_of_paired_differences():
    one, other = Score("a", [True, False, False, False]), Score("b", [False, True, True, False])
    differences = torch.tensor([-1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    half = 1.96 * differences.std() / 2
    low, high = 100 * (differences.mean() - half), 100 * (differences.mean() + half)
    assert f"+25.0 points, 95% interval {low:+.1f} to {high:+.1f}" in verdict(one, other)


def test_the_arms_differ_in_the_auxiliary_losses_alone(tmp_path):
    ntp, caft = (_recipe(tmp_path, arm).model_dump() for arm in ("ntp", "caft"))
    assert (ntp.pop("output"), caft.pop("output")) == (str(tmp_path / "ntp"), str(tmp_path / "caft"))
    assert (ntp["loss"].pop("weight"), caft["loss"].pop("weight")) == (0.0, 0.01)
    assert ntp == caft
