"""What the cost of a run depends on, next to its model."""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Setup:
    """The options and the data of a run, as far as they change its cost."""

    stage: Literal["heads", "train"] = "train"  # stage 1 or 2
    tuning: Literal["full", "lora", "qlora"] = "full"
    freezes_unembedding: bool = False  # in full fine-tuning
    heads: int = 4  # K; 0 for plain fine-tuning
    head_kind: str = "decoder"
    trains_heads: bool = False
    heads_lora_rank: int | None = None  # 0: in full; None: as the model is trained
    target_share: float = 1.0  # of its targets that each head is trained on
    leaves_out_heads: bool = False  # some steps may run no head (`loss.min_weight`), as in plain fine-tuning
    batch_size: int = 8
    eval_batch_size: int = 0  # 0: the run evaluates nothing
    accumulation: int = 1
    length: int = 1024  # tokens of the longest example, to which a batch is padded, or of a packed row
    mean_length: float = 1024.0  # tokens of the mean example, packed or not
    labelled: float = 1.0  # share of the tokens that have a next token to be trained on
    is_packed: bool = False
    is_padded: bool = False  # examples differ in length
    padding: float = 1.0  # positions of a batch per token, 1 without padding
    checkpointing: bool = True
    optimizer: str = "adamw_torch_fused"
    dtype: torch.dtype = torch.float32  # of the loaded weights
    half: bool = False  # products run in half precision (bf16, fp16)
    on_gpu: bool = False  # kernels and optimizers of a GPU

    @property
    def labelled_positions(self) -> float:
        """Share of a batch's positions that are labelled, where the batch is padded to `length`."""
        return self.labelled * (1.0 if self.is_packed else self.mean_length / self.length)

    @property
    def scored_positions(self) -> float:
        """Share of a batch's positions that a head is trained on."""
        return self.labelled_positions * self.target_share

    @property
    def skips_unlabelled(self) -> bool:
        """Whether TRL's loss (1.16) computes logits of labelled positions alone: on GPUs, and next to heads."""
        return self.on_gpu or self.heads > 0
