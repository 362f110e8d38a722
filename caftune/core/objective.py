"""The concept-aware objective: the target of each position at each horizon, and the weight of each horizon's loss.

    L(t) = L_1 + beta * gamma(t) * sum_{h=2..n} alpha^(h-1) * L_h

At *horizon* h >= 1, position t predicts token t+h: with the model's own output for h = 1, with an auxiliary head for h >= 2.
Source: arXiv 2506.07833; gamma and the values of alpha and beta from its reference code.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from caftune.errors import CaftuneError

IGNORED = -100

# gamma as a function of progress p = t / T, the share of the optimizer steps already done, in [0, 1).
SCHEDULES: dict[str, Callable[[float], float]] = {
    "reflected_sine": lambda progress: math.sin((1 - progress) * math.pi / 2),
    "sine": lambda progress: math.sin(progress * math.pi / 2),
    "linear": lambda progress: progress,
    "constant": lambda _: 1.0,
}


@dataclass(frozen=True)
class AuxiliaryWeights:
    """The weights of the auxiliary losses: `weight` is beta, `decay` alpha, `schedule` names gamma.

    Raises:
        CaftuneError: a value outside its range, or an unknown schedule.
    """

    weight: float = 0.01
    decay: float = 0.8
    schedule: str = "reflected_sine"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise CaftuneError(f"weight (beta) must be a number >= 0, got {self.weight}.")
        if not 0 < self.decay <= 1:
            raise CaftuneError(f"decay (alpha) must be in (0, 1], got {self.decay}.")
        if self.schedule not in SCHEDULES:
            raise CaftuneError(f"schedule (gamma) must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}.")

    def at(self, step: int, total_steps: int, horizons: Sequence[int]) -> list[float]:
        """beta * gamma(step / total_steps) * alpha^(h-1) for each horizon h.

        >>> [round(w, 6) for w in AuxiliaryWeights().at(0, 100, [2, 3, 4, 5])]
        [0.008, 0.0064, 0.00512, 0.004096]
        """
        gamma = SCHEDULES[self.schedule](step / total_steps)
        return [self.weight * gamma * self.decay ** (horizon - 1) for horizon in horizons]


def horizon_targets(
    labels: Int[Tensor, "batch tokens"],
    horizon: int,
    *,
    position_ids: Int[Tensor, "#batch tokens"] | None = None,
    attention_mask: Tensor | None = None,
    documents: Int[Tensor, "#batch tokens"] | None = None,
) -> Int[Tensor, "batch tokens"]:
    """The target of each position at `horizon`: targets[t] = labels[t + horizon], or -100 where there is none.

    There is none past the end of the row, where the label is -100, and where t and t + horizon are in different documents.
    Position ids count the tokens of a document, so token t + horizon is in t's document exactly where its position id is
    greater by `horizon`. Padding (attention_mask 0) belongs to no document.

        two packed documents, horizon 2
        labels        a  b  c  d  x  y  z
        position_ids  0  1  2  3  0  1  2
        targets       c  d  -  -  z  -  -

    Args:
        attention_mask: [batch, tokens], which may number the documents (1 1 1 1 2 2 2), or [batch, heads, tokens, tokens],
            where a token attends to earlier tokens of the same document.
        documents: a number for each document.
    """
    targets = torch.full_like(labels, IGNORED)
    if horizon >= labels.shape[1]:
        return targets
    found = targets[:, :-horizon]
    found.copy_(labels[:, horizon:])
    if position_ids is not None:
        found.masked_fill_(position_ids[:, horizon:] - position_ids[:, :-horizon] != horizon, IGNORED)
    if documents is not None:
        found.masked_fill_(documents[:, horizon:] != documents[:, :-horizon], IGNORED)
    if attention_mask is not None and attention_mask.dim() in (2, 4):
        found.masked_fill_(_is_kept_apart(attention_mask, horizon), IGNORED)
    return targets


def _is_kept_apart(mask: Tensor, horizon: int) -> Tensor:
    """Whether a mask keeps token t + horizon apart from token t."""
    if mask.dim() == 4:  # as models take it: true, or 0 (which is added to scores), where a token attends
        attends = mask[:, 0] == 0 if mask.is_floating_point() else mask[:, 0].bool()
        return ~attends.diagonal(-horizon, 1, 2)
    return (mask[:, horizon:] == 0) | (mask[:, horizon:] != mask[:, :-horizon])


def _documents(batch: Mapping[str, Any]) -> Tensor | None:
    """The number of each token's document, where a collator gives the kernels' marks of packed documents."""
    ends = batch.get("cu_seq_lens_q")
    if ends is None:
        return batch.get("seq_idx")
    places = torch.arange(batch["labels"].numel(), dtype=ends.dtype, device=ends.device)
    return torch.bucketize(places, ends[1:], right=True).view_as(batch["labels"])


@dataclass(frozen=True)
class HorizonTargets:
    """The positions of a batch that have a target, and their targets, of all horizons in two tensors."""

    positions: Int[Tensor, " targets"]  # counted through the flattened batch; one horizon after the other
    tokens: Int[Tensor, " targets"]
    counts: Mapping[int, int]  # the number of targets by horizon, in the tensors' order

    @classmethod
    def of(cls, batch: Mapping[str, Any], horizons: Sequence[int]) -> "HorizonTargets":
        """`horizon_targets` of a batch as a data collator makes it. On the CPU; a batch on a GPU costs one synchronisation."""
        where = {name: batch.get(name) for name in ("position_ids", "attention_mask")}
        where["documents"] = _documents(batch)
        every = torch.stack(
            [horizon_targets(batch["labels"], horizon, **where).flatten() for horizon in horizons]
        ).cpu()
        head, positions = (every != IGNORED).nonzero(as_tuple=True)
        counts = torch.bincount(head, minlength=len(horizons)).tolist()
        return cls(positions, every[head, positions], dict(zip(horizons, counts, strict=True)))

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> "HorizonTargets":  # noqa: ARG002
        """The same on a device, without waiting for it. Accelerate's data loaders and BatchEncoding call this, too."""
        return HorizonTargets(
            _without_waiting(self.positions, device), _without_waiting(self.tokens, device), self.counts
        )

    def at(self, horizon: int) -> tuple[Int[Tensor, " scored"], Int[Tensor, " scored"]]:
        """The positions and tokens of one horizon."""
        place = list(self.counts).index(horizon)
        positions, tokens = (tensor.split([*self.counts.values()]) for tensor in (self.positions, self.tokens))
        return positions[place], tokens[place]

    def counts_of(self, horizons: Sequence[int]) -> Int[Tensor, " heads"]:
        """The number of targets of each of the horizons, on the CPU."""
        return torch.tensor([self.counts[horizon] for horizon in horizons])

    def drawn(self, sample: "Sample", horizons: Sequence[int]) -> tuple["HorizonTargets", list[float]]:
        """A sample of these horizons' targets, and how many targets each of a horizon's stands for."""
        starts = dict(zip(self.counts, accumulate(self.counts.values(), initial=0), strict=False))
        parts, factors = zip(*(sample.of(self.counts[horizon], horizon) for horizon in horizons), strict=True)
        places = torch.cat([part + starts[horizon] for part, horizon in zip(parts, horizons, strict=True)])
        places = _without_waiting(places, self.positions.device)
        counts = dict(zip(horizons, map(len, parts), strict=True))
        return HorizonTargets(self.positions[places], self.tokens[places], counts), list(factors)


