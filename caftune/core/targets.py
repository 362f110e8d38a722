"""What heads are scored on: a sample of the targets, and soft targets, the model's own distributions in their place."""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caftune.core.backbone import Backbone
from caftune.core.cross_entropy import Unembedding, divergence, top_divergence, top_tokens
from caftune.errors import CaftuneError


@dataclass(frozen=True)
class Sample:
    """A random share of each horizon's targets, drawn without replacement and without touching the global random state.

    Sums over the sample times the factor that `of` returns estimate, without bias, the sums over all targets: every target
    is drawn with probability 1 / factor.

    Args:
        share: in (0, 1]; what it makes is rounded up to whole targets.
        seed: numbers that tell this batch from all others. The horizon is added, so that heads draw different targets.
    """

    share: float
    seed: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise CaftuneError(f"share must be in (0, 1], got {self.share}.")

    def of(self, rows: Int[Tensor, " rows"], horizon: int) -> tuple[Int[Tensor, " drawn"], float]:
        """The drawn ones among `rows`, in order, and how many targets each stands for."""
        drawn = -int(-len(rows) * self.share // 1)
        if drawn == len(rows):
            return rows, 1.0
        digest = hashlib.blake2b(repr((*self.seed, horizon)).encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
        chosen = torch.randperm(len(rows), generator=generator)[:drawn].sort().values
        return rows[chosen.to(rows.device)], len(rows) / drawn


@dataclass(frozen=True)
class Teacher:
    """The model's own next-token distributions, at every position: as hidden states, or as their likeliest tokens."""

    hidden: Float[Tensor, "batch tokens width"]
    top: tuple[Int[Tensor, "batch tokens k"], Float[Tensor, "batch tokens k"]] | None

    @classmethod
    def of(
        cls,
        hidden: Float[Tensor, "batch tokens width"],
        rows: Bool[Tensor, "batch tokens"],
        backbone: Backbone,
        k: int | None,
    ) -> "Teacher":
        """From the last layer's output; `rows` are those that have a next token, and the others are not looked at."""
        closed = backbone.close(hidden)
        if k is None:
            return cls(closed, None)
        found = top_tokens(closed[rows], backbone.unembedding(), k)
        places = [part.new_zeros(*rows.shape, part.shape[-1]) for part in found]
        for place, part in zip(places, found, strict=True):
            place[rows] = part
        return cls(closed, (places[0], places[1]))

    def distance(
        self, hidden: Float[Tensor, "rows width"], unembedding: Unembedding, rows: Int[Tensor, " rows"], horizon: int
    ) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """Sum of KL(teacher at row + horizon - 1 || head at row), and how often both have the same most likely token."""
        later = rows + horizon - 1
        if self.top is None:
            losses, same = divergence(hidden, unembedding, self.hidden.flatten(0, 1)[later])
        else:
            losses, same = top_divergence(hidden, unembedding, *(part.flatten(0, 1)[later] for part in self.top))
        return losses.sum(), same.sum()
