"""What a training cost is counted right, and on over a stop."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from trainers import BASE, config

from caftune import CAFTTrainer
from caftune.training.measured_cost import Costs, FlopCount


def trainer_of(folder, rows, heads=None, **options):
    weight = {"heads": heads, "aux_weight": 0.5} if heads else {"aux_weight": 0.0}
    args = config(folder, include_num_input_tokens_seen="non_padding", **{**weight, **options})
    return CAFTTrainer(str(BASE), args, train_dataset=rows)


def trained(trainer, **arguments):
    with Costs(trainer) as costs:
        trainer.train(**arguments)
    return costs.total()


def batches_of(trainer):
    """The micro-batches of a run, in its order."""
    seen = []
    real = trainer.compute_loss

    def kept(model, inputs, *args, **kwargs):
        seen.append({name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)})
        return real(model, inputs, *args, **kwargs)

    trainer.compute_loss = kept
    return seen


def test_tokens_are_those_read_without_padding(rows, tmp_path):
    trainer = trainer_of(tmp_path, rows)
    seen = batches_of(trainer)
    costs = trained(trainer)
    assert costs["tokens"] == sum(int(batch["attention_mask"].sum()) for batch in seen)
    assert any(not batch["attention_mask"].all() for batch in seen)


def test_flops_are_those_that_torch_counts_of_the_first_step(rows, tmp_path):
    """With attention written out, for which torch's own counter has formulas on a CPU."""
    trainer = trainer_of(tmp_path, rows, model_init_kwargs={"attn_implementation": "eager"})
    seen = batches_of(trainer)
    costs = trained(trainer)
    twin = trainer_of(tmp_path, rows, model_init_kwargs={"attn_implementation": "eager"})

    def in_place(_total, one, other, **_):  # TRL's loss has such products, for which torch has no formula
        return 2 * one[0] * one[1] * other[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        twin.compute_loss(twin.model, seen[0]).backward()
    first = int(seen[0]["attention_mask"].sum())
    assert costs["flops"] / costs["tokens"] * first == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_attention_kernels_of_the_cpu_are_counted(rows, tmp_path):
    costs = [
        trained(trainer_of(tmp_path / kind, rows, model_init_kwargs={"attn_implementation": kind}))["flops"]
        for kind in ("eager", "sdpa")
    ]
    # The fused kernel computes the scores once more in the backward pass.
    assert costs[0] < costs[1] < 1.05 * costs[0]


def test_causal_attention_counts_half():
    def counted(**how):
        query = torch.zeros(1, 2, 64, 8, requires_grad=True)
        with FlopCount() as counter:
            torch.nn.functional.scaled_dot_product_attention(query, query, query, **how).sum().backward()
        return counter.total

    whole = 2 * 2 * 64 * 64 * 8 * 2  # heads, rows, rows, size, twice: scores and values
    # The backward pass: scores once more, and the gradients of queries, keys, values and probabilities.
    assert counted(attn_mask=torch.ones(64, 64).bool().tril()) == whole + 5 * whole // 2
    assert counted(is_causal=True) == (whole + 5 * whole // 2) // 2


def test_heads_cost_flops(rows, heads, tmp_path):
    plain, caft = (trained(trainer_of(tmp_path / str(i), rows, found)) for i, found in enumerate((None, heads)))
    assert caft["tokens"] == plain["tokens"]
    assert 1.2 < caft["flops"] / plain["flops"] < 3


def test_a_resumed_run_goes_on_counting(rows, tmp_path):
    whole = trained(trainer_of(tmp_path / "whole", rows))
    options = {"save_strategy": "steps", "save_steps": 2}
    first = trained(trainer_of(tmp_path / "halves", rows, **options))
    checkpoint = tmp_path / "halves" / "checkpoint-2"
    resumed = trainer_of(tmp_path / "halves", rows, **options)
    second = trained(resumed, resume_from_checkpoint=str(checkpoint))
    assert first["tokens"] == second["tokens"] == whole["tokens"]
    kept = resumed.state.stateful_callbacks["caftune_costs"]
    assert kept["seconds"] == second["seconds"] > 0
    assert second["flops"] == whole["flops"]


def test_a_checkpoint_made_before_costs_were_counted_is_resumed(rows, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(tmp_path, rows, **options).train()
    costs = trained(trainer_of(tmp_path, rows, **options), resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert costs["seconds"] > 0


def test_a_first_step_that_fails_leaves_no_counter_behind(rows, tmp_path):
    trainer = trainer_of(tmp_path, rows)
    trainer.compute_loss = lambda *_, **__: (_ for _ in ()).throw(RuntimeError("stopped"))
    with pytest.raises(RuntimeError, match="stopped"):
        trained(trainer)
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_counting_changes_no_weight(rows, tmp_path):
    plain = trainer_of(tmp_path / "plain", rows)
    plain.train()
    counted = trainer_of(tmp_path / "counted", rows)
    trained(counted)
    for one, other in zip(plain.model.parameters(), counted.model.parameters(), strict=True):
        assert torch.equal(one, other)
