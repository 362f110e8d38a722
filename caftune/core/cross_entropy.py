"""Cross-entropy of `hidden @ W.T` against targets or a teacher, without holding the logits of all positions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Logits of one chunk: 2^26 values, 256 MiB in float32.
CHUNK_VALUES = 2**26


@dataclass(frozen=True)
class Unembedding:
    """The output projection: logits = softcap * tanh(scale * (hidden @ W.T + bias) / softcap); no softcap where None."""

    weight: Float[Tensor, "vocabulary width"]
    bias: Float[Tensor, " vocabulary"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Float[Tensor, "*positions width"]) -> Float[Tensor, "*positions vocabulary"]:
        """Logits of a few positions; for many, and for a loss, see `log_likelihood`."""
        logits = functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)  # some norms end in float32
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def log_likelihood(
    hidden: Float[Tensor, "positions width"], unembedding: Unembedding, targets: Int[Tensor, " positions"]
) -> tuple[Float[Tensor, " positions"], Bool[Tensor, " positions"]]:
    """Log-probability of each position's target, and whether the target is the most likely token there.

        log p(target) = logits[target] - logsumexp(logits),   logits = unembedding.logits(hidden)

    Computed in chunks of positions whose logits are computed again in the backward pass instead of being kept, so memory does
    not grow with positions x vocabulary. Logits in half precision are summed in float32; float64 stays float64.
    """
    return _scored(_score_targets, hidden, unembedding, targets)


def summed_loss(
    hidden: Float[Tensor, "positions width"], unembedding: Unembedding, targets: Int[Tensor, " positions"]
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """-sum of `log_likelihood`, and the number of positions whose target is the most likely token.

    No logits are computed twice: a chunk's gradients are computed with its logits, which is possible for a sum (every position
    has the same factor upstream). The cost: the weight's gradient, if it has one, is held until the backward pass.
    """
    transform = (unembedding.scale, unembedding.softcap)
    weights = (unembedding.weight, unembedding.bias)
    return _SummedLoss.apply(transform, torch.is_grad_enabled(), targets, hidden, *weights)


def divergence(
    hidden: Float[Tensor, "positions width"], unembedding: Unembedding, teacher: Float[Tensor, "positions width"]
) -> tuple[Float[Tensor, " positions"], Bool[Tensor, " positions"]]:
    """KL divergence of each position's distribution from its teacher's, in nats, and whether their most likely tokens agree.

        KL(p || q) = sum_v p(v) (log p(v) - log q(v)),   p, q = softmax(unembedding.logits(teacher, hidden))

    The gradient goes to `hidden` and the unembedding through q alone. Chunks as in `log_likelihood`.
    """
    return _scored(_score_teacher, hidden, unembedding, teacher.detach())


def top_tokens(
    teacher: Float[Tensor, "positions width"], unembedding: Unembedding, k: int
) -> tuple[Int[Tensor, "positions k"], Float[Tensor, "positions k"]]:
    """Each position's k most likely tokens, most likely first, and their log-probabilities among these k; no gradient."""
    k = min(k, unembedding.weight.shape[0])
    with torch.no_grad():
        found = [
            in_full(unembedding.logits(chunk)).topk(k) for (chunk,) in chunks(unembedding.weight.shape[0], teacher)
        ]
        tokens = torch.cat([part.indices for part in found])
        return tokens, functional.log_softmax(torch.cat([part.values for part in found]), -1)


def top_divergence(
    hidden: Float[Tensor, "positions width"],
    unembedding: Unembedding,
    tokens: Int[Tensor, "positions k"],
    logs: Float[Tensor, "positions k"],
) -> tuple[Float[Tensor, " positions"], Bool[Tensor, " positions"]]:
    """`divergence` from a teacher of which only `top_tokens` are kept, with probabilities that sum to one over them.

        KL(p || q) = sum_{v in tokens} p(v) (log p(v) - log q(v)),   q over the whole vocabulary

    With k the whole vocabulary it equals `divergence`. One pass through the unembedding serves all horizons.
    """
    return _scored(_score_top, hidden, unembedding, tokens, logs.detach())


