"""Work-arounds for other libraries: each names the library, the reason, and what ends it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.integrations import deepspeed
from transformers.utils import is_triton_available

from caftune.core.objective import IGNORED, horizon_targets
from caftune.core.replay import at_positions

_HAS_TRITON = is_triton_available()


@contextmanager
def loading_whole_weights() -> Iterator[None]:
    """Within the block, transformers loads whole weights under DeepSpeed ZeRO-3, too.

    transformers 5: a process-wide setting, made by TrainingArguments, partitions whatever is loaded. Heads are copies of whole
    weights, and one rank alone, which exports, would wait for the others. Ends with an argument of `from_pretrained`.
    """
    setting = deepspeed._hf_deepspeed_config_weak_ref and deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if setting is not None:
            deepspeed.set_hf_deepspeed_config(setting)


@contextmanager
def at_labelled_positions(trunk: nn.Module, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Within the block, TRL's fused head gets the positions with a next token to be trained on, and no others.

    TRL 1.16: without Triton the fused head computes the logits of all positions and then drops those it does not need.
    Ends when it selects positions on every device, as its Triton kernel does: there nothing is changed.
    """
    is_given = not arguments.get("fused_lm_head") or arguments.get("shift_labels") is not None
    if is_given or _has_triton_kernel(arguments["labels"].device):
        yield arguments
        return
    positions, targets = _labelled(arguments["labels"])

    def cut(_trunk: nn.Module, _args: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        output = copy.copy(output)  # heads that branch off after the whole trunk read the one it returned
        output.last_hidden_state = at_positions(hidden, positions.to(hidden.device))
        return output

    handle = trunk.register_forward_hook(cut)
    try:
        yield {**arguments, "labels": None, "shift_labels": targets[None]}
    finally:
        handle.remove()


def _has_triton_kernel(device: torch.device) -> bool:
    return _HAS_TRITON and device.type in ("cuda", "xpu")


# Their number differs with every batch, for which torch.compile would compile again.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _labelled(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The positions with a next token to be trained on, counted through the batch, and these tokens."""
    targets = horizon_targets(labels, 1).flatten()
    positions = (targets != IGNORED).nonzero()[:, 0]
    return positions, targets[positions]


def has_sparse_attention(cache: DynamicCache) -> bool:
    """Whether the model's attention picks its tokens with an indexer.

    transformers 5.23: the indexer picks other tokens when several are read at once, so a draft cannot be checked.
    Ends when reading tokens one by one and several at once give the same logits.
    """
    return any(hasattr(layer, "indexer_keys") for layer in cache.layers)
