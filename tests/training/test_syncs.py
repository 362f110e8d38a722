"""The auxiliary losses make the host wait for the device at most twice a micro-batch, whatever the number of heads.

Counted on a CPU as the operations that would wait on a GPU: those whose result, or its size, depends on values.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trainers import config
from transformers import AutoModelForCausalLM

from caftune import AuxiliaryHeads, Backbone, CAFTTrainer, HeadsConfig, attach_heads
from caftune.demo.run import BASE

_aten = torch.ops.aten
_WAITING = {_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.equal, _aten.bincount, _aten._unique2}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_}


class Syncs(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        is_masked = packet in _INDEXING and any(x is not None and x.dtype is torch.bool for x in args[1])
        self.count += packet in _WAITING or is_masked
        return func(*args, **(kwargs or {}))


def syncs_of_step(trainer):
    trainer.create_optimizer_and_scheduler(4)
    trainer.state.max_steps = 4
    batches, num_items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    model = trainer.model.train()
    with Syncs() as syncs:
        trainer.compute_loss(model, batches[0], num_items_in_batch=num_items).backward()
    return syncs.count


def test_the_counter_sees_what_waits():
    mask = torch.tensor([True, False])
    with Syncs() as syncs:
        mask.nonzero(), mask[mask], mask.float().sum().item(), torch.zeros(2).masked_fill(mask, 1.0)
    assert syncs.count == 3


OPTIONS = [{}, {"aux_target_share": 0.5}, {"packing": True}, {"train_heads": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "sampled", "packed", "heads_frozen"])
@pytest.mark.filterwarnings("ignore:.*flash:UserWarning")
def test_stage_two_waits_at_most_twice_more_than_without_heads(rows, heads, tmp_path, options):
    shared = {"packing": options.get("packing", False)}
    without = CAFTTrainer(str(BASE), config(tmp_path, aux_weight=0.0, **shared), train_dataset=rows)
    trainer = CAFTTrainer(str(BASE), config(tmp_path, heads=heads, **options), train_dataset=rows)
    assert syncs_of_step(trainer) <= syncs_of_step(without) + 2


@pytest.mark.parametrize("soft", [{}, {"soft_targets": True}, {"soft_targets": True, "soft_top_k": 4}])
def test_stage_one_waits_as_often_with_many_heads_as_with_few(rows, tmp_path, soft):
    counts = [
        syncs_of_step(
            CAFTTrainer(str(BASE), config(tmp_path, pretrain_heads=True, num_heads=n, **soft), train_dataset=rows)
        )
        for n in (1, 6)
    ]
    assert counts[0] == counts[1] <= 2 + 1  # the trunk asks once whether its attention mask hides anything


def test_a_training_loop_without_the_trainer_waits_for_the_targets_only():
    model = AutoModelForCausalLM.from_pretrained(BASE)
    backbone = Backbone.of(model)
    attach_heads(backbone, AuxiliaryHeads.build(backbone, HeadsConfig(4)))
    batch = {"input_ids": torch.arange(1, 17).view(2, 8), "labels": torch.arange(1, 17).view(2, 8)}
    with Syncs() as without, torch.no_grad():
        model(**batch, use_cache=False)
    with Syncs() as syncs:
        model(**batch, auxiliary="only")
    assert syncs.count <= without.count + 2
