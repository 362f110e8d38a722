"""A training that diverged says from which step on and exports nothing, in every stage and kind of tuning."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import build
from opened import load_model
from safetensors.torch import load_file, save_file
from test_pipeline import FAST, recipe_with
from test_pipeline import values as values_of_runs
from trainers import config
from transformers import AutoModelForCausalLM, TrainerCallback
from typer.testing import CliRunner

from caftune import CAFTTrainer
from caftune.checkpoints.export import export_model
from caftune.checkpoints.heads_folder import read_heads
from caftune.cli import app
from caftune.core.finite import not_finite
from caftune.demo.run import BASE
from caftune.errors import CaftuneError
from caftune.generation.backends import Sampling
from caftune.generation.batches import answer_in_batches
from caftune.pipeline.finetune import export_checkpoint, finetune_model
from caftune.pipeline.pretrain import pretrain_heads
from caftune.pipeline.recipe import save_recipe
from caftune.training.divergence import DivergedError, LossWatch, StopOnDivergence

values = values_of_runs  # a fixture of its own here: files in another folder


@pytest.fixture(scope="module")
def made_heads(values):
    from caftune.pipeline.schema import Recipe

    text = {"heads": {**values["heads"], "text": values["labels"]["prompts"]}}
    labels = {"labels": {"columns": {"prompt": "name", "completion": "smiles"}}}
    return pretrain_heads(Recipe.model_validate({**values, **text, **labels}))


class NaNAt(TrainerCallback):
    """A gradient without a number at one step: what an overflow leaves."""

    def __init__(self, step, part=""):
        self.step, self.part = step, part

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if state.global_step + 1 == self.step:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None and self.part in name:
                    parameter.grad.fill_(float("nan"))


@pytest.fixture
def broken_at(monkeypatch):
    """Every trainer gets a gradient without a number at the step given."""

    def at(step, part=""):
        init = CAFTTrainer.__init__

        def wrapped(self, *args, **kwargs):
            init(self, *args, **kwargs)
            self.add_callback(NaNAt(step, part))

        monkeypatch.setattr(CAFTTrainer, "__init__", wrapped)

    return at


KINDS = {
    "plain": {"loss": {"weight": 0}},
    "heads": {"heads": {"train": False}},
    "heads trained along": {},
    "lora": {"model": {"tuning": "lora"}},
    "plain lora": {"model": {"tuning": "lora"}, "loss": {"weight": 0}},
    "adapter alone": {"model": {"tuning": "lora", "lora": {"merge": False}}},
}


def run_of(values, made_heads, folder, kind="plain", **trainer):
    sections = {name: dict(part) for name, part in KINDS[kind].items()}
    heads = {"path": str(made_heads), **sections.pop("heads", {})}
    options = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "logging_steps": 4, **trainer}
    return recipe_with({**values, "output": str(folder)}, heads=heads, trainer=options, **sections)


@pytest.mark.parametrize("kind", KINDS)
def test_stage_two_stops_and_exports_nothing(values, made_heads, tmp_path, broken_at, kind):
    broken_at(3)
    with pytest.raises(
        DivergedError, match="diverged.* got NaN or inf from step 4 on, of 4 .*and remove .*train"
    ) as error:
        finetune_model(run_of(values, made_heads, tmp_path, kind))
    assert error.value.step == 4
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "results.jsonl").exists()
    assert (tmp_path / "train" / "checkpoint-2").is_dir()
    assert not (tmp_path / "train" / "checkpoint-4").exists()
    export_checkpoint(run_of(values, made_heads, tmp_path, kind))
    (file,) = (tmp_path / "model").glob("*.safetensors")
    assert not not_finite(load_file(file))


def test_a_last_step_with_a_finite_loss_can_break_the_weights(values, made_heads, tmp_path, broken_at):
    broken_at(4)
    with pytest.raises(
        DivergedError, match=r"in the weights after step 4, of 4 \(model.embed_tokens.weight and \d+ more"
    ):
        finetune_model(run_of(values, made_heads, tmp_path))
    assert not (tmp_path / "model").exists()


def test_weights_that_break_in_the_heads_alone_are_seen(values, made_heads, tmp_path, broken_at):
    broken_at(4, "auxiliary_heads")
    with pytest.raises(DivergedError, match=r"\(auxiliary_heads.*and \d+ more\)"):
        finetune_model(run_of(values, made_heads, tmp_path, "heads trained along"))


def test_stage_one_stops_and_keeps_the_heads_of_before(values, made_heads, tmp_path, broken_at):
    broken_at(2)
    recipe = recipe_with(
        {**values, "output": str(tmp_path)},
        heads={"text": values["labels"]["prompts"]},
        labels={"columns": {"prompt": "name", "completion": "smiles"}},
    )
    with pytest.raises(DivergedError, match="in the weights after step 2, of 4 .auxiliary_heads"):
        pretrain_heads(recipe)
    assert not (tmp_path / "heads").exists()


def test_the_adaptation_of_heads_stops(values, made_heads, tmp_path, broken_at):
    broken_at(1)
    recipe = run_of(values, made_heads, tmp_path, "heads").model_copy(update={"adapt": {**FAST, "max_steps": 3}})
    with pytest.raises(DivergedError, match="from step 2 on, of 3 .auxiliary_heads.*remove .*adapt"):
        finetune_model(recipe)
    assert not (tmp_path / "adapt" / "heads").exists()


def test_the_command_line_says_one_sentence_and_fails(values, made_heads, tmp_path):
    recipe = run_of(values, made_heads, tmp_path / "run", learning_rate=1e30, logging_steps=1, max_grad_norm=0.0)
    save_recipe(tmp_path / "recipe.yaml", recipe.model_dump())
    ran = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml")])
    assert ran.exit_code != 0
    assert "The training diverged: losses and weights must be finite numbers" in " ".join(ran.output.split())
    assert "loss 0.000" not in ran.output


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_base_that_is_broken_already_is_refused_before_the_first_step(values, made_heads, tmp_path, scale):
    shutil.copytree(BASE, tmp_path / "base")
    weights = load_file(BASE / "model.safetensors")
    weights["model.norm.weight"] *= scale
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    recipe = run_of({**values, "model": {"name": str(tmp_path / "base")}}, made_heads, tmp_path / "run")
    recipe = recipe.model_copy(update={"heads": recipe.heads.model_copy(update={"path": None})})
    with pytest.raises(
        CaftuneError, match=r"begins with must hold finite numbers, got NaN or inf in model.norm.weight\."
    ):
        finetune_model(recipe)
    with pytest.raises(
        CaftuneError, match="model.name .* must hold finite numbers, got NaN or inf in model.norm.weight"
    ):
        load_model(recipe)


def test_export_refuses_a_checkpoint_that_is_no_number(values, made_heads, tmp_path):
    recipe = run_of(values, made_heads, tmp_path)
    finetune_model(recipe)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    file = tmp_path / "train" / "checkpoint-4" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(
        CaftuneError, match="finite numbers, got NaN or inf in model.layers.0.mlp.up_proj.weight. Nothing"
    ):
        export_checkpoint(recipe)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_export_refuses_an_adapter_that_is_no_number(values, made_heads, tmp_path):
    recipe = run_of(values, made_heads, tmp_path, "adapter alone")
    finetune_model(recipe)
    file = tmp_path / "train" / "checkpoint-4" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    weights[name].fill_(float("nan"))
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CaftuneError, match="checkpoint-4 must hold finite numbers, got NaN or inf in base_model"):
        export_checkpoint(recipe)


def test_weights_too_large_for_the_dtype_of_the_base_are_refused(tmp_path):
    model = build("llama", dtype=torch.float16)
    model.save_pretrained(tmp_path / "base")
    model = model.float()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5  # float16 ends at 65504
    with pytest.raises(CaftuneError, match="got NaN or inf in lm_head.weight. Nothing was written"):
        export_model(model, tmp_path / "model", base_name=str(tmp_path / "base"))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("pretrain_heads", [False, True])
def test_from_python_a_diverged_training_goes_on_and_is_not_exported(rows, heads, tmp_path, pretrain_heads):
    options = {"pretrain_heads": True} if pretrain_heads else {"heads": heads}
    trainer = CAFTTrainer(str(BASE), config(tmp_path / "run", **options), train_dataset=rows, callbacks=[NaNAt(2)])
    trainer.train()
    assert trainer.state.global_step == 4
    with pytest.raises(CaftuneError, match="The weights to export must hold finite numbers, got NaN"):
        trainer.export(tmp_path / "model")
    assert not (tmp_path / "model").exists()


class NoLossAt:
    """In the place of a trainer's losses: no number at these steps, as if the scaling of float16 had skipped them."""

    def __init__(self, *steps):
        self.watch, self.steps = LossWatch(), steps

    def add(self, loss, step):
        self.watch.add(loss * float("nan") if step in self.steps else loss, step)

    @property
    def since(self):
        return self.watch.since


