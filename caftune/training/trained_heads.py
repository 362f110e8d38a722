"""Heads in training: in full or with a LoRA, their learning rate, and saving and loading them, also from a sharded model."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from caftune.checkpoints.heads_folder import DESCRIPTION_FILE, config_of, describe_heads
from caftune.core.backbone import gathered, whole
from caftune.core.heads import AuxiliaryHeads
from caftune.errors import CaftuneError

_ADAPTER_FILE = "adapter.safetensors"


def make_trainable(heads: AuxiliaryHeads, *, lora_rank: int | None, adapters: Mapping[str, Any] | None = None) -> None:
    """Make the heads trainable: all weights, in float32, or a LoRA on their linear layers.

    Args:
        lora_rank: rank of the LoRA; 0: all weights. None: as the model is trained, so by its LoRA's rank, or in full where it
            has no adapters. Other adapters than LoRA count as a LoRA with PEFT's default rank, alpha and dropout.
        adapters: the model's active adapters, by name. The heads' LoRA has the same scaling (alpha / rank) and dropout.

    Raises:
        CaftuneError: a LoRA for heads without linear layers.
    """
    adapters = adapters or {}
    if lora_rank == 0 or (lora_rank is None and not adapters):
        heads.float().requires_grad_(True)
        return
    alike = next((kind for kind in adapters.values() if isinstance(kind, LoraConfig)), LoraConfig())
    scaling = alike.lora_alpha / (math.sqrt(alike.r) if alike.use_rslora else alike.r)
    rank = lora_rank or alike.r
    # Not subclasses of them: routers and grouped layers have other inputs or outputs.
    linear = [name for name, module in heads.named_modules() if type(module) in (nn.Linear, Conv1D)]
    if not linear:
        raise CaftuneError(
            f"heads_lora_rank must be 0 for these heads, which have no linear layers, got {rank}. Train them in full (0), or "
            "freeze them (train_heads=False)."
        )
    transposed = any(type(module) is Conv1D for module in heads.modules())
    config = LoraConfig(
        r=rank,
        lora_alpha=scaling * rank,  # type: ignore[arg-type]  # a number is all that PEFT needs
        lora_dropout=alike.lora_dropout,
        target_modules=linear,
        fan_in_fan_out=transposed,
    )
    # Drawing the factors must not change what the model draws (its dropout), so that arms of a comparison stay alike.
    devices = {parameter.device for parameter in heads.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices):
        # The name of the model's own adapter: PEFT switches adapters by name, also in the heads, which are part of the model.
        inject_adapter_in_model(config, heads, next(iter(adapters), "default"))
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


def refuse_optimizer_without(heads: AuxiliaryHeads, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse an optimizer that holds weights of the model and not all trained ones of the heads."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [
        name for name, parameter in heads.named_parameters() if parameter.requires_grad and id(parameter) not in held
    ]
    if missing and any(id(parameter) in held for parameter in model.parameters()):
        raise CaftuneError(
            f"The optimizer must hold the heads' weights, got one without {missing[0]} and {len(missing) - 1} more. Let "
            "create_optimizer take all of model.parameters() that require gradients, or freeze the heads (train_heads=False)."
        )


def training_record(args: Any, steps: int) -> dict[str, Any]:
    """How heads were trained, for their heads.json: in stage 1, or in stage 2, trained with the model or frozen."""
    names = ["learning_rate", "num_train_epochs", "seed", "aux_decay", "aux_target_share"]
    names += ["soft_targets", "soft_top_k"]
    if not args.pretrain_heads:
        names += ["aux_weight", "aux_schedule", "train_heads", "heads_lora_rank", "heads_learning_rate"]
    stage = 1 if args.pretrain_heads else 2
    return {"stage": stage, "steps": steps, **{name: getattr(args, name) for name in names}}


def merged_state(heads: AuxiliaryHeads) -> dict[str, Tensor]:
    """The heads' weights with their LoRA merged, gathered if FSDP2 or ZeRO-3 shards them (then every rank must call)."""
    state = _whole_state(heads)
    for name in [key.removesuffix(".base_layer.weight") for key in state if key.endswith(".base_layer.weight")]:
        module: Any = heads.get_submodule(name)  # the state's names are without the wrappers around layers
        ((adapter, scaling),) = module.scaling.items()
        up, down = (state.pop(f"{name}.lora_{part}.{adapter}.weight") for part in "BA")
        weight = state[f"{name}.base_layer.weight"]
        change = scaling * up @ down
        change = change.T if getattr(module, "fan_in_fan_out", False) else change
        # To the CPU, so that the device does not hold all heads twice.
        state[f"{name}.base_layer.weight"] = (weight + change.to(weight.dtype)).cpu()
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}


def _whole_state(heads: AuxiliaryHeads) -> dict[str, Tensor]:
    with gathered(heads.parameters()):
        return {name: whole(tensor.detach()) for name, tensor in heads.state_dict().items()}


def save_adapter(folder: Path, heads: AuxiliaryHeads, *, write: bool) -> None:
    """Save the LoRA's factors next to the merged heads: a resumed run needs them."""
    factors = {name: value.cpu() for name, value in _whole_state(heads).items() if "lora_" in name}
    if factors and write:
        save_file(factors, folder / _ADAPTER_FILE)


def refuse_other_heads(heads: AuxiliaryHeads, folder: Path, *, are_trained: bool) -> None:
    """Refuse to resume from a checkpoint whose heads, in `folder`, were not trained as `heads` are."""
    ranks = {rank for module in heads.modules() if isinstance(module, LoraLayer) for rank in module.r.values()}
    own = _in_words(heads.config.count, next(iter(ranks), None)) if are_trained else "none"
    found = "none"
    if (folder / DESCRIPTION_FILE).is_file():
        adapter = load_file(folder / _ADAPTER_FILE) if (folder / _ADAPTER_FILE).is_file() else {}
        rank = next((len(factor) for name, factor in adapter.items() if ".lora_A." in name), None)
        found = _in_words(config_of(describe_heads(folder)).count, rank)
    if found != own:
        raise CaftuneError(
            f"{folder} must hold heads as this run trains them ({own}), got {found}. Resume with the earlier train_heads, "
            "heads_lora_rank and num_heads, or train from the start in another output_dir."
        )


def _in_words(count: int, rank: int | None) -> str:
    return f"{count} heads trained " + ("in full" if rank is None else f"by a LoRA of rank {rank}")


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
