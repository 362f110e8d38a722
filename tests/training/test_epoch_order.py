"""Rows in batches of similar length: a resumed run trains each row once; and heads leave the model's random numbers alone."""

import pytest
import torch
from peft import LoraConfig
from trainers import config, numbers, same, stock, trained, weights
from transformers import GPT2Config

from caftune import CAFTTrainer
from caftune.demo.run import BASE

BY_LENGTH = {"train_sampling_strategy": "group_by_length", "lr_scheduler_type": "constant"}
BY_LENGTH |= {"max_steps": -1, "num_train_epochs": 3}
# Ten steps an epoch, of forty rows. Stops are in the first, second and third epoch, and at the end of one.
STOPS = [3, 10, 14, 25]


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    """A stage 1 of three epochs, with a checkpoint where it might have stopped."""
    folder = tmp_path_factory.mktemp("whole")
    args = config(folder, pretrain_heads=True, num_heads=1, save_strategy="steps", save_steps=1, **BY_LENGTH)
    return folder, trained(CAFTTrainer(str(BASE), args, train_dataset=rows))


@pytest.mark.parametrize("stop", STOPS)
def test_a_run_that_resumes_within_an_epoch_trains_the_rows_that_are_left_of_it(stop, whole, rows, tmp_path):
    folder, alone = whole
    trainer = CAFTTrainer(
        str(BASE), config(tmp_path, pretrain_heads=True, num_heads=1, **BY_LENGTH), train_dataset=rows
    )
    torch.rand(7)  # another random state than the stopped process had
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
    assert numbers(trainer) == numbers(alone)
    assert same(trainer.heads.state_dict(), alone.heads.state_dict())


def test_it_resumes_twice_within_the_same_epoch(whole, rows, tmp_path):
    folder, alone = whole
    args = config(
        tmp_path, pretrain_heads=True, num_heads=1, save_strategy="steps", save_steps=1, save_total_limit=3, **BY_LENGTH
    )
    args.max_steps = 17
    stopped = CAFTTrainer(str(BASE), args, train_dataset=rows)
    stopped.train(resume_from_checkpoint=str(folder / "checkpoint-14"))
    again = CAFTTrainer(
        str(BASE), config(tmp_path / "on", pretrain_heads=True, num_heads=1, **BY_LENGTH), train_dataset=rows
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    assert [loss for loss, _ in numbers(again)][17:19] == [loss for loss, _ in numbers(alone)][17:19]


def test_accelerate_can_give_the_sampler_random_numbers_that_processes_share(rows, tmp_path):
    trainer = CAFTTrainer(str(BASE), config(tmp_path, aux_weight=0.0, **BY_LENGTH), train_dataset=rows)
    sampler = trainer._get_train_sampler()
    orders = []
    for _ in range(2):
        sampler.generator = torch.Generator().manual_seed(4)
        orders.append(list(sampler))
    assert orders[0] == orders[1] != list(sampler)


def test_a_run_that_does_not_resume_has_the_order_of_sft_trainer(rows, tmp_path):
    ours = trained(CAFTTrainer(str(BASE), config(tmp_path / "ours", aux_weight=0.0, **BY_LENGTH), train_dataset=rows))
    theirs = stock(tmp_path / "theirs", rows, **BY_LENGTH)
    assert numbers(ours) == numbers(theirs)
    assert same(weights(ours), weights(theirs))


@pytest.mark.parametrize("options", [{}, {"train_heads": False}, {"aux_target_share": 0.5}])
def test_dropout_of_the_heads_leaves_that_of_the_model_as_it_is_without_heads(options, rows, heads, tmp_path):
    """So arms that differ in their heads have the same masks, and the same order of rows by length."""
    states = []
    for own in ({"aux_weight": 0.0}, {"heads": heads, **options}):
        adapter = LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear")
        args = config(tmp_path / str(len(states)), **own)
        trained(CAFTTrainer(str(BASE), args, train_dataset=rows, peft_config=adapter))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_dropout_in_the_copied_layer_leaves_it_too(tmp_path):
    from transformers import GPT2LMHeadModel

    from caftune.core.attach import attach_heads
    from caftune.core.backbone import Backbone
    from caftune.core.heads import AuxiliaryHeads, HeadsConfig

    shape = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.5}
    model = GPT2LMHeadModel(GPT2Config(**shape, attn_pdrop=0.5)).eval()
    backbone = Backbone.of(model)
    attach_heads(backbone, AuxiliaryHeads.build(backbone, HeadsConfig(2)))
    ids = torch.randint(0, 40, (2, 12))
    states = []
    for given in ({}, {"auxiliary": "add"}, {"auxiliary": "add", "auxiliary_weights": torch.ones(2)}):
        torch.manual_seed(3)
        model.train()(input_ids=ids, labels=ids, **given)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])