def trained_without_losses(rows, tmp_path, *steps, **options):
    args = config(tmp_path, aux_weight=0.0, save_strategy="no", **options)
    trainer = CAFTTrainer(str(BASE), args, train_dataset=rows)
    trainer.loss_watch = NoLossAt(*steps)
    trainer.add_callback(StopOnDivergence(trainer))
    trainer.train()
    return trainer


def test_a_skipped_step_is_no_divergence(rows, tmp_path, capsys):
    assert trained_without_losses(rows, tmp_path, 2).state.global_step == 4
    assert capsys.readouterr().err.count("Step 2 has no finite loss. The weights are finite") == 1


def test_losses_that_never_come_back_are_a_divergence_though_no_step_is_taken(rows, tmp_path):
    with pytest.raises(DivergedError, match="from step 1 on, of 4") as error:
        trained_without_losses(rows, tmp_path, 1, 2, 3, 4, logging_steps=4)
    assert error.value.step == 1
    with pytest.raises(DivergedError, match="from step 3 on, of 30"):
        trained_without_losses(rows, tmp_path, *range(3, 31), max_steps=30)


def test_the_first_step_without_a_finite_loss_is_remembered():
    watch, found = LossWatch(), []
    one, nan, inf = (torch.tensor(value) for value in (1.0, float("nan"), float("inf")))
    for step, losses in enumerate([(one,), (one, inf, one), (nan, one), (one, one), (-inf, -inf), (one, nan)], start=1):
        for loss in losses:
            watch.add(loss, step)
        found.append(watch.since)
    assert found == [0, 2, 2, 0, 5, 5]


