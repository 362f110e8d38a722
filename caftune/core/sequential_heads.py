"""Heads one at a time, forward and backward: the memory they need does not grow with their number.

In a plain graph every head keeps its activations from the forward pass to the backward pass. Here each head's gradient is
computed right after its loss, within the forward pass, and only the sums of the gradients are kept: one tensor for every
input and parameter, whatever the number of heads. Nothing is computed twice. The scheme is that of Fast-LLM's heads.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from caftune.core.cross_entropy import keep_gradients, scaled_gradients

# Sum of the losses of head i, given stand-ins for the inputs, and what else is to be known of it.
Score = Callable[[int, list[Tensor]], tuple[Float[Tensor, ""], Tensor]]


def weighted_sum(
    score: Score, weights: Float[Tensor, " heads"], inputs: Sequence[Tensor], parameters: Sequence[Sequence[Tensor]]
) -> tuple[Float[Tensor, ""], Float[Tensor, " heads"], Tensor]:
    """sum_i weights[i] * loss_i, with gradient; and, without, every loss_i and what `score` says beside it.

    Args:
        score: head i's loss and one more tensor, from tensors in the place of `inputs`.
        weights: not below 0.
        inputs: tensors that all heads read and whose gradients go on.
        parameters: of each head, the other tensors that its loss has a gradient for; heads may share some.

    The gradients in between are those of losses weighed relative to the largest weight, so small weights do not make them
    vanish in half precision.
    """
    largest = weights.max().clamp(min=torch.finfo(weights.dtype).tiny)
    shared = {id(tensor): tensor for own in parameters for tensor in own}
    total, losses, others = _AtOnce.apply(score, weights / largest, parameters, len(inputs), *inputs, *shared.values())
    return largest * total, losses, others


class _AtOnce(torch.autograd.Function):
    """The loss, with gradients for the tensors at the end of its arguments."""

    @staticmethod
    def forward(
        ctx: Any, score: Score, weights: Tensor, parameters: Sequence[Sequence[Tensor]], count: int, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        places = {id(tensor): place for place, tensor in enumerate(tensors)}
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[:count]]
        gradients: list[Tensor | None] = [None] * len(tensors)
        losses, others = [], []
        for index, own in enumerate(parameters):
            with torch.enable_grad():
                # Views, because hooks on what a module is given cannot stand leaves here.
                loss, other = score(index, [leaf.view_as(leaf) for leaf in leaves])
                weighed = loss * weights[index].to(loss.dtype)
            with torch.autocast(weights.device.type, enabled=False):
                found = torch.autograd.grad(weighed, [*leaves, *own], allow_unused=True)
            losses.append(loss.detach())
            others.append(other)
            del loss, weighed
            for place, gradient in zip([*range(count), *(places[id(tensor)] for tensor in own)], found, strict=True):
                gradients[place] = _added(gradients[place], gradient, in_place=place >= count)
        keep_gradients(ctx, gradients)
        found_losses = torch.stack(losses)
        found_others = torch.stack(others)
        ctx.mark_non_differentiable(found_losses, found_others)
        return (weights.to(found_losses.dtype) * found_losses).sum(), found_losses, found_others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_unused: Any) -> tuple[Tensor | None, ...]:
        return (None, None, None, None, *scaled_gradients(ctx, upstream, in_place=False))  # some may be one tensor


def _added(total: Tensor | None, more: Tensor | None, *, in_place: bool) -> Tensor | None:
    """The sum. A gradient of an input may be one tensor with another's, so only those of parameters are added in place."""
    if total is None or more is None:
        return more if total is None else total
    return total.add_(more) if in_place else total + more
