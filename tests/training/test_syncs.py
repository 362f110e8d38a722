"""The auxiliary losses make the host wait for the device at most once more a micro-batch, whatever the number of heads.

Counted on torch's meta device, which stands for a GPU: operations whose result, or its size, depends on values on the device;
copies from it; and copies to it that are not asked to be non-blocking. Steps that log are not counted.
"""

from contextlib import nullcontext
from itertools import islice

import pytest
import torch
from accelerate.utils import send_to_device
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from trainers import OPTIONS, config
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import SFTConfig, SFTTrainer

from caftune import AuxiliaryHeads, Backbone, CAFTTrainer, HeadsConfig, attach_heads
from caftune.core import _compat
from caftune.demo.run import BASE

META = torch.device("meta")
_aten = torch.ops.aten
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_}


class Syncs(TorchDispatchMode):
    """Counts waits. Values are made up: every number is 1, and half of the places are true."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        waited = self._waited(func.overloadpacket, args, kwargs) if isinstance(args[0], torch.Tensor) else None
        self.count += waited is not None
        return func(*args, **kwargs) if waited is None or waited is True else waited()

    def _waited(self, packet, args, kwargs):
        """None: nothing waits. True: it waits, and can be run. Else what returns something in place of its result."""
        given = args[0]
        if packet is _aten._to_copy and kwargs.get("device", given.device) != given.device:
            if given.device == META:
                return lambda: torch.ones(given.shape, dtype=kwargs.get("dtype") or given.dtype)
            return None if kwargs.get("non_blocking") else True
        if packet is _aten.copy_ and args[1].device != given.device:
            return lambda: given
        if given.device != META:
            return None
        half = given.numel() // 2
        if packet in _INDEXING and any(x is not None and x.dtype is torch.bool for x in args[1]):
            assert packet is _aten.index
            return lambda: given.new_empty(args[1][0].numel() // 2, *given.shape[args[1][0].dim() :])
        results = {
            _aten._local_scalar_dense: lambda: given.dtype is torch.bool or 1,
            _aten.equal: lambda: True,
            _aten.nonzero: lambda: given.new_empty(half, given.dim(), dtype=torch.long),
            _aten.masked_select: lambda: given.new_empty(half),
        }
        return results.get(packet)


def syncs_of_step(trainer, micro_batches=1):
    """The waits in an optimizer step, from the batch's way to the device to the clipping of gradients."""
    trainer.state.max_steps = 4
    batches = list(islice(trainer.get_train_dataloader(), micro_batches))
    model, trainer.current_gradient_accumulation_steps = trainer.model.to(META), micro_batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingArguments, "device", META)
        patch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # the meta device has no autocast
        patch.setattr(torch, "autocast", lambda *_, **_options: nullcontext())
        if isinstance(trainer, CAFTTrainer):
            trainer.reset_log_sums()
        with Syncs() as syncs:
            moved = (send_to_device(batch, META) for batch in batches)
            inputs, num_items = trainer.get_batch_samples(moved, micro_batches, META)
            for batch in inputs:
                trainer.training_step(model, batch, num_items)
            trainer._clip_grad_norm(model)
    return syncs.count


def test_the_counter_sees_what_waits():
    mask, values = torch.ones(4, dtype=torch.bool, device=META), torch.ones(4, device=META)
    with Syncs() as syncs:
        mask.nonzero(), values[mask], values.sum().item(), values.cpu(), torch.ones(2).to(META), bool(mask.any())
    assert syncs.count == 6
    with Syncs() as syncs:
        values.masked_fill(mask, 1.0), values[mask.long()], torch.ones(2).to(META, non_blocking=True), values + 1
        torch.ones(3).nonzero(), torch.ones(3).sum().item()  # on the CPU
    assert syncs.count == 0


# Options of the run with heads, then of both runs; whether TRL's kernel selects the labelled positions itself.
CASES = {
    "frozen": ({"train_heads": False}, {}, False),
    "frozen, Triton": ({"train_heads": False}, {}, True),
    "trained in full": ({"train_heads": True}, {}, False),
    "sampled, trained": ({"train_heads": True, "aux_target_share": 0.5}, {}, False),
    "packed": ({"train_heads": False}, {"packing": True}, False),
    "two micro-batches": ({"train_heads": True}, {"gradient_accumulation_steps": 2}, False),
    "LoRA, sampled": ({"train_heads": False, "aux_target_share": 0.5}, {"lora": True}, False),
    "LoRA, trained through LoRA": ({"train_heads": True, "heads_lora_rank": 2}, {"lora": True}, False),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:.*flash:UserWarning")
def test_stage_two_waits_at_most_once_more_a_micro_batch_than_sft_trainer(name, rows, heads, tmp_path, monkeypatch):
    own, shared, has_kernel = CASES[name]
    monkeypatch.setattr(_compat, "_has_triton_kernel", lambda _device: has_kernel)
    options = {key: value for key, value in shared.items() if key != "lora"}
    micro_batches = options.get("gradient_accumulation_steps", 1)

    def syncs(kind, args):
        adapter = LoraConfig(r=4, target_modules="all-linear") if "lora" in shared else None
        return syncs_of_step(kind(str(BASE), args, train_dataset=rows, peft_config=adapter), micro_batches)

    without = syncs(SFTTrainer, SFTConfig(str(tmp_path), **{**OPTIONS, **options}))
    found = syncs(CAFTTrainer, config(tmp_path, heads=heads, **own, **options))
    assert 0 < without <= found <= without + (0 if has_kernel else micro_batches)


@pytest.mark.parametrize("soft", [{}, {"soft_targets": True}, {"soft_targets": True, "soft_top_k": 4}])
def test_stage_one_waits_as_often_with_many_heads_as_with_few_and_less_than_sft_trainer(rows, tmp_path, soft):
    options = [config(tmp_path, pretrain_heads=True, num_heads=n, **soft) for n in (1, 6)]
    one, many = (syncs_of_step(CAFTTrainer(str(BASE), args, train_dataset=rows)) for args in options)
    plain = SFTTrainer(str(BASE), SFTConfig(str(tmp_path), **OPTIONS), train_dataset=rows)
    assert one == many < syncs_of_step(plain)


def test_a_training_loop_without_the_trainer_waits_once_for_all_targets():
    model = AutoModelForCausalLM.from_pretrained(BASE)
    backbone = Backbone.of(model)
    attach_heads(backbone, AuxiliaryHeads.build(backbone, HeadsConfig(4)))
    model.to(META)
    batch = {name: torch.ones(2, 8, dtype=torch.long, device=META) for name in ("input_ids", "labels")}
    with Syncs() as without, torch.no_grad():
        model(**batch, use_cache=False)
    with Syncs() as syncs:
        model(**batch, auxiliary="only")
    assert syncs.count == without.count + 1