def test_tensors_that_are_not_finite_are_named_and_others_are_not():
    half = torch.ones(3, dtype=torch.float16) * 6e4
    fine = {
        "large": half,
        "max": torch.tensor(torch.finfo(torch.float32).max),
        "none": torch.empty(0),
        "int": torch.ones(2).int(),
    }
    assert (
        not_finite({**fine, "packed": torch.ones(2, dtype=torch.float8_e4m3fn), "meta": torch.ones(1, device="meta")})
        == []
    )
    odd = {
        "a": half * 2,
        "b": torch.tensor([0.0, float("nan")], dtype=torch.bfloat16),
        "c": torch.tensor(float("-inf")),
    }
    assert not_finite({**fine, **odd}) == ["a", "b", "c"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_logits_are_no_numbers_is_not_asked(temperature):
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.model.norm.register_forward_hook(lambda _module, _args, output: output * float("nan"))
    settings = Sampling(4, temperature).generation_config([1], 2)
    with pytest.raises(CaftuneError, match="The logits of .* must be numbers, got NaN"):
        list(answer_in_batches(model, [[3, 4], [5]], settings, batch_size=2))


def test_logits_that_break_later_in_an_answer_are_seen():
    model = AutoModelForCausalLM.from_pretrained(BASE)
    calls = []

    def late(_module, _args, output):
        calls.append(1)
        return output * float("nan") if len(calls) == 3 else output

    model.model.norm.register_forward_hook(late)
    with pytest.raises(CaftuneError, match="must be numbers, got NaN"):
        list(answer_in_batches(model, [[3, 4]], Sampling(4, 0.0).generation_config([], 2), batch_size=2))


def test_eval_says_that_a_model_is_broken(values, made_heads, tmp_path):
    recipe = run_of(values, made_heads, tmp_path)
    model = Path(finetune_model(recipe))
    weights = load_file(model / "model.safetensors")
    save_file(
        {**weights, "model.norm.weight": weights["model.norm.weight"] * float("nan")},
        model / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        CaftuneError, match=f"The model in {model} must hold finite numbers, got NaN or inf in model.norm"
    ):
        load_model(recipe, str(model))


def test_heads_that_are_kept_are_numbers(values, made_heads, tmp_path):
    recipe = run_of(values, made_heads, tmp_path, "heads trained along")
    kept = recipe.model_copy(update={"heads": recipe.heads.model_copy(update={"keep": True})})
    finetune_model(kept)
    file = tmp_path / "train" / "checkpoint-4" / "heads" / "heads.safetensors"
    save_file({k: v * float("nan") for k, v in read_heads(file.parent).items()}, file)
    description = json.loads((file.parent / "heads.json").read_text())
    from caftune.files import file_sha256

    (file.parent / "heads.json").write_text(json.dumps({**description, "weights_sha256": file_sha256(file)}))
    with pytest.raises(CaftuneError, match="The heads to keep must hold finite numbers"):
        export_checkpoint(kept)