def _without_waiting(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device. From pinned memory: CUDA waits for its other work before it copies much of any other memory."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Sample:
    """A random share of each horizon's targets, drawn without replacement and without touching the global random state.

    Sums over the sample times the factor that `of` returns estimate, without bias, the sums over all targets: every target
    is drawn with probability 1 / factor.
    """

    share: float  # in (0, 1]; the number of drawn targets is rounded up
    seed: tuple[
        int, ...
    ]  # numbers that differ for every batch; the horizon is added, so that heads draw different targets

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise CaftuneError(f"share must be in (0, 1], got {self.share}.")

    def of(self, count: int, horizon: int) -> tuple[Int[Tensor, " drawn"], float]:
        """The numbers of the drawn ones among `count` targets, in ascending order, and how many targets each stands for."""
        drawn = -int(-count * self.share // 1)
        if drawn == count:
            return torch.arange(count), 1.0
        digest = hashlib.blake2b(repr((*self.seed, horizon)).encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
        return torch.randperm(count, generator=generator)[:drawn].sort().values, count / drawn


def auxiliary_loss(
    negative_log_likelihood: Float[Tensor, " heads"], counts: Tensor, weights: Sequence[float]
) -> Float[Tensor, ""]:
    """sum_h weights[h] * negative_log_likelihood[h] / counts[h].

    Args:
        negative_log_likelihood: each horizon's sum over the targets of this batch, in nats.
        counts: each horizon's number of targets in the whole optimizer step (all micro-batches, all ranks), so that the
            gradients of the micro-batches add up to that of one large batch. A horizon without targets adds zero.
        weights: `AuxiliaryWeights.at` of this step.
    """
    scale = weights_of_sums(weights, counts.to(negative_log_likelihood.device), negative_log_likelihood.dtype)
    return (scale * negative_log_likelihood).sum()


def weights_of_sums(
    weights: Sequence[float], counts: Int[Tensor, " heads"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, " heads"]:
    """The weight of one nat of each horizon in `auxiliary_loss`: weights[h] / counts[h]."""
    return torch.tensor(weights, dtype=dtype).to(counts.device, non_blocking=True) / counts.clamp(min=1)
