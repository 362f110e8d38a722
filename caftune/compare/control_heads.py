"""Heads that a fair comparison holds CAFT's against: what is gained with these is no merit of pretrained heads."""

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

Control = Literal["random_heads", "shuffled_horizons"]


def write_control_heads(control: Control, source: Path, target: Path, *, seed: int) -> None:
    """Write to `target` what becomes of the heads in `source`.

    - `random_heads`: the entries of each tensor in random order. Scale and distribution of the weights stay, what they have
      learnt goes.
    - `shuffled_horizons`: each head in the place of the next one, the last in that of the first, so that all have learnt to
      predict, and none what it is held to.

    Raises:
        CaftuneError: shuffled_horizons with one head.
    """
    description = describe_heads(source)
    weights = read_heads(source)
    if control == "random_heads":
        generator = torch.Generator().manual_seed(seed)
        changed = {name: _permuted(tensor, generator) for name, tensor in sorted(weights.items())}
    else:
        changed = _rotated(weights, len(description["horizons"]))
    about = {"control": control, "seed": seed, "made_from": description["weights_sha256"]}
    write_heads(target, changed, {**description, "training": about})


def write_untrained_heads(
    model: Any, tokenizer: Any, config: HeadsConfig, target: Path, *, revision: str | None
) -> None:
    """Write to `target` heads as stage 1 begins with them: copies of the model's last layer."""
    backbone = Backbone.of(model)
    heads = AuxiliaryHeads.build(backbone, config)
    save_heads(target, heads, backbone, tokenizer, training={"control": "no_pretraining"}, revision=revision)


def _permuted(tensor: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(tensor.numel(), generator=generator)
    return tensor.flatten()[order].view(tensor.shape).contiguous()


def _rotated(weights: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    if count < 2:
        raise CaftuneError(f"shuffled_horizons needs at least 2 heads, got {count}. Leave it out of compare.arms.")
    moved = {}
    for name, tensor in weights.items():
        _, index, rest = name.split(".", 2)  # heads.0.mlp.up_proj.weight
        moved[f"heads.{(int(index) + 1) % count}.{rest}"] = tensor
    return moved
