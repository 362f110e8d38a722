"""CAFTTrainer against the stock SFTTrainer, and what it may and may not change."""

import copy
from pathlib import Path

import models
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from trainers import OPTIONS, config, lora, numbers, same, stock, trained, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Trainer
from trl import SFTConfig, SFTTrainer

from caftune import AuxiliaryHeads, Backbone, CAFTConfig, CAFTTrainer, HeadsConfig, save_heads
from caftune.compare.summary import main_loss
from caftune.demo.run import BASE
from caftune.pipeline.stage_trainer import evaluated
from caftune.training.prepare import prepare


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.filterwarnings("ignore:.*flash:UserWarning")
def test_beta_zero_is_the_stock_trainer_step_for_step(rows, heads, tmp_path, tuning, packing):
    peft_config = lora() if tuning == "lora" else None
    options = {"packing": packing, "gradient_accumulation_steps": 2}
    theirs = stock(tmp_path / "a", rows, peft_config, **options)
    args = config(tmp_path / "b", heads=heads, aux_weight=0.0, **options)
    ours = trained(CAFTTrainer(str(BASE), args, train_dataset=rows, peft_config=peft_config))
    assert numbers(ours) == numbers(theirs)
    assert same(weights(ours), weights(theirs))


def test_auxiliary_losses_change_the_steps(rows, heads, tmp_path):
    theirs = stock(tmp_path / "a", rows)
    ours = trained(CAFTTrainer(str(BASE), config(tmp_path / "b", heads=heads), train_dataset=rows))
    assert not same(weights(ours), weights(theirs))


def test_total_loss_is_main_plus_weighted_horizons(rows, heads, tmp_path):
    trainer = trained(CAFTTrainer(str(BASE), config(tmp_path, heads=heads, aux_weight=0.3), train_dataset=rows))
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in entries:
        auxiliary = sum(entry[f"h{h}_weight"] * entry[f"h{h}_loss"] for h in (2, 3, 4))
        assert entry["loss"] == pytest.approx(entry["h1_loss"] + auxiliary, rel=1e-5)  # float32 sums
    assert [entry["h2_weight"] for entry in entries] == pytest.approx(
        [0.3 * 0.8 * torch.sin(torch.tensor((4 - t) / 4 * torch.pi / 2)).item() for t in range(4)]
    )


# Heads are scored in the last step alone.
SCORED_LAST = {"aux_weight": 1.0, "aux_schedule": "linear", "aux_min_weight": 0.5, "train_heads": False}


@pytest.mark.parametrize(("family", "heads_of"), [("llama", {}), ("gpt2", {}), ("mixtral", {}), ("llama", SCORED_LAST)])
def test_the_main_loss_is_what_fine_tuning_without_heads_logs_as_its_loss(rows, tmp_path, family, heads_of):
    """Text of many lengths, steps of four batches and one of two, lines of one step and of two; a router's loss."""
    model = models.build(family, dtype=torch.float32, spread=3.0, vocab_size=158, max_position_embeddings=128)
    tokenizer, backbone = AutoTokenizer.from_pretrained(BASE), Backbone.of(model)
    save_heads(tmp_path / "heads", AuxiliaryHeads.build(backbone, HeadsConfig(2)), backbone, tokenizer)
    texts = Dataset.from_list([{"text": row["prompt"] + row["completion"]} for row in rows.select(range(28))])
    options = {**OPTIONS, "max_steps": 4, "logging_steps": 2, "logging_first_step": True, "learning_rate": 0.0}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}

    def logged(trainer, arguments):
        made = trainer(copy.deepcopy(model), arguments, train_dataset=texts, processing_class=tokenizer)
        return [entry for entry in trained(made).state.log_history if "loss" in entry]

    theirs = [entry["loss"] for entry in logged(SFTTrainer, SFTConfig(str(tmp_path / "a"), **options))]
    ours = logged(CAFTTrainer, CAFTConfig(str(tmp_path / "b"), heads=str(tmp_path / "heads"), **options, **heads_of))
    assert len(theirs) == 3
    assert [main_loss(entry) for entry in ours] == pytest.approx(theirs, rel=1e-6)
    assert ours[-1]["main_loss"] != pytest.approx(ours[-1]["h1_loss"], rel=1e-4)


