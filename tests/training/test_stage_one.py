"""Stage 1: the heads alone are trained, in float32, on a trunk that stays as it is."""

import copy
import json
from pathlib import Path

import pytest
import torch
from trainers import config, numbers, same, trained, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from caftune import Backbone, CAFTTrainer, load_heads
from caftune.demo.run import BASE


def test_stage_one_trains_the_heads_and_leaves_the_model(rows, tmp_path):
    args = config(tmp_path, pretrain_heads=True, max_steps=10, learning_rate=5e-3)
    trainer = CAFTTrainer(str(BASE), args, train_dataset=rows, eval_dataset=rows)
    model = copy.deepcopy(weights(trainer))
    start = {k: v.clone() for k, v in trainer.heads.state_dict().items()}
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert same(weights(trainer), model)
    assert all(not torch.equal(value, start[key]) for key, value in trainer.heads.state_dict().items())
    assert after["eval_loss"] < 0.8 * before["eval_loss"]


def test_stage_one_saves_only_heads(rows, tmp_path):
    args = config(tmp_path, pretrain_heads=True, max_steps=2, save_strategy="steps", save_steps=2)
    trained(CAFTTrainer(str(BASE), args, train_dataset=rows))
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"heads.safetensors", "heads.json"} <= files
    assert "model.safetensors" not in files


def test_heads_train_in_float32_beside_a_half_precision_trunk(rows, tmp_path):
    args = config(tmp_path, pretrain_heads=True, model_init_kwargs={"dtype": "bfloat16"})
    trainer = trained(CAFTTrainer(str(BASE), args, train_dataset=rows))
    assert {p.dtype for p in trainer.heads.parameters()} == {torch.float32}
    assert {p.dtype for n, p in trainer.model.named_parameters() if "auxiliary_heads" not in n} == {torch.bfloat16}
    exact = trained(CAFTTrainer(str(BASE), config(tmp_path, pretrain_heads=True), train_dataset=rows))
    for (ours, _), (full, _) in zip(numbers(trainer), numbers(exact), strict=True):
        assert ours == pytest.approx(full, rel=0.02)  # bfloat16 keeps 8 bits


def test_heads_load_for_another_trainer_and_describe_their_training(heads):

    backbone = Backbone.of(AutoModelForCausalLM.from_pretrained(BASE))
    assert load_heads(heads, backbone, AutoTokenizer.from_pretrained(BASE)).config.horizons == [2, 3, 4]
    training = json.loads(Path(heads, "heads.json").read_text())["training"]
    assert (training["stage"], training["steps"]) == (1, 4)


def test_stage_one_evaluation_does_not_depend_on_the_batch_size(rows, tmp_path):
    losses = []
    for size in (1, 8):
        args = config(tmp_path, pretrain_heads=True, per_device_eval_batch_size=size)
        losses.append(CAFTTrainer(str(BASE), args, train_dataset=rows, eval_dataset=rows).evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_stage_one_reads_the_trunk_without_dropout(rows, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=158, n_embd=16, n_layer=2, n_head=2, n_positions=128, resid_pdrop=0.5)
    )
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    args = config(tmp_path, pretrain_heads=True)
    trainer = CAFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    model.auxiliary_heads.eval()
    scores = [model(**batch, auxiliary="only")["auxiliary"]["nll"] for _ in range(2)]
    assert torch.equal(*scores)
    assert model.transformer.training


def test_accumulation_is_right_for_models_that_take_no_loss_arguments(rows, tmp_path):
    states = []
    for batch, accumulation in ((8, 1), (1, 8)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        args = config(tmp_path / str(batch), pretrain_heads=True, optim="sgd", **options)
        trainer = CAFTTrainer(str(BASE), args, train_dataset=rows)
        trainer.model_accepts_loss_kwargs = False  # as for Mamba and others: Trainer then divides the loss itself
        states.append({key: value.clone() for key, value in trained(trainer).heads.state_dict().items()})
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-6)  # float32, another order of sums


