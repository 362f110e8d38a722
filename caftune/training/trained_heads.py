"""Heads in training: in full or with a LoRA, their learning rate, and saving and loading them, also from a sharded model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from caftune.core.backbone import whole
from caftune.core.heads import AuxiliaryHeads
from caftune.errors import CaftuneError
from caftune.training.config import CAFTConfig

_ADAPTER_FILE = "adapter.safetensors"
# PEFT's default name, so that disabling the model's adapter disables the heads' adapter, too.
_ADAPTER = "default"


def make_trainable(heads: AuxiliaryHeads, *, lora_rank: int | None) -> None:
    """Make the heads trainable: all weights, in float32, or a LoRA of `lora_rank` on their linear layers."""
    if lora_rank is None:
        heads.float().requires_grad_(True)
        return
    # Not subclasses of them: routers and grouped layers have other inputs or outputs.
    linear = [name for name, module in heads.named_modules() if type(module) in (nn.Linear, Conv1D)]
    if not linear:
        raise CaftuneError(
            "heads_lora_rank must be None for these heads, which have no linear layers. Train them in full."
        )
    transposed = any(type(module) is Conv1D for module in heads.modules())
    config = LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=linear, fan_in_fan_out=transposed)
    inject_adapter_in_model(config, heads, _ADAPTER)
    for name, parameter in heads.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()


def give_own_learning_rate(optimizer: torch.optim.Optimizer, heads: AuxiliaryHeads, learning_rate: float) -> None:
    """Move the heads' parameters into separate groups; a scheduler created later scales all groups alike."""
    own = {id(parameter) for parameter in heads.parameters()}
    for group in list(optimizer.param_groups):
        heads_part = [parameter for parameter in group["params"] if id(parameter) in own]
        if heads_part:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            rest = {key: value for key, value in group.items() if key != "params"}
            optimizer.add_param_group({**rest, "params": heads_part, "lr": learning_rate})


def training_record(args: CAFTConfig, steps: int) -> dict[str, Any]:
    """How heads were trained, for their heads.json: in stage 1, or in stage 2, trained with the model or frozen."""
    names = ["learning_rate", "num_train_epochs", "seed", "aux_decay", "soft_targets", "soft_top_k"]
    if not args.pretrain_heads:
        names += ["aux_weight", "aux_schedule", "train_heads", "heads_lora_rank", "heads_learning_rate"]
    stage = 1 if args.pretrain_heads else 2
    return {"stage": stage, "steps": steps, **{name: getattr(args, name) for name in names}}


def merged_state(heads: AuxiliaryHeads) -> dict[str, Tensor]:
    """The heads' weights with their LoRA merged, gathered if FSDP2 shards them (then every rank must call)."""
    state = {name: whole(tensor.detach()) for name, tensor in heads.state_dict().items()}
    for name in [key.removesuffix(".base_layer.weight") for key in state if key.endswith(".base_layer.weight")]:
        module: Any = heads.get_submodule(name)  # the state's names are without the wrappers around layers
        up, down = (state.pop(f"{name}.lora_{part}.{_ADAPTER}.weight") for part in "BA")
        weight = state[f"{name}.base_layer.weight"]
        change = module.scaling[_ADAPTER] * up @ down
        state[f"{name}.base_layer.weight"] = weight + (
            change.T if getattr(module, "fan_in_fan_out", False) else change
        ).to(weight.dtype)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}


def save_adapter(folder: Path, heads: AuxiliaryHeads, *, write: bool) -> None:
    """Save the LoRA's factors next to the merged heads: a resumed run needs them."""
    factors = {name: whole(value.detach()).cpu() for name, value in heads.state_dict().items() if "lora_" in name}
    if factors and write:
        save_file(factors, folder / _ADAPTER_FILE)


def load_state(heads: AuxiliaryHeads, folder: Path, merged: Mapping[str, Tensor]) -> None:
    """Load what `merged_state` and `save_adapter` wrote: the LoRA's factors if there is one, otherwise the weights."""
    has_adapter = any(isinstance(module, LoraLayer) for module in heads.modules())
    _copy_into(heads, load_file(folder / _ADAPTER_FILE) if has_adapter else merged)


@torch.no_grad()
def _copy_into(heads: AuxiliaryHeads, state: Mapping[str, Tensor]) -> None:
    own: dict[str, Any] = heads.state_dict()
    for name, tensor in state.items():
        target = own[name]
        if hasattr(target, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            tensor = distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)
        target.copy_(tensor)
