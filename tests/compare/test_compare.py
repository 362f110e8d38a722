"""`caftune compare`: arms that differ in the auxiliary losses alone, resumable, every number found again from its files."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from rich.console import Console
from scipy import stats
from test_divergence import NaNAt
from typer.testing import CliRunner

from caftune import CAFTTrainer
from caftune.checkpoints.heads_folder import describe_heads
from caftune.cli import app
from caftune.compare import runner as comparing
from caftune.compare.control_heads import write_control_heads
from caftune.compare.runner import arm_recipe
from caftune.compare.summary import Comparison, main_loss
from caftune.demo.chemistry import completion, molecules, prompt
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.evals.statistics import holm
from caftune.pipeline.finetune import finetune_model
from caftune.pipeline.plan import plan
from caftune.pipeline.schema import Recipe
from caftune.report.render import write_report

ARMS = ["ntp", "caft", "beta0", "no_pretraining"]


def values_in(folder, heads, **compared):
    return {
        "output": "out",
        "model": {"name": str(BASE)},
        "heads": {"path": heads},
        "loss": {"weight": 0.5},
        "data": {"train": "train.jsonl", "eval": "test.jsonl", "max_length": 96},
        "trainer": {
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "learning_rate": 1e-2,
            "gradient_checkpointing": False,
            "save_steps": 1,
            "use_cpu": True,
        },
        "eval": {"tasks": ["exact_match"], "data": {"exact_match": "test.jsonl"}, "max_new_tokens": 12},
        "compare": {"arms": ARMS, "seeds": 2, **compared},
    }


def compare(recipe, only=None):
    """What comparison.json holds."""
    return comparing.compare(recipe, only).to_json()


def recipe_in(folder, heads, **compared):
    return Recipe.model_validate(values_in(folder, heads, **compared))


@pytest.fixture(scope="module")
def finished(heads, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    for name, count, seed in (("train", 24, 5), ("test", 6, 6)):
        rows = [
            {"prompt": prompt(m), "completion": completion(m)} for m in molecules(count, seed=seed, substituents=(0, 1))
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        compare(recipe_in(folder, heads))
    return folder


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def found(finished):
    return json.loads((finished / "out" / "compare" / "comparison.json").read_text())


def count_trainings(monkeypatch):
    made = []
    real = finetune_model

    def counted(recipe):
        made.append(Path(recipe.output).relative_to(Path("out", "compare")).as_posix())
        return real(recipe)

    monkeypatch.setattr("caftune.pipeline.finetune.finetune_model", counted)
    return made


def measure(found, task, name, arm):
    return next(row for row in found["measures"] if (row["task"], row["measure"], row["arm"]) == (task, name, arm))


def test_all_arms_have_all_seeds(found):
    assert (found["arms"], found["seeds"], found["missing"]) == (ARMS, [42, 43], [])
    assert all(len(found["logs"][arm]) == 2 for arm in ARMS)


def test_measures_are_found_again_from_the_answers(finished, found):
    for arm in ARMS:
        for number, seed in enumerate(found["seeds"]):
            file = finished / "out" / "compare" / arm / str(seed) / "eval" / "model" / "exact_match.jsonl"
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            right = [line["completion"].strip() == line["reference"].strip() for line in lines]
            assert measure(found, "exact_match", "exact_match", arm)["values"][number] == sum(right) / 6


def test_the_held_out_loss_is_the_next_token_loss_of_each_arm(finished, found):
    for arm in ARMS:
        for number, seed in enumerate(found["seeds"]):
            rows = (finished / "out" / "compare" / arm / str(seed) / "results.jsonl").read_text().splitlines()
            metrics = next(row["metrics"] for row in map(json.loads, rows) if row["stage"] == "train")
            assert measure(found, "held-out text", "loss", arm)["values"][number] == metrics["loss"]
            assert metrics.get("h1_loss", metrics["loss"]) == pytest.approx(metrics["loss"], rel=0.02)


def test_arms_begin_with_the_same_weights_and_rows(found):
    first = {arm: [main_loss(log[0]) for log in found["logs"][arm]] for arm in ARMS}
    assert all(log[0]["step"] == 1 for logs in found["logs"].values() for log in logs)
    assert all(losses == pytest.approx(first["ntp"], rel=1e-5) for losses in first.values())
    assert first["ntp"][0] != pytest.approx(first["ntp"][1], rel=1e-3)  # seeds differ in their rows
    assert found["checks"]["start"] < 1e-5


def test_beta_zero_is_next_token_fine_tuning_and_its_heads_are_measured(found):
    for task, name in (("exact_match", "exact_match"), ("held-out text", "loss")):
        assert measure(found, task, name, "beta0")["values"] == pytest.approx(
            measure(found, task, name, "ntp")["values"], rel=1e-6
        )
    assert found["checks"]["beta0"] == 0
    assert any("eval_h2_loss" in entry for entry in found["logs"]["beta0"][0])


def test_the_plan_of_every_run_is_written_down_beside_its_costs(copied, heads, found):
    for arm in ("ntp", "caft", "beta0"):  # the heads of the fourth are gone
        for number, seed in enumerate(found["seeds"]):
            said, kept = plan(arm_recipe(recipe_in(copied, heads), arm, seed)).estimate, found["plans"][arm]
            assert kept["flops_per_token"][number] == said.flops.total
            assert kept["overhead"][number] == said.overhead_here
            assert kept["peak_memory_bytes"][number] == said.memory.peak
    assert found["plans"]["no_pretraining"]["overhead"] == found["plans"]["caft"]["overhead"] > [1.0, 1.0]
    for cost in found["costs"].values():
        for before, peak in zip(cost["memory_before_bytes"], cost["peak_memory_bytes"], strict=True):
            assert 0 < before < peak


def test_concept_measures_are_found_again_from_the_concepts(finished, found):
    for arm in ARMS:
        file = finished / "out" / "compare" / arm / "43" / "concepts.jsonl"
        concepts = [json.loads(line) for line in file.read_text().splitlines()]
        probabilities = [math.exp(concept["log_prob"]) for concept in concepts]
        assert measure(found, "concepts", "probability", arm)["values"][1] == pytest.approx(np.mean(probabilities))
        exact = np.mean([concept["exact"] for concept in concepts])
        assert measure(found, "concepts", "exact", arm)["values"][1] == pytest.approx(exact)
    assert len(measure(found, "concepts", "exact", "base")["values"]) == 1


def test_the_auxiliary_loss_makes_a_difference(found):
    ntp, caft, trained = (
        measure(found, "held-out text", "loss", arm)["values"] for arm in ("ntp", "caft", "no_pretraining")
    )
    assert ntp != pytest.approx(caft, rel=1e-4)
    assert caft != pytest.approx(trained, rel=1e-4)


def test_differences_and_corrected_p_values_are_those_of_the_values(found):
    rows = [row for row in found["comparisons"] if (row["arm"], row["baseline"]) == ("caft", "ntp")]
    for row in rows:
        ours, theirs = (measure(found, row["task"], row["measure"], arm)["values"] for arm in ("caft", "ntp"))
        assert row["difference"] == pytest.approx(np.mean(ours) - np.mean(theirs), abs=1e-12)
        assert row["low"] <= row["difference"] <= row["high"]
    assert rows[0]["p_holm"] == rows[0]["p_value"]  # it decides, and was named before
    assert [row["p_holm"] for row in rows[1:]] == holm([row["p_value"] for row in rows[1:]]).tolist()
    loss = next(row for row in rows if row["measure"] == "loss")
    pair = [measure(found, "held-out text", "loss", arm)["values"] for arm in ("caft", "ntp")]
    assert loss["p_value"] == pytest.approx(stats.ttest_rel(*pair).pvalue)


def test_what_is_no_number_in_one_run_is_left_out_and_the_rest_is_written(copied, heads):
    for name, key in (("results.jsonl", 'loss": '), ("concepts.jsonl", 'log_prob": ')):
        file = copied / "out" / "compare" / "caft" / "43" / name
        file.write_text(re.sub(f"{key}[-0-9.e]+", f"{key}NaN", file.read_text()))
    again, lost = compare(recipe_in(copied, heads)), ["loss", "probability"]
    assert [(row["run"], row["measure"]) for row in again["left_out"]] == [("caft/43", name) for name in lost]
    for arm, missing in (("caft", set(lost)), ("beta0", set())):
        for rows in (again["measures"], again["comparisons"]):
            assert set(lost) - {row["measure"] for row in rows if row["arm"] == arm} == missing
    assert again["checks"]["start"] is None
    write_report([copied / "out"])


@pytest.mark.parametrize(
    ("broken", "step"),
    [(["caft/43"], 3), (["ntp/42", "caft/42", "caft/43"], 1)],
)
def test_a_run_that_diverges_counts_as_one_without_numbers_and_the_others_go_on(
    copied, heads, monkeypatch, broken, step
):
    for run in broken:
        shutil.rmtree(copied / "out" / "compare" / run)
    init = CAFTTrainer.__init__

    def with_nan(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.add_callback(NaNAt(step))

    monkeypatch.setattr(CAFTTrainer, "__init__", with_nan)
    again = compare(recipe_in(copied, heads))
    assert again["missing"] == []
    lost = {(row["run"], row["task"], row["measure"]) for row in again["left_out"]}
    assert {(run, "held-out text", "loss") for run in broken} <= lost
    assert {(run, "exact_match", "exact_match") for run in broken} <= lost
    assert {run for run, _, _ in lost} == set(broken)
    arms = {run.partition("/")[0] for run in broken}
    for rows in (again["measures"], again["comparisons"]):
        assert not arms & {row["arm"] for row in rows if row["task"] != "concepts"}
    kept = {row["arm"] for row in again["measures"] if row["measure"] == "loss"}
    assert kept == set(ARMS) - arms
    assert f"is not a finite number in {', '.join(broken)}." in again["verdict"]
    assert all(page.is_file() for page in write_report([copied / "out"]))
    made = count_trainings(monkeypatch)
    assert compare(recipe_in(copied, heads))["left_out"] == again["left_out"]
    assert made == []  # it would diverge again


def test_what_each_arm_cost_is_there(found):
    for arm in ARMS:
        cost = found["costs"][arm]
        assert cost["tokens"] == found["costs"]["ntp"]["tokens"]
        assert all(value > 0 for value in cost["seconds"])
    ntp, caft, beta0, trained = (found["costs"][arm]["flops"][0] for arm in ("ntp", "caft", "beta0", "no_pretraining"))
    assert ntp == beta0 < caft == trained  # both train their heads along


def test_models_and_checkpoints_are_removed_once_they_are_evaluated(finished):
    for arm in ARMS:
        folder = finished / "out" / "compare" / arm / "42"
        assert not [path for path in folder.rglob("*.safetensors")]
    assert (finished / "out" / "compare" / "caft" / "42" / "recipe.yaml").is_file()


def test_a_comparison_is_read_as_it_is_written(finished, found):
    read = Comparison.read(finished / "out" / "compare" / "comparison.json")
    assert json.loads(json.dumps(read.to_json())) == found
    assert [row.arm for row in read.deciding.differences] == ["caft", "beta0", "no_pretraining", "caft"]


def test_a_finished_comparison_trains_and_evaluates_nothing(copied, heads, found, monkeypatch):
    monkeypatch.setattr("caftune.pipeline.finetune.finetune_model", lambda _: pytest.fail("trained"))
    again = compare(recipe_in(copied, heads))
    for key in ("measures", "comparisons", "verdict", "logs", "costs", "concepts", "examples"):
        assert json.loads(json.dumps(again[key])) == found[key]


def test_one_more_seed_runs_for_itself_alone(copied, heads, found, monkeypatch):
    made = count_trainings(monkeypatch)
    again = compare(recipe_in(copied, heads, arms=["ntp", "caft"], seeds=3))
    assert made == ["ntp/44", "caft/44"]
    assert again["seeds"] == [42, 43, 44]
    before = measure(found, "held-out text", "loss", "caft")["values"]
    assert measure(again, "held-out text", "loss", "caft")["values"][:2] == before


def test_a_comparison_that_is_stopped_goes_on_where_it_was(copied, heads, found, monkeypatch):
    for arm, seed in (("caft", 43), ("beta0", 43), ("beta0", 42)):
        shutil.rmtree(copied / "out" / "compare" / arm / str(seed))
    real = comparing.evaluate_model
    with monkeypatch.context() as patch:

        def stopped(recipe):
            if recipe.output.endswith("beta0/42"):
                raise KeyboardInterrupt  # trained and not evaluated
            return real(recipe)

        patch.setattr(comparing, "evaluate_model", stopped)
        with pytest.raises(KeyboardInterrupt):
            compare(recipe_in(copied, heads))
    made = count_trainings(monkeypatch)
    again = compare(recipe_in(copied, heads))
    assert made == ["caft/43", "beta0/43"]
    assert json.loads(json.dumps(again["measures"])) == found["measures"]


def test_one_run_at_a_time_comes_to_the_same(copied, heads, found):
    shutil.rmtree(copied / "out")
    few = {"arms": ["ntp", "caft"], "seeds": 1}
    recipe = recipe_in(copied, heads, **few)
    partly = compare(recipe, "caft/42")
    assert (partly["missing"], partly["measures"]) == (["ntp/42"], [])
    compare(recipe, "ntp/42")
    whole = compare(recipe, "base")
    for arm in ("base", "ntp", "caft"):
        one = measure(found, "exact_match", "exact_match", arm)["values"][:1]
        assert measure(whole, "exact_match", "exact_match", arm)["values"] == one


def test_a_finished_run_of_another_recipe_is_refused(copied, heads):
    values = values_in(copied, heads)
    values["trainer"]["learning_rate"] = 2e-2
    with pytest.raises(CaftuneError, match=r"of another recipe \(trainer.learning_rate: 0.01 -> 0.02\)"):
        compare(Recipe.model_validate(values))


def test_runs_made_before_there_was_a_form_to_choose_are_compared_unless_one_is_chosen(copied, heads, monkeypatch):
    monkeypatch.setattr("caftune.pipeline.finetune.finetune_model", lambda _: pytest.fail("trained"))
    for file in (copied / "out" / "compare").rglob("compare/recipe.yaml"):
        kept = file.read_text()
        assert "eval.chat: null\n" in kept
        file.write_text(kept.replace("eval.chat: null\n", ""))
    compare(recipe_in(copied, heads))
    values = values_in(copied, heads)
    values["eval"]["chat"] = False
    with pytest.raises(CaftuneError, match=r"of another recipe \(eval.chat: None -> False\)"):
        compare(Recipe.model_validate(values))


def test_runs_of_two_recipes_are_never_compared_with_each_other(copied, heads):
    """One at a time: the run that is made fits the recipe, those made before do not."""
    few = {"arms": ["ntp", "caft"], "seeds": 1}
    shutil.rmtree(copied / "out")
    compare(recipe_in(copied, heads, **few), "ntp/42")
    values = values_in(copied, heads, **few)
    values["eval"]["max_new_tokens"] = 11
    with pytest.raises(CaftuneError, match=r"of another recipe \(eval.max_new_tokens: 12 -> 11\)"):
        compare(Recipe.model_validate(values), "caft/42")


def test_the_last_of_single_runs_writes_the_comparison(copied, heads):
    shutil.rmtree(copied / "out")
    recipe = recipe_in(copied, heads, arms=["ntp", "caft"], seeds=1)
    compare(recipe, "ntp/42")
    assert not (copied / "out" / "compare" / "comparison.json").exists()
    compare(recipe, "caft/42")
    assert (copied / "out" / "compare" / "comparison.json").is_file()


def test_single_runs_compute_no_statistics_while_others_are_missing(copied, heads, monkeypatch):
    recipe = recipe_in(copied, heads)
    shutil.rmtree(copied / "out/compare/caft/43")
    (copied / "out/compare/comparison.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(comparing, "summarise_comparison", lambda *_, **__: pytest.fail("computed"))
        found = compare(recipe, "ntp/42")
        assert found["missing"] == ["caft/43"]
        assert found["verdict"] == "ntp/42 is done. Missing runs: caft/43."
        comparing.print_comparison(Console(quiet=True), Comparison.from_json(found))
        assert compare(recipe, "base")["missing"] == ["caft/43"]
    assert not (copied / "out/compare/comparison.json").exists()
    assert compare(recipe, "caft/43")["missing"] == []
    assert (copied / "out/compare/comparison.json").is_file()


def test_control_heads_follow_the_heads_that_they_are_made_from(copied, heads, tmp_path, monkeypatch):
    monkeypatch.setattr("caftune.pipeline.finetune.finetune_model", lambda _: None)
    other = tmp_path / "other"
    write_control_heads("shuffled_horizons", Path(heads), other, seed=0)
    run = arm_recipe(recipe_in(copied, heads, arms=["ntp", "random_heads"]), "random_heads", 42)
    Path(run.output).mkdir(parents=True)
    for source in (heads, str(other)):
        comparing._train(run, "random_heads", Path(source))
        made_from = describe_heads(Path(run.output, "heads"))["training"]["made_from"]
        assert made_from == describe_heads(source)["weights_sha256"]


def test_arms_have_as_many_heads_as_the_heads_that_are_named(copied, heads):
    recipe = recipe_in(copied, heads)
    for arm in ARMS:
        assert arm_recipe(recipe, arm, 42).heads.count == 3
        Recipe.model_validate(arm_recipe(recipe, arm, 42).model_dump())


def test_a_trained_run_of_another_recipe_is_not_evaluated_for_this_one(copied, heads, monkeypatch):
    shutil.rmtree(copied / "out")
    recipe = recipe_in(copied, heads, arms=["ntp", "caft"], seeds=1)
    with monkeypatch.context() as patch:
        real = comparing._study

        def stopped(run, model):
            if run.output.endswith("42"):
                raise KeyboardInterrupt
            return real(run, model)

        patch.setattr(comparing, "_study", stopped)
        with pytest.raises(KeyboardInterrupt):
            compare(recipe)
    values = values_in(copied, heads, arms=["ntp", "caft"], seeds=1)
    values["trainer"]["learning_rate"] = 2e-2
    with pytest.raises(CaftuneError, match=r"of another recipe \(trainer.learning_rate"):
        compare(Recipe.model_validate(values))


def test_arms_differ_in_the_auxiliary_losses_and_heads_alone(copied, heads):
    recipe = recipe_in(copied, heads, arms=[*ARMS, "caft_frozen", "random_heads", "shuffled_horizons"])
    runs = {arm: arm_recipe(recipe, arm, 42).model_dump() for arm in recipe.compare.arms}
    for run in runs.values():
        for key in ("output", "heads", "loss"):
            run.pop(key)
    assert all(run == runs["ntp"] for run in runs.values())


@pytest.mark.parametrize(
    ("train", "trained"),
    [
        (True, {"caft", "beta0", "random_heads", "shuffled_horizons", "no_pretraining"}),
        (False, {"no_pretraining"}),
    ],
)
def test_arms_follow_the_recipe_in_training_heads_but_for_those_named_after_it(copied, heads, train, trained):
    arms = [*ARMS, "caft_frozen", "random_heads", "shuffled_horizons"]
    recipe = recipe_in(copied, heads, arms=arms)
    section = recipe.heads.model_copy(update={"train": train, "lora_rank": 2 if train else None})
    recipe = recipe.model_copy(update={"heads": section})
    runs = {arm: arm_recipe(recipe, arm, 42).heads for arm in arms}
    assert {arm for arm, found in runs.items() if found.train} == trained
    assert {found.lora_rank for arm, found in runs.items() if not found.train} == {None}
    assert runs["caft_frozen"] == runs["caft"].model_copy(update={"train": False, "lora_rank": None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"weight": 0.0}}, "loss.weight must be above 0 in a comparison"),
        ({"eval": {}, "data": {"train": "train.jsonl"}}, "eval.tasks or data.eval must be given"),
        ({"eval": {"tasks": ["exact_match"], "backend": "server"}}, "eval.backend must be transformers or vllm"),
        ({"heads": {}}, "heads is missing. Run `caftune label` and `caftune pretrain-heads`"),
        ({"heads": {"path": "nowhere/at/all"}}, "nowhere/at/all must be a folder"),
        ({"model": {"name": str(BASE), "tuning": "lora", "lora": {"merge": False}}}, "model.lora.merge must be true"),
        (
            {"adapt": {}, "compare": {"arms": ["ntp", "random_heads"]}},
            "compare.arms must not hold random_heads with adapt",
        ),
        ({"eval": {"tasks": ["exact_match"]}}, "eval.data.exact_match must name a file"),
        (
            {"heads": {"train": False}, "compare": {"arms": ["ntp", "caft", "caft_frozen"]}},
            "compare.arms must not hold caft_frozen with heads.train: false",
        ),
        ({"loss": {"weight": 0.5, "min_weight": 0.1}}, "loss.min_weight needs heads.train: false"),
        (
            {"loss": {"min_weight": 0.1}, "heads": {"train": False}},  # no_pretraining trains them all the same
            "loss.min_weight needs heads.train: false",
        ),
        ({"heads": {"train": False, "lora_rank": 2}}, "heads.lora_rank needs heads.train: true"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(copied, heads, monkeypatch, changes, message):
    monkeypatch.setattr("caftune.pipeline.finetune.finetune_model", lambda _: pytest.fail("trained"))
    values = {**values_in(copied, heads), "output": "elsewhere", **changes}
    with pytest.raises(ValueError, match=message):
        compare(Recipe.model_validate(values), "ntp/42")


def test_a_run_that_does_not_exist_is_refused_with_those_that_do(copied, heads):
    with pytest.raises(CaftuneError, match=r"--only must be one of base, ntp/42, caft/42, .* got caft/99"):
        compare(recipe_in(copied, heads), "caft/99")


@pytest.mark.parametrize("arms", [["caft", "beta0"], ["ntp"], ["ntp", "ntp"]])
def test_arms_without_a_baseline_or_given_twice_are_refused(copied, heads, arms):
    with pytest.raises(ValueError, match="arms that hold ntp"):
        recipe_in(copied, heads, arms=arms)


def test_the_command_prints_measures_and_verdict(copied, heads, found):
    (copied / "recipe.yaml").write_text(json.dumps(values_in(copied, heads)))
    ran = CliRunner().invoke(app, ["compare", "recipe.yaml"])
    assert ran.exit_code == 0, ran.output
    said = " ".join(ran.output.split())
    assert found["verdict"] in said
    assert "no_pretraining" in said


def test_a_run_that_another_process_makes_is_refused(copied, heads):
    run = arm_recipe(recipe_in(copied, heads), "caft", 42)
    with (
        FileLock(Path(run.output, ".lock")),
        pytest.raises(CaftuneError, match="caft/42 is being made by another process"),
    ):
        comparing._make(run, {}, "caft", Path(heads))