def test_soft_targets_bring_the_heads_nearer_to_what_the_model_says(rows, tmp_path):
    """Measured apart from the trainer: the divergence from the model's own distributions, on rows it was not trained on."""
    options = {"pretrain_heads": True, "max_steps": 12, "learning_rate": 5e-3, "soft_targets": True}
    trainer = CAFTTrainer(str(BASE), config(tmp_path, **options), train_dataset=rows.select(range(32)))
    held_out = CAFTTrainer(str(BASE), config(tmp_path, pretrain_heads=True), train_dataset=rows.select(range(32, 40)))
    batch = next(iter(held_out.get_train_dataloader()))

    def divergence():
        with torch.no_grad():
            scores = trainer.model.eval()(**batch, auxiliary="soft")["auxiliary"]
        return scores["nll"] / scores["count"]

    before = divergence()
    trainer.train()
    assert (divergence() < 0.7 * before).all()


def test_evaluation_is_by_the_tokens_whatever_the_targets(rows, tmp_path):
    found = []
    for soft in (False, True):
        args = config(tmp_path, pretrain_heads=True, soft_targets=soft)
        found.append(CAFTTrainer(str(BASE), args, train_dataset=rows, eval_dataset=rows).evaluate()["eval_loss"])
    assert found[0] == found[1]


def test_soft_targets_in_stage_two_are_refused(heads, tmp_path):
    with pytest.raises(ValueError, match="soft_targets must be False in stage 2"):
        config(tmp_path, heads=heads, soft_targets=True)


@pytest.mark.parametrize(
    ("options", "value"), [({"soft_targets": True, "soft_top_k": 0}, 0), ({"soft_top_k": 4}, 4)], ids=["zero", "alone"]
)
def test_a_soft_top_k_without_meaning_is_refused(options, value, tmp_path):
    sentence = f"soft_top_k must be at least 1, and needs soft_targets=True, got {value}"
    with pytest.raises(ValueError, match=sentence):
        config(tmp_path, pretrain_heads=True, **options)


def test_the_likeliest_tokens_alone_train_the_heads(rows, tmp_path):
    options = {"pretrain_heads": True, "max_steps": 12, "learning_rate": 5e-3, "soft_targets": True, "soft_top_k": 4}
    trainer = CAFTTrainer(str(BASE), config(tmp_path, **options), train_dataset=rows.select(range(32)))
    held_out = CAFTTrainer(str(BASE), config(tmp_path, pretrain_heads=True), train_dataset=rows.select(range(32, 40)))
    batch = next(iter(held_out.get_train_dataloader()))

    def divergence():
        with torch.no_grad():
            scores = trainer.model.eval()(**batch, auxiliary="soft", soft_top_k=4)["auxiliary"]
        return scores["nll"] / scores["count"]

    before = divergence()
    trainer.train()
    assert (divergence() < 0.7 * before).all()


def test_stage_one_keeps_as_many_likeliest_tokens_as_it_is_told(rows, tmp_path):
    losses = {}
    for kept in (None, 158, 1):  # the base has 158 tokens
        options = {"pretrain_heads": True, "soft_targets": True, "soft_top_k": kept, "max_steps": 1}
        trainer = trained(CAFTTrainer(str(BASE), config(tmp_path, **options), train_dataset=rows))
        losses[kept] = trainer.state.log_history[0]["h2_loss"]
    assert losses[158] == pytest.approx(losses[None], rel=1e-5)  # float32, another order of sums
    assert losses[1] != pytest.approx(losses[None], rel=1e-3)


def test_stage_one_predicts_and_evaluates_losses_alone(rows, tmp_path):
    args = config(tmp_path, pretrain_heads=True, max_steps=1)
    trainer = trained(CAFTTrainer(str(BASE), args, train_dataset=rows, eval_dataset=rows))
    expected = trainer.evaluate()["eval_loss"]
    found = trainer.predict(trainer.eval_dataset)
    assert (found.predictions, found.label_ids) == (None, None)
    # A prediction is the mean of its batches' means; an evaluation is over all tokens.
    assert found.metrics["test_loss"] == pytest.approx(expected, rel=0.05)
    assert trainer.evaluate()["eval_loss"] == expected
    loss, logits, labels = trainer.prediction_step(trainer.model, next(iter(trainer.get_eval_dataloader())), False)
    assert (logits, labels) == (None, None)
    assert torch.isfinite(loss)
