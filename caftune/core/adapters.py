"""Modules and weights without the adapters that PEFT wrapped around layers."""

from typing import Any

from torch import Tensor, nn

# FSDP's activation checkpointing adds this to the names of modules, but not to the keys of state_dict.
_CHECKPOINTED = "_checkpoint_wrapped_module."


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that PEFT wrapped (in a LoRA, or as a trained copy); `module` itself if it is not wrapped."""
    name = _inner_name(module)
    return module if name is None else unwrapped(module.get_submodule(name))


def strip_adapters(module: nn.Module) -> nn.Module:
    """Replace PEFT's wrapped layers by the original ones, in place, and return the module."""
    module = unwrapped(module)
    for name, part in list(module.named_modules()):
        if _inner_name(part) is not None:
            module.set_submodule(name, unwrapped(part))
    return module


def original_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's state dict with the keys and weights it had before PEFT wrapped any of its layers."""
    state: dict[str, Any] = module.state_dict()
    for name, part in module.named_modules():
        inner = _inner_name(part)
        if inner is None:
            continue
        place = f"{name}.".replace(_CHECKPOINTED, "") if name else ""
        for key in [key for key in state if key.startswith(place)]:
            value = state.pop(key)
            if key.startswith(f"{place}{inner}."):
                state[place + key.removeprefix(f"{place}{inner}.")] = value
    return state


def _inner_name(module: nn.Module) -> str | None:
    """The name of the child that a layer of PEFT wraps; None for other modules."""
    if not type(module).__module__.startswith("peft."):
        return None
    return next((name for name in ("base_layer", "original_module") if name in module._modules), None)
