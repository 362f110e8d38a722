"""Heads one after another, each forward and backward: their activation memory does not grow with their number.

In a plain graph every head keeps its activations until the backward pass. Here each head's gradient is computed right after
its loss, within the forward pass, and only sums of gradients are kept: one tensor per input and parameter. Nothing is
computed twice. Source: the heads of Fast-LLM work in this way.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from caftune.core.cross_entropy import keep_gradients, scaled_gradients

# (i, stand-ins for the inputs) -> the sum of head i's losses, and one more tensor to report.
Score = Callable[[int, list[Tensor]], tuple[Float[Tensor, ""], Tensor]]


def weighted_sum(
    score: Score, weights: Float[Tensor, " heads"], inputs: Sequence[Tensor], parameters: Sequence[Sequence[Tensor]]
) -> tuple[Float[Tensor, ""], Float[Tensor, " heads"], Tensor]:
    """sum_i weights[i] * loss_i, with gradient; and without gradient every loss_i and the other tensor of `score`.

    Args:
        score: head i's loss and one more tensor, from tensors in place of `inputs`.
        weights: at least 0.
        inputs: tensors that all heads read and through which gradients flow back.
        parameters: of each head, the other tensors that its loss has a gradient for; heads may share some.

    Inside, weights are divided by the largest one, so that small weights do not make gradients vanish in half precision.
    """
    largest = weights.max().clamp(min=torch.finfo(weights.dtype).tiny)
    shared = {id(tensor): tensor for own in parameters for tensor in own}
    total, losses, others = _SequentialHeads.apply(
        score, weights / largest, parameters, len(inputs), *inputs, *shared.values()
    )
    return largest * total, losses, others


class _SequentialHeads(torch.autograd.Function):
    """The loss; its forward pass computes the gradients of `tensors`."""

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
                # Views, because hooks on a module's inputs fail on leaves here.
                loss, other = score(index, [leaf.view_as(leaf) for leaf in leaves])
                weighted = loss * weights[index].to(loss.dtype)
            with torch.autocast(weights.device.type, enabled=False):
                found = torch.autograd.grad(weighted, [*leaves, *own], allow_unused=True)
            losses.append(loss.detach())
            others.append(other)
            del loss, weighted
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
        return (None, None, None, None, *scaled_gradients(ctx, upstream, in_place=False))  # some may be the same tensor


def _added(total: Tensor | None, more: Tensor | None, *, in_place: bool) -> Tensor | None:
    """The sum. Gradients of two inputs may be the same tensor, so only those of parameters are added in place."""
    if total is None or more is None:
        return more if total is None else total
    return total.add_(more) if in_place else total + more
