"""The concept-aware objective: which token each horizon is held to, and what each horizon's loss weighs.

    L(t) = L_1 + beta * gamma(t) * sum_{h=2..n} alpha^(h-1) * L_h

A *horizon* h >= 1 is what position t says of token t+h; h = 1 is the model's own output, h >= 2 the auxiliary heads'.
Source: arXiv 2506.07833; gamma and the values of alpha and beta from its reference code.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
    """What the auxiliary losses weigh: `weight` is beta, `decay` alpha, `schedule` names gamma.

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
) -> Int[Tensor, "batch tokens"]:
    """The token each position is held to at `horizon`: targets[t] = labels[t + horizon], or -100 where there is none.

    There is none past the end of the row, where the label is -100, and where t and t + horizon are not in one document.
    Documents are told apart by their positions, which start at 0: token t + horizon lies in t's document exactly where its
    position is at least `horizon`. Padding (attention_mask 0) belongs to no document.

        two packed documents, horizon 2
        labels        a  b  c  d  x  y  z
        position_ids  0  1  2  3  0  1  2
        targets       c  d  -  -  z  -  -
    """
    targets = torch.full_like(labels, IGNORED)
    if horizon >= labels.shape[1]:
        return targets
    targets[:, :-horizon] = labels[:, horizon:]
    if position_ids is not None:
        targets[:, :-horizon].masked_fill_(position_ids[:, horizon:] < horizon, IGNORED)
    if attention_mask is not None and attention_mask.dim() == 2:
        padding = attention_mask == 0
        targets[:, :-horizon].masked_fill_(padding[:, :-horizon] | padding[:, horizon:], IGNORED)
    return targets


def count_targets(batch: Mapping[str, Tensor], horizons: Sequence[int]) -> Int[Tensor, " heads"]:
    """How many targets each of the horizons has in a batch as a data collator makes it."""
    where = {"position_ids": batch.get("position_ids"), "attention_mask": batch.get("attention_mask")}
    return torch.stack([(horizon_targets(batch["labels"], h, **where) != IGNORED).sum() for h in horizons])


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
    """What one nat of each horizon weighs in `auxiliary_loss`: its weight divided by its number of targets."""
    return torch.tensor(weights, dtype=dtype, device=counts.device) / counts.clamp(min=1)
