"""A stopped run goes on to the very result of one left alone."""

import json
import os
import random
import signal

import kills
import pytest
from opened import stage_two_config
from transformers import TrainerCallback

from caftune import CAFTTrainer
from caftune.data.forms import load_rows
from caftune.pipeline.finetune import finetune_model
from caftune.pipeline.folder import Stage, last_checkpoint
from caftune.pipeline.recipe import load_recipe
from caftune.training.progress import StopOnSigterm, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    kills.prepare(folder)
    return folder


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_sigterm_writes_a_checkpoint_and_the_same_command_goes_on(folder, tuning, monkeypatch, capfd):
    options = ["trainer.save_strategy=no", "trainer.max_steps=6"]
    alone = load_recipe(folder / f"{tuning}.yaml", [f"output={folder / tuning}-left", *options])
    finetune_model(alone)
    recipe = load_recipe(folder / f"{tuning}.yaml", [f"output={folder / tuning}-stopped", *options])

    class Terminate(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        begin = StopOnSigterm.on_train_begin

        def begin_and_terminate(self, *args, **kwargs):
            begin(self, *args, **kwargs)
            self._trainer.add_callback(Terminate())

        patched.setattr(StopOnSigterm, "on_train_begin", begin_and_terminate)
        with pytest.raises(SystemExit) as stopped:
            finetune_model(recipe)
    assert stopped.value.code == 143
    assert "Stopped by SIGTERM after step 4" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert [path.name for path in (folder / f"{tuning}-stopped" / "train").glob("checkpoint-*")] == ["checkpoint-4"]
    finetune_model(recipe)
    logs = [
        json.loads((folder / f"{tuning}-{run}" / "results.jsonl").read_text())["log"] for run in ("left", "stopped")
    ]
    one, other = ([(e["loss"], e["h3_loss"], e["grad_norm"]) for e in log if "loss" in e] for log in logs)
    assert one == other
    assert len(one) == 6
    weights = [folder / f"{tuning}-{run}" / "model" / "model.safetensors" for run in ("left", "stopped")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_killed_run_started_again_ends_with_the_same_weights_and_losses(folder):
    """One kill; `python tests/kills.py` does twenty."""
    alone, killed = folder / "lora-alone", folder / "lora-killed"
    kills.finish(kills.start(folder, "lora", alone), alone)
    assert kills.kill_once(folder, "lora", killed, random.Random(0)) not in (kills.AFTER, "checkpoints []")
    kills.finish(kills.start(folder, "lora", killed), killed)
    assert kills.result(killed) == kills.result(alone)


@pytest.mark.parametrize("content", ["", '{"epoch": 1.0, "log_his'])
def test_a_checkpoint_whose_last_file_is_cut_off_is_passed_over(content, tmp_path):
    for number, text in ((2, "{}"), (4, content)):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_run_killed_while_its_folder_was_made_goes_on(folder, tmp_path):
    recipe = load_recipe(folder / "full.yaml", [f"output={tmp_path}"])
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / ".recipe.yaml.partial").write_text("seed: 4")
    stage = Stage(recipe, "train", {}).open()
    (stage / "provenance.json").unlink()
    assert Stage(recipe, "train", {}).open() == stage
    assert json.loads((stage / "provenance.json").read_text())["versions"]


def test_a_failed_run_gives_sigterm_back(folder, tmp_path):
    class Failing(TrainerCallback):
        def on_step_begin(self, *_, **__):
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
            raise MemoryError

    recipe = load_recipe(folder / "full.yaml", [f"output={tmp_path}"])
    rows = load_rows(recipe.data.train)
    args = stage_two_config(recipe, tmp_path)
    trainer = CAFTTrainer(recipe.model.name, args, train_dataset=rows, callbacks=[Failing()])
    with pytest.raises(MemoryError):
        run(trainer, checkpoint=None)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
