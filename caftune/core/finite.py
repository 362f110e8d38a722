"""Finding NaN and infinity in weights and logits."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from caftune.errors import CaftuneError


def is_packed(weight: Any) -> bool:
    """Whether bitsandbytes packs the weight's values into bits. Its dtype may be any (`bnb_4bit_quant_storage`)."""
    return type(weight).__name__ in ("Params4bit", "Int8Params")


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the floating-point tensors with NaN or infinity: one synchronisation per device, no copies.

    Of a sharded tensor the local shard is checked. Quantised weights are skipped.
    """
    read: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if is_packed(tensor):
            continue
        local = getattr(tensor, "ds_tensor", tensor)  # DeepSpeed's shard
        local = (local.to_local() if hasattr(local, "to_local") else local).detach()
        if local.is_floating_point() and local.element_size() > 1 and local.numel() > 0 and not local.is_meta:
            read.setdefault(local.device, {})[name] = local
    return [name for on_device in read.values() for name in _not_finite(on_device)]


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    # aminmax returns NaN for a NaN.
    fine = [torch.stack(torch.aminmax(tensor)).isfinite().all() for tensor in tensors.values()]
    return [name for name, is_fine in zip(tensors, torch.stack(fine).tolist(), strict=True) if not is_fine]


def refuse_not_finite(tensors: Mapping[str, Tensor], what: str, remedy: str) -> None:
    """Raise CaftuneError with `what` and the first tensor that is not finite, if there is one."""
    odd = not_finite(tensors)
    if odd:
        raise CaftuneError(f"{what} must hold finite numbers, got NaN or inf in {first_and_count(odd)}. {remedy}")


def nan_logits(model: Any) -> CaftuneError:
    """The error for a model whose logits are NaN."""
    return CaftuneError(
        f"The logits of {model.name_or_path} must be numbers, got NaN: its answers would be noise. Use another checkpoint, or "
        "a dtype with a wider range (bfloat16 or float32 in place of float16)."
    )


def first_and_count(names: list[str]) -> str:
    """The first name, and the number of others."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