def chunks(vocabulary: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of equal length in chunks of positions whose logits have at most `CHUNK_VALUES` values."""
    length = max(1, CHUNK_VALUES // vocabulary)
    return zip(*(tensor.split(length) for tensor in tensors), strict=True)


def _scored(
    score: Callable[..., tuple[Tensor, Tensor]], hidden: Tensor, unembedding: Unembedding, *others: Tensor
) -> tuple[Tensor, Tensor]:
    """`score` of all positions, chunk by chunk, each computed again in the backward pass."""

    def run(weight: Tensor, bias: Tensor | None, *chunk: Tensor) -> tuple[Tensor, Tensor]:
        return score(Unembedding(weight, bias, unembedding.scale, unembedding.softcap), *chunk)

    weight, bias = unembedding.weight, unembedding.bias
    parts = [
        checkpoint(run, weight, bias, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in chunks(weight.shape[0], hidden, *others)
    ]
    return torch.cat([value for value, _ in parts]), torch.cat([hit for _, hit in parts])


def _score_targets(unembedding: Unembedding, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = in_full(unembedding.logits(hidden))
    return -functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


def _score_teacher(unembedding: Unembedding, hidden: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    logits = in_full(unembedding.logits(hidden))
    with torch.no_grad():
        expected = in_full(unembedding.logits(teacher))
    logs = (functional.log_softmax(logits, -1), functional.log_softmax(expected, -1))
    return functional.kl_div(*logs, reduction="none", log_target=True).sum(-1), logits.argmax(-1) == expected.argmax(-1)


def _score_top(unembedding: Unembedding, hidden: Tensor, tokens: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    logits = in_full(unembedding.logits(hidden))
    found = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
    distance = functional.kl_div(found, logs, reduction="none", log_target=True).sum(-1)
    return distance, logits.argmax(-1) == tokens[:, 0]


def in_full(logits: Tensor) -> Tensor:
    """Logits in the precision they are summed in: float32 for half precision."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


class _SummedLoss(torch.autograd.Function):
    """`summed_loss`: its forward pass computes the gradients for a factor of 1 upstream."""

    @staticmethod
    def forward(
        ctx: Any,
        transform: tuple[float, float | None],
        has_backward: bool,
        targets: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        wanted = [has_backward and wants for wants in ctx.needs_input_grad[3:]]
        given = zip((hidden, weight, bias), wanted, strict=True)
        of_hidden, of_weight, of_bias = (None if x is None or not wants else torch.zeros_like(x) for x, wants in given)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        losses, hits = [], []
        start = 0
        with torch.autocast(device, enabled=False):
            cast = Unembedding(weight.to(dtype), None if bias is None else bias.to(dtype))
            for part, tokens in chunks(weight.shape[0], hidden, targets):
                part = part.to(dtype)
                loss, right, slope = _loss_and_slope(in_full(cast.logits(part)), tokens, *transform)
                losses.append(loss)
                hits.append(right)
                slope = slope.to(dtype)
                if of_hidden is not None:
                    of_hidden[start : start + len(part)] = slope @ cast.weight
                if of_weight is not None:
                    _add_product(of_weight, slope.T, part)
                if of_bias is not None:
                    of_bias += slope.sum(0)
                start += len(part)
                del slope  # before the next chunk's logits
        keep_gradients(ctx, [of_hidden, of_weight, of_bias])
        found = torch.stack(hits).sum()
        ctx.mark_non_differentiable(found)
        return torch.stack(losses).sum(), found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _hits: Any) -> tuple[Tensor | None, ...]:
        return None, None, None, *scaled_gradients(ctx, upstream, in_place=True)


def keep_gradients(ctx: Any, gradients: list[Tensor | None]) -> None:
    """Keep gradients that a forward pass has computed, for `scaled_gradients` in the backward pass."""
    ctx.gradients = gradients
    # Freed with the graph, so torch raises its own error in a second backward pass.
    ctx.save_for_backward(torch.empty(0))


def scaled_gradients(ctx: Any, upstream: Tensor, *, in_place: bool) -> list[Tensor | None]:
    """The kept gradients times `upstream`; they stay kept where the graph is retained for another backward pass.

    Args:
        in_place: multiply in place where the gradients are not kept.

    Raises:
        RuntimeError: torch's own, where the graph was not retained by an earlier backward pass.
    """
    ctx.saved_tensors  # noqa: B018  (raises once they are freed)
    gradients: list[Tensor | None] = ctx.gradients
    if torch._C._autograd._get_current_graph_task_keep_graph():
        gradients, in_place = [*gradients], False
    else:
        ctx.gradients = None
    for place, x in enumerate(gradients):  # one at a time, so that memory never holds them twice
        if x is not None:
            gradients[place] = x.mul_(upstream.to(x.dtype)) if in_place else x * upstream.to(x.dtype)
    return gradients


def _loss_and_slope(
    logits: Float[Tensor, "positions vocabulary"], targets: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """-sum of log p(target), the number of hits, and the loss's derivative by the logits, which are overwritten."""
    if scale != 1.0:
        logits *= scale
    bend = None
    if softcap is not None:
        bent = torch.tanh_(logits.div_(softcap))
        bend = 1 - bent.square()
        logits = bent.mul_(softcap)
    top, place = logits.max(-1, keepdim=True)
    target = logits.gather(-1, targets[:, None]) - top
    odds = logits.sub_(top).exp_()
    total = odds.sum(-1, keepdim=True)
    loss = (total.log() - target).sum()
    slope = odds.div_(total)
    slope.scatter_add_(-1, targets[:, None], -torch.ones_like(target))
    if bend is not None:
        slope *= bend
    return loss, (place[:, 0] == targets).sum(), slope.mul_(scale) if scale != 1.0 else slope


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """total += one @ other, without a tensor for the product where the types allow it."""
    if total.dtype == one.dtype:
        torch.addmm(total, one, other, out=total)  # counted by torch's FLOP counter, which addmm_ is not
    else:
        total += one @ other
