"""Training on a share of the targets, and leaving out heads that weigh too little."""

import pytest
import torch
from bases import HEADS, load_base, write_heads
from datasets import Dataset
from opened import stage_two_config
from trainers import config, same, trained, weights
from transformers import AutoTokenizer

from caftune import CAFTTrainer
from caftune.demo.chemistry import completion, molecules, prompt
from caftune.demo.run import BASE
from caftune.pipeline.schema import Recipe

ROWS = [{"prompt": prompt(m), "completion": completion(m)} for m in molecules(24, seed=7, substituents=(0, 2))]


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    return write_heads("llama", tmp_path_factory.mktemp("heads"))


def trainer(folder, heads, **options):
    args = config(folder, heads=heads, **{"aux_weight": 1.0, **options})
    rows, tokenizer = Dataset.from_list(ROWS), AutoTokenizer.from_pretrained(BASE)
    return CAFTTrainer(load_base("llama"), args, train_dataset=rows, processing_class=tokenizer)


def losses(run):
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    return [{name: value for name, value in log.items() if name.startswith("h") and "loss" in name} for log in logs]


def test_a_share_trains_otherwise_than_all_targets_but_the_same_every_time(tmp_path, heads):
    state = torch.get_rng_state()
    runs = [trained(trainer(tmp_path / name, heads, aux_target_share=0.25)) for name in ("one", "two")]
    torch.set_rng_state(state)
    whole = trained(trainer(tmp_path / "whole", heads))
    assert losses(runs[0]) == losses(runs[1])
    assert same(weights(runs[0]), weights(runs[1]))
    assert not same(weights(runs[0]), weights(whole))
    first, exact = losses(runs[0])[0], losses(whole)[0]
    assert first["h1_loss"] == exact["h1_loss"]
    assert all(first[f"h{h}_loss"] == pytest.approx(exact[f"h{h}_loss"], rel=0.5) for h in range(2, HEADS + 2))


def test_micro_batches_and_steps_draw_other_rows(tmp_path, heads):
    run = trainer(tmp_path, heads, aux_target_share=0.25, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    drawn, scoring = [], run._scoring

    def keep(*arguments):
        drawn.append(scoring(*arguments))
        return drawn[-1]

    run._scoring = keep
    run.train()
    seeds = [call["auxiliary_sample"].seed for call in drawn]
    assert seeds == [(42, step, micro, 0) for step in range(4) for micro in range(2)]


def test_a_resumed_run_draws_what_an_uninterrupted_one_does(tmp_path, heads):
    options = {"aux_target_share": 0.25, "save_strategy": "steps", "save_steps": 2}
    whole = trained(trainer(tmp_path / "whole", heads, **options))
    resumed = trainer(tmp_path / "resumed", heads, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(weights(whole), weights(resumed))
    assert losses(whole) == losses(resumed)


def test_stage_one_trains_on_a_share_too_and_evaluates_on_all(tmp_path):
    options = {"pretrain_heads": True, "num_heads": 2, "aux_weight": None}
    shares = (0.25, 1.0)
    runs = [trainer(tmp_path / str(share), None, **{**options, "aux_target_share": share}) for share in shares]
    evaluated = [
        run.evaluate(Dataset.from_list([{"input_ids": [1, 5, 9, 8, 7], "labels": [1, 5, 9, 8, 7]}])) for run in runs
    ]
    assert evaluated[0]["eval_loss"] == evaluated[1]["eval_loss"]
    heads_of = [trained(run).heads.state_dict() for run in runs]
    assert not same(*heads_of)


def test_heads_are_left_out_once_their_weight_is_below_the_bound(tmp_path, heads):
    # constant gamma: weights 0.8, 0.64, 0.512
    whole = trained(trainer(tmp_path / "whole", heads, aux_schedule="constant", train_heads=False))
    bounded = trainer(tmp_path / "bounded", heads, aux_schedule="constant", aux_min_weight=0.6, train_heads=False)
    calls = []
    bounded.heads.heads[2].register_forward_hook(lambda *_: calls.append(1))
    bounded.train()
    assert not calls
    assert not same(weights(bounded), weights(whole))
    assert set(losses(whole)[0]) == {"h1_loss", "h2_loss", "h3_loss", "h4_loss"}
    assert [set(log) for log in losses(bounded)] == [{"h1_loss", "h2_loss", "h3_loss"}] * 4
    assert losses(bounded)[0]["h3_loss"] == losses(whole)[0]["h3_loss"]


def test_below_the_bound_altogether_a_run_is_plain_fine_tuning(tmp_path, heads):
    plain = trained(trainer(tmp_path / "plain", None, aux_weight=0.0))
    bounded = trained(trainer(tmp_path / "bounded", heads, aux_min_weight=2.0, train_heads=False))
    assert same(weights(plain), weights(bounded))
    assert losses(bounded) == [{}] * 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"aux_target_share": 0.0}, r"aux_target_share must be in \(0, 1\], got 0.0"),
        ({"aux_target_share": 2.0}, r"aux_target_share must be in \(0, 1\], got 2.0"),
        ({"aux_min_weight": -1.0}, "aux_min_weight must be a number >= 0, got -1.0"),
        ({"aux_min_weight": 0.1}, r"aux_min_weight must be 0 where heads are trained.*train_heads=False"),
        ({"aux_min_weight": 0.1, "pretrain_heads": True}, "aux_min_weight must be 0 where heads are trained"),
    ],
)
def test_bad_options_are_refused_with_a_sentence(options, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        config(tmp_path, heads="somewhere", **options)


def test_the_recipe_sets_both(tmp_path, heads):
    recipe = Recipe(
        output=str(tmp_path),
        model={"name": str(BASE)},
        heads={"path": heads, "train": False},
        loss={"target_share": 0.25, "min_weight": 0.002},
    )
    found = stage_two_config(recipe, tmp_path)
    assert (found.aux_target_share, found.aux_min_weight) == (0.25, 0.002)
