"""Control heads of a fair comparison: a gain with these is not due to pretrained heads."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from caftune.checkpoints.heads_folder import (
    describe_heads,
    read_heads,
    save_heads,
    write_heads,
)
from caftune.core.backbone import Backbone
from caftune.core.heads import AuxiliaryHeads, HeadsConfig
from caftune.errors import CaftuneError


def write_control_heads(
    control: Literal["random_heads", "shuffled_horizons"], source: Path, target: Path, *, seed: int
) -> None:
    """Write to `target` changed copies of the heads in `source`.

    - `random_heads`: the entries of each tensor in random order. Scale and distribution of the weights stay, what they have
      learnt is lost.
    - `shuffled_horizons`: each head in the place of the next one, the last in that of the first, so that every head has
      learnt to predict, but another horizon than its own.

    Raises:
        CaftuneError: shuffled_horizons with one head.
    """
    description = describe_heads(source)
    weights, count = read_heads(source), len(description["horizons"])
    if control == "random_heads":
        generator = torch.Generator().manual_seed(seed)
        changed = {name: _permuted(tensor, generator) for name, tensor in sorted(weights.items())}
    elif count < 2:
        raise CaftuneError(f"shuffled_horizons needs at least 2 heads, got {count}. Leave it out of compare.arms.")
    else:
        changed = {_moved(name, count): tensor for name, tensor in weights.items()}
    about = {"control": control, "seed": seed, "made_from": description["weights_sha256"]}
    write_heads(target, changed, {**description, "training": about})


def write_untrained_heads(
    model: Any, tokenizer: Any, config: HeadsConfig, target: Path, *, revision: str | None
) -> None:
    """Write to `target` heads as stage 1 starts with them: copies of the model's last layer."""
    backbone = Backbone.of(model)
    heads = AuxiliaryHeads.build(backbone, config)
    save_heads(target, heads, backbone, tokenizer, training={"control": "no_pretraining"}, revision=revision)


def _permuted(tensor: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(tensor.numel(), generator=generator)
    return tensor.flatten()[order].view(tensor.shape).contiguous()


def _moved(name: str, count: int) -> str:
    """The name of a tensor in the next head: heads.0.mlp.up_proj.weight -> heads.1.mlp.up_proj.weight."""
    _, index, rest = name.split(".", 2)
    return f"heads.{(int(index) + 1) % count}.{rest}"