def test_nothing_global_changes_and_stock_trainers_are_unaffected(rows, heads, tmp_path):
    watched = [Trainer, SFTTrainer, LlamaForCausalLM, LoraConfig, torch.nn.Module]
    before = [dict(vars(owner)) for owner in watched]
    first = stock(tmp_path / "a", rows)
    trained(CAFTTrainer(str(BASE), config(tmp_path / "b", heads=heads), train_dataset=rows))
    trained(CAFTTrainer(str(BASE), config(tmp_path / "c", heads=heads), train_dataset=rows, peft_config=lora()))
    second = stock(tmp_path / "d", rows)
    assert [dict(vars(owner)) for owner in watched] == before
    assert numbers(first) == numbers(second)
    assert same(weights(first), weights(second))


def test_a_plain_trainer_is_unaffected_by_a_caft_run(rows, heads, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = [tokenizer(row["prompt"] + row["completion"])["input_ids"][:20] for row in rows]
    data = Dataset.from_list([{"input_ids": i, "labels": i} for i in ids if len(i) == 20])

    def run(folder):
        from transformers import TrainingArguments

        names = ("max_length", "gradient_checkpointing")
        options = {key: value for key, value in OPTIONS.items() if key not in names}
        model = AutoModelForCausalLM.from_pretrained(BASE)
        return trained(Trainer(model, TrainingArguments(str(folder), **options), train_dataset=data))

    first = run(tmp_path / "a")
    trained(CAFTTrainer(str(BASE), config(tmp_path / "b", heads=heads), train_dataset=rows))
    second = run(tmp_path / "c")
    assert numbers(first) == numbers(second)
    assert same(weights(first), weights(second))


@pytest.mark.parametrize("options", [{}, {"train_heads": False}, {"heads_lora_rank": 0}, {"heads_lora_rank": 3}])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_heads_are_trained_as_the_model_is_unless_options_differ(rows, heads, tmp_path, options, tuning):
    peft_config = lora() if tuning == "lora" else None
    trainer = CAFTTrainer(
        str(BASE), config(tmp_path, heads=heads, **options), train_dataset=rows, peft_config=peft_config
    )
    start = {k: v.clone() for k, v in trainer.heads.state_dict().items()}
    trainer.train()
    moved = {key for key, value in trainer.heads.state_dict().items() if not torch.equal(value, start[key])}
    rank = options.get("heads_lora_rank", peft_config.r if peft_config else 0)
    if not options.get("train_heads", True):
        assert not moved
    elif rank == 0:
        assert moved == set(start)
    else:
        assert moved == {key for key in start if "lora_" in key}
        assert {value.shape[0] for key, value in start.items() if "lora_A" in key} == {rank}
    factors = {key for key in start if "lora_" in key}
    assert bool(factors) == (rank > 0 and options.get("train_heads", True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_gets_gradients_from_the_heads(rows, heads, tmp_path, checkpointing):
    options = {"train_heads": False, "gradient_checkpointing": checkpointing, "aux_weight": 1.0, "max_steps": 1}
    args = config(tmp_path, heads=heads, **options)
    trainer = CAFTTrainer(str(BASE), args, train_dataset=rows, peft_config=lora())
    batch = next(iter(trainer.get_train_dataloader()))
    scores = trainer.model(**batch, auxiliary="add", fused_lm_head=True)["auxiliary"]
    scores["nll"].sum().backward()
    reached = {n for n, p in trainer.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("layers.0" in name and "lora_B" in name for name in reached)
    assert not any("auxiliary_heads" in name for name in reached)
    assert not any("lora" in name for name, _ in trainer.heads.named_parameters())


@pytest.mark.parametrize("stage", [1, 2])
def test_resume_equals_the_uninterrupted_run(rows, heads, tmp_path, stage):
    options = {"pretrain_heads": True} if stage == 1 else {"heads": heads}
    options |= {"save_strategy": "steps", "save_steps": 2, "aux_schedule": "reflected_sine"}
    whole = trained(CAFTTrainer(str(BASE), config(tmp_path / "a", **options), train_dataset=rows))
    again = CAFTTrainer(str(BASE), config(tmp_path / "b", **options), train_dataset=rows)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert numbers(again)[-2:] == numbers(whole)[-2:]
    assert same(again.model.state_dict(), whole.model.state_dict())


def test_evaluation_and_best_checkpoint_go_by_the_main_loss(rows, heads, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    args = config(tmp_path / "a", heads=heads, aux_weight=1.0, load_best_model_at_end=True, **options)
    trainer = trained(CAFTTrainer(str(BASE), args, train_dataset=rows, eval_dataset=rows))
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == min(entry["eval_loss"] for entry in evaluations)
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    reference = SFTTrainer(best, SFTConfig(str(tmp_path / "b"), **OPTIONS), train_dataset=rows, eval_dataset=rows)
    assert reference.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)
    assert {"eval_h2_loss", "eval_h4_accuracy"} <= evaluations[0].keys()


def test_checkpoints_and_saved_models_hold_no_heads(rows, heads, tmp_path):
    args = config(tmp_path / "run", heads=heads, max_steps=1, save_strategy="steps", save_steps=1)
    trainer = trained(CAFTTrainer(str(BASE), args, train_dataset=rows))
    trainer.save_model(str(tmp_path / "saved"))
    base = load_file(BASE / "model.safetensors").keys()
    for folder in (tmp_path / "run" / "checkpoint-1", tmp_path / "saved"):
        assert load_file(folder / "model.safetensors").keys() == base


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_export_is_an_ordinary_model_with_the_trained_logits(rows, heads, tmp_path, tuning):
    peft_config = lora() if tuning == "lora" else None
    trainer = trained(
        CAFTTrainer(str(BASE), config(tmp_path, heads=heads), train_dataset=rows, peft_config=peft_config)
    )
    trainer.export(tmp_path / "model")
    exported, base = (load_file(Path(folder) / "model.safetensors") for folder in (tmp_path / "model", BASE))
    assert {k: (v.shape, v.dtype) for k, v in exported.items()} == {k: (v.shape, v.dtype) for k, v in base.items()}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer(rows[0]["prompt"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        theirs, ours = trainer.model.eval()(input_ids=ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if tuning == "full" else 1e-4)  # LoRA: W + BA is rounded
    assert model.generate(ids, max_new_tokens=4).shape[1] == ids.shape[1] + 4


def test_bfloat16_computes_on_float32_weights(rows, heads, tmp_path):
    trainer = trained(CAFTTrainer(str(BASE), config(tmp_path, heads=heads, bf16=True), train_dataset=rows))
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    plain = trained(CAFTTrainer(str(BASE), config(tmp_path, heads=heads), train_dataset=rows))
    for (ours, _), (exact, _) in zip(numbers(trainer), numbers(plain), strict=True):
        assert ours == pytest.approx(exact, rel=0.02)  # bfloat16 keeps 8 bits


def test_gradient_checkpointing_changes_nothing(rows, heads, tmp_path):
    runs = [
        trained(CAFTTrainer(str(BASE), config(tmp_path, heads=heads, gradient_checkpointing=on), train_dataset=rows))
        for on in (False, True)
    ]
    for plain, checkpointed in zip(*map(numbers, runs), strict=True):
        assert checkpointed == pytest.approx(plain, rel=1e-5)


def test_tokenized_rows_are_those_of_the_trainer(rows, tmp_path):
    args = config(tmp_path, aux_weight=0.0)
    theirs = SFTTrainer(str(BASE), SFTConfig(str(tmp_path), **OPTIONS), train_dataset=rows).train_dataset
    ours = prepare(rows, AutoTokenizer.from_pretrained(BASE), args, name="train").rows
    assert ours["input_ids"][:] == theirs["input_ids"][:]
    assert ours["labels"][:] == theirs["labels"][:]


def test_a_micro_batch_without_targets_adds_zero(rows, heads, tmp_path):
    trainer = CAFTTrainer(str(BASE), config(tmp_path, heads=heads, max_steps=1), train_dataset=rows)
    trainer.create_optimizer_and_scheduler(1)
    trainer.state.max_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))
    del batch["auxiliary_targets"]  # computed from the labels before
    batch["labels"] = torch.full_like(batch["labels"], -100)
    trainer._horizon_counts = torch.zeros(3, dtype=torch.long)
    loss = trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for n, p in trainer.model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("change", ["masked", "masked in place", "cut"])
def test_a_subclass_that_changes_a_batch_changes_its_targets(rows, heads, tmp_path, change):
    def changed(inputs):
        if change == "cut":
            return {n: v[:, :-5] if isinstance(v, torch.Tensor) and v.ndim == 2 else v for n, v in inputs.items()}
        labels = inputs["labels"] if change == "masked in place" else inputs["labels"].clone()
        labels[:, ::3] = -100
        return {**inputs, "labels": labels}

    class Changed(CAFTTrainer):
        def training_step(self, model, inputs, *rest):
            return super().training_step(model, changed(inputs), *rest)

    class Recomputed(CAFTTrainer):
        def training_step(self, model, inputs, *rest):
            given = {name: value for name, value in inputs.items() if name != "auxiliary_targets"}
            return super().training_step(model, changed(given), *rest)

    args = {"heads": heads, "aux_weight": 1.0, "gradient_accumulation_steps": 2}
    found, expected = (
        trained(kind(str(BASE), config(tmp_path / kind.__name__, **args), train_dataset=rows))
        for kind in (Changed, Recomputed)
    )
    assert numbers(found) == numbers(expected)
    assert same(weights(found), weights(expected))


def test_outputs_with_heads_survive_being_taken_apart(rows, heads, tmp_path):
    """As DDP does with find_unused_parameters, which Trainer sets where there is no gradient checkpointing."""
    from torch.utils._pytree import tree_flatten, tree_unflatten

    trainer = CAFTTrainer(str(BASE), config(tmp_path, heads=heads), train_dataset=rows)
    batch = next(iter(trainer.get_train_dataloader()))
    outputs = trainer.model(**batch, fused_lm_head=True, auxiliary="add")
    again = tree_unflatten(*tree_flatten(outputs))
    assert torch.equal(again["auxiliary"]["nll"], outputs["auxiliary"]["nll"])
    assert torch.equal(again.log_probs, outputs.log_probs)


def test_truncation_from_the_start_keeps_answers(tmp_path):
    long = Dataset.from_list([{"prompt": "Name: " + "methyl" * 40 + "\nSMILES:", "completion": " CCO"}] * 4)
    options = {"max_length": 32, "truncation_mode": "keep_end", "aux_weight": 0.0}
    trainer = CAFTTrainer(str(BASE), config(tmp_path, **options), train_dataset=long)
    assert len(trainer.train_dataset) == 4


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("length", [60, 128])
def test_rows_are_what_sft_trainer_makes_of_them_cut_or_whole(rows, length, shuffled, tmp_path):
    options = {**OPTIONS, "max_length": length, "shuffle_dataset": shuffled}
    theirs = SFTTrainer(str(BASE), SFTConfig(str(tmp_path), **options), train_dataset=rows).train_dataset
    args = CAFTConfig(str(tmp_path), aux_weight=0.0, **options)
    ours = CAFTTrainer(str(BASE), args, train_dataset=rows).train_dataset
    assert max(map(len, theirs["labels"])) == length if length == 60 else max(map(len, theirs["labels"])) < length
    for name in ("input_ids", "labels"):
        assert list(ours[name]) == list(theirs[name])


def test_adapters_with_biases_hold_none_of_the_heads(rows, tmp_path):
    from safetensors.torch import load_file as load
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=158, num_key_value_heads=1, **shape))
    args = config(tmp_path / "one", pretrain_heads=True, max_steps=1)
    stage1 = CAFTTrainer(copy.deepcopy(model), args, train_dataset=rows, processing_class=tokenizer)
    stage1.export(tmp_path / "heads")
    args = config(tmp_path / "two", heads=str(tmp_path / "heads"), max_steps=1)
    peft_config = LoraConfig(r=2, target_modules=["q_proj"], bias="all")
    trainer = CAFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config)
    trainer.save_model(str(tmp_path / "adapter"))
    names = load(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert any("bias" in name for name in names)
    assert not any("auxiliary_heads" in name for name in names)


def test_a_prediction_leaves_nothing_in_the_next_evaluation(rows, heads, tmp_path):
    trainer = CAFTTrainer(
        str(BASE), config(tmp_path, heads=heads), train_dataset=rows, eval_dataset=rows.select([0, 1])
    )
    alone = evaluated(trainer)
    trainer.predict(trainer.train_dataset)
    after = evaluated(trainer)
    assert all(after[name] == alone[name] for name in alone if name != "mean_token_accuracy")  # TRL's own


def test_a_training_that_starts_over_begins_with_empty_sums(rows, heads, tmp_path):
    logs = []
    for steps in (0, 3):
        trainer = CAFTTrainer(
            str(BASE), config(tmp_path, heads=heads, max_steps=2, logging_steps=2), train_dataset=rows
        )
        trainer._steps += steps  # of an attempt that ran out of memory
        trainer.train()
        logs.append(trainer.state.log_history[0]["main_loss"])
    assert logs[0] == logs[1]


def test_a_line_logged_behind_an_evaluation_is_still_of_the_training(rows, heads, tmp_path):
    options = {
        "logging_strategy": "epoch",
        "eval_strategy": "steps",
        "eval_steps": 5,
        "max_steps": -1,
        "num_train_epochs": 1,
    }
    args = config(tmp_path, heads=heads, per_device_train_batch_size=8, **options)
    trainer = CAFTTrainer(str(BASE), args, train_dataset=rows, eval_dataset=rows.select([0, 1]))
    trainer.train()
    (line,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {"main_loss", "h1_loss", "h2_loss", "h2_weight"} <= set(line)
    (seen,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert "eval_h1_loss" in seen
    assert seen["eval_h1_loss"] != line["h1_loss"]


def test_several_evaluation_sets_keep_their_names(rows, heads, tmp_path):
    sets = {"one": rows.select(range(8)), "two": rows.select(range(8, 16))}
    trainer = CAFTTrainer(str(BASE), config(tmp_path, heads=heads), train_dataset=rows, eval_dataset=sets)
    assert {"eval_one_h2_loss", "eval_two_h2_loss"} <= trainer.evaluate().keys()


def test_the_config_needs_no_precision_on_a_cpu(heads, tmp_path):
    assert CAFTConfig(str(tmp_path), heads=heads, use_cpu=True).bf16 is False


def test_beta_zero_leaves_the_random_numbers_of_dropout_alone(rows, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=158, n_embd=16, n_layer=2, n_head=2, n_positions=128))
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    args = config(tmp_path / "one", pretrain_heads=True, max_steps=1)
    stage1 = CAFTTrainer(copy.deepcopy(model), args, train_dataset=rows, processing_class=tokenizer)
    stage1.export(tmp_path / "heads")
    args = SFTConfig(str(tmp_path / "two"), **OPTIONS)
    theirs = trained(SFTTrainer(copy.deepcopy(model), args, train_dataset=rows, processing_class=tokenizer))
    args = config(tmp_path / "three", heads=str(tmp_path / "heads"), aux_weight=0.0)
    ours = trained(CAFTTrainer(copy.deepcopy(model), args, train_dataset=rows, processing_class=tokenizer))
    assert model.config.resid_pdrop > 0
    assert numbers(ours) == numbers(theirs)
