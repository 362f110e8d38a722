"""The embedded default, in small."""

import json
from fractions import Fraction
from math import comb

import pytest

from caftune.demo.chemistry import molecules
from caftune.demo.run import BASE, Score, _recipe, demo, score, sign_test, verdict
from caftune.recipe import RecipeError


def test_the_demo_runs_from_data_to_verdict(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    scores = demo(str(tmp_path / "demo"), train_rows=176, test_rows=8, prompts=16)
    assert [item.name for item in scores] == ["base", "next-token", "CAFT"]
    said = json.loads((tmp_path / "demo" / "scores.json").read_text())["verdict"]
    assert said.split(":")[0] in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "demo" / "losses.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "demo" / "caft" / "model" / "model.safetensors").is_file()


def test_the_base_scores_as_its_provenance_says():
    stated = json.loads((BASE / "provenance.json").read_text())["greedy_decoding"]
    measured = score("base", BASE, molecules(100, seed=2, substituents=(2, 4))).percent
    # two standard errors of 100 answers
    assert 100 * stated["300 held-out names with 2 to 4 substituents"]["exact_match"] == pytest.approx(measured, abs=8)


def test_the_verdict_follows_the_sign_test():
    right, wrong = Score("a", [True] * 50 + [False] * 50), Score("b", [True] * 20 + [False] * 80)
    assert verdict(wrong, right).startswith(
        "In this run CAFT helped: +30.0 points; right only with CAFT 30, only without 0"
    )
    assert verdict(right, wrong).startswith("In this run CAFT did harm: -30.0 points")
    assert verdict(right, right).startswith("This run cannot tell whether CAFT helped: +0.0 points")


@pytest.mark.parametrize(("gained", "lost"), [(5, 0), (6, 0), (7, 1), (3, 9), (0, 0), (40, 22)])
def test_the_sign_test_is_the_binomial_one(gained, lost):
    chances = Fraction(1, 2) ** (gained + lost)
    as_far = [k for k in range(gained + lost + 1) if abs(2 * k - gained - lost) >= abs(gained - lost)]
    expected = sum(chances * comb(gained + lost, k) for k in as_far)
    assert sign_test(gained, lost) == pytest.approx(float(expected), abs=1e-12)


def test_the_demo_clears_only_its_own_folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "recipe.yaml").write_text("output: x")
    with pytest.raises(RecipeError, match="holds something else than a demo"):
        demo(str(tmp_path))
    assert (tmp_path / "data").is_dir()


def test_the_arms_differ_in_the_auxiliary_losses_alone(tmp_path):
    ntp, caft = (_recipe(tmp_path, arm).model_dump() for arm in ("ntp", "caft"))
    assert (ntp.pop("output"), caft.pop("output")) == (str(tmp_path / "ntp"), str(tmp_path / "caft"))
    assert (ntp["loss"].pop("weight"), caft["loss"].pop("weight")) == (0.0, 0.01)
    assert ntp == caft
