"""Runs that stop early: when, with which weights, and also when they resume."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_resumption import equal, weights
from test_run_folder import FAST, recipe_in, write

from caftune import CAFTConfig
from caftune.errors import CaftuneError
from caftune.pipeline.adapt import adapt_heads
from caftune.pipeline.finetune import export_checkpoint, finetune_model
from caftune.pipeline.pretrain import pretrain_heads
from caftune.pipeline.schema import Recipe
from caftune.training.early_stopping import StopEarly

# Every evaluation after the first is worse, as the loss falls: the second and the third use up a patience of two.
BEST_IS_FIRST = {
    **{"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True},
    **{"eval_strategy": "epoch", "save_strategy": "epoch", "early_stopping_patience": 2},
    **{"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "num_train_epochs": 5, "logging_steps": 1},
}
LAST, BEST = 9, 3  # steps; three an epoch


def run_of(folder, name="run", **trainer):
    options = {**FAST, **BEST_IS_FIRST, **trainer}
    recipe = recipe_in(folder, loss={"weight": 0}, data={"limit": 20, "eval": "data.jsonl"})
    return recipe.model_copy(update={"output": str(folder / name), "trainer": options})


def result_of(recipe, stage="train"):
    lines = [json.loads(line) for line in Path(recipe.output, "results.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["stage"] == stage)


def losses(recipe):
    return [(entry["step"], entry["loss"]) for entry in result_of(recipe)["log"] if "loss" in entry]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that stopped early, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("early")
    write(folder / "data.jsonl", seed=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        finetune_model(run_of(folder))
    return folder


@pytest.fixture
def folder(stopped, tmp_path, monkeypatch):
    shutil.copytree(stopped, tmp_path / "moved")
    for state in (tmp_path / "moved").glob("run/train/*/trainer_state.json"):
        state.write_text(state.read_text().replace(str(stopped), "/nowhere"))
    monkeypatch.chdir(tmp_path / "moved")
    return tmp_path / "moved"


def test_a_run_stops_after_its_patience_and_exports_the_best_checkpoint(folder):
    recipe = run_of(folder)
    assert [step for step, _ in losses(recipe)][-1] == LAST
    best = load_file(folder / "run" / "train" / f"checkpoint-{BEST}" / "model.safetensors")
    last = load_file(folder / "run" / "train" / f"checkpoint-{LAST}" / "model.safetensors")
    exported = weights(recipe)
    assert all((exported[name] == best[name]).all() for name in exported)
    assert not all((exported[name] == last[name]).all() for name in exported)
    assert equal(load_file(export_checkpoint(recipe) / "model.safetensors"), exported)


@pytest.mark.parametrize("left", [BEST, LAST - 3, LAST])
def test_a_resumed_run_stops_where_the_uninterrupted_one_does(folder, left, capsys):
    recipe = run_of(folder)
    before, log, metrics = weights(recipe), losses(recipe), result_of(recipe)["metrics"]
    for step in range(left + 3, LAST + 1, 3):
        shutil.rmtree(folder / "run" / "train" / f"checkpoint-{step}")
    shutil.rmtree(folder / "run" / "model")
    finetune_model(recipe)
    assert equal(weights(recipe), before)
    assert (losses(recipe), result_of(recipe)["metrics"]) == (log, metrics)
    said = capsys.readouterr().err
    assert f"Stopped early after step {LAST} of 15: the best evaluation is that of step {BEST}," in said


def test_an_evaluation_at_the_start_is_not_counted_again_on_resume(tmp_path, monkeypatch):
    """At the best checkpoint it repeats the best value, which is no improvement."""
    write(tmp_path / "data.jsonl", seed=5)
    monkeypatch.chdir(tmp_path)
    # The first evaluation, before training, is worse than that of step 3, where `greater_is_better` wants falling losses.
    options = {"eval_on_start": True, "greater_is_better": False, "early_stopping_patience": 1, "num_train_epochs": 2}
    recipe = run_of(tmp_path, **options)
    finetune_model(recipe)
    steps = [step for step, _ in losses(recipe)]
    shutil.rmtree(tmp_path / "run" / "train" / "checkpoint-6")
    finetune_model(recipe)
    assert [step for step, _ in losses(recipe)] == steps == [1, 2, 3, 4, 5, 6]


def test_a_stopped_run_without_optimizer_states_gives_its_model_again(tmp_path, monkeypatch):
    write(tmp_path / "data.jsonl", seed=5)
    monkeypatch.chdir(tmp_path)
    recipe = run_of(tmp_path, save_only_model=True)
    finetune_model(recipe)
    before = weights(recipe)
    shutil.rmtree(tmp_path / "run" / "model")
    finetune_model(recipe)
    assert equal(weights(recipe), before)


def test_a_checkpoint_without_early_stopping_can_be_resumed_with_it(tmp_path, rows):
    from trainers import config

    from caftune import CAFTTrainer
    from caftune.demo.run import BASE

    options = {name: value for name, value in BEST_IS_FIRST.items() if name != "early_stopping_patience"}
    options |= {"aux_weight": 0.0, "max_steps": -1, "num_train_epochs": 2}
    data = {"train_dataset": rows.select(range(4)), "eval_dataset": rows.select(range(4))}
    CAFTTrainer(str(BASE), config(tmp_path, **options), **data).train()
    options |= {"num_train_epochs": 9, "early_stopping_patience": 2}
    trainer = CAFTTrainer(str(BASE), config(tmp_path, **options), **data)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4  # the third and the fourth evaluation


def test_a_second_training_of_a_trainer_counts_from_the_start(rows, tmp_path):
    from trainers import config

    from caftune import CAFTTrainer
    from caftune.demo.run import BASE

    options = {**BEST_IS_FIRST, "aux_weight": 0.0, "max_steps": -1}
    data = {"train_dataset": rows.select(range(4)), "eval_dataset": rows.select(range(4))}
    trainer = CAFTTrainer(str(BASE), config(tmp_path, **options), **data)
    for _ in range(2):
        trainer.train()
        assert trainer.state.global_step == 3


def test_both_trainings_of_heads_stop_early_with_their_best_heads(tmp_path, monkeypatch, capsys):
    write(tmp_path / "data.jsonl", seed=5)
    monkeypatch.chdir(tmp_path)
    options = {**FAST, **BEST_IS_FIRST, "max_steps": -1, "save_total_limit": 5}
    heads, data = {"count": 1, "text": "data.jsonl"}, {"limit": 20, "eval": "data.jsonl"}
    recipe = recipe_in(tmp_path, pretrain=options, heads=heads, data=data)
    recipe = Recipe.model_validate({**recipe.model_dump(), "adapt": options})
    for stage, train in {"pretrain": pretrain_heads, "adapt": adapt_heads}.items():
        capsys.readouterr()
        heads = train(recipe)
        said = capsys.readouterr().err
        assert f"Stopped early after step {LAST} of 15: the best evaluation is that of step {BEST}," in said
        kept = {
            step: load_file(tmp_path / "out" / stage / f"checkpoint-{step}" / "heads.safetensors") for step in (3, 9)
        }
        assert equal(load_file(heads / "heads.safetensors"), kept[BEST])
        assert not equal(kept[BEST], kept[LAST])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"early_stopping_patience": 0}, "must be a whole number above 0, got 0"),
        ({"early_stopping_patience": -1}, "must be a whole number above 0, got -1"),
        ({"early_stopping_patience": 1.5}, r"must be a whole number above 0, got 1\.5"),
        ({"early_stopping_patience": "two"}, "must be a whole number above 0, got 'two'"),
        ({"early_stopping_patience": True}, "must be a whole number above 0, got True"),
        ({"early_stopping_patience": 1, "load_best_model_at_end": False}, "needs load_best_model_at_end=True"),
    ],
)
@pytest.mark.parametrize("stage", [{"aux_weight": 0.0}, {"pretrain_heads": True}])
def test_a_patience_that_means_nothing_is_refused(tmp_path, stage, options, message):
    given = {**stage, "load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch", **options}
    with pytest.raises(CaftuneError, match=f"early_stopping_patience {message}"):
        CAFTConfig(str(tmp_path), **given)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"trainer": {"eval_strategy": None}},
            "trainer: --load_best_model_at_end requires the save and eval",
        ),
        ({"trainer": {"early_stopping_patience": 0}}, "trainer: early_stopping_patience must be"),
        (
            {"data": {"train": "data.jsonl"}},
            "data.eval must name a file or hub id with trainer.eval_strategy=epoch, got",
        ),
        (
            {"data": {"train": "data.jsonl"}, "trainer": {}, "adapt": {"eval_strategy": "steps"}},
            "data.eval must name a file or hub id with adapt.eval_strategy=steps",
        ),
        ({"pretrain": {"early_stopping_patience": 0}}, "pretrain: early_stopping_patience must be"),
    ],
)
def test_a_comparison_refuses_it_before_it_makes_heads(folder, monkeypatch, sections, message):
    from caftune.compare import runner

    recipe = run_of(folder).model_dump()
    recipe["loss"]["weight"], recipe["compare"]["arms"] = 0.01, ["ntp", "caft"]
    recipe["eval"] |= {"tasks": ["exact_match"], "data": {"exact_match": "data.jsonl"}}
    if sections.get("trainer"):
        changed = {**recipe["trainer"], **sections["trainer"]}
        sections = {**sections, "trainer": {name: value for name, value in changed.items() if value is not None}}
    monkeypatch.setattr(runner, "_ensure_heads", lambda *_, **__: pytest.fail("heads were made"))
    with pytest.raises(CaftuneError, match=message):
        runner.compare(Recipe.model_validate(recipe | sections))


def test_training_refuses_evaluations_without_rows(folder):
    recipe = run_of(folder, "other")
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"eval": None})})
    with pytest.raises(CaftuneError, match="data.eval must name a file or hub id with trainer.eval_strategy=epoch"):
        finetune_model(recipe)
    recipe = recipe.model_copy(update={"trainer": {**FAST, "eval_strategy": False, "max_steps": 1}})  # YAML's `no`
    finetune_model(recipe)


def test_transformers_may_restore_the_callback_itself():
    made = StopEarly(early_stopping_patience=3)
    assert vars(StopEarly.from_state(made.state())) == vars(made)
