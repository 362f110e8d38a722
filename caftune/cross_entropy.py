"""Cross-entropy of `hidden @ W.T` against targets or a teacher, without holding the logits of all rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Logits of one chunk: 2^26 values, 256 MiB in float32.
_CHUNK_VALUES = 2**26


@dataclass(frozen=True)
class Unembedding:
    """The output projection: logits = softcap * tanh(scale * (hidden @ W.T + bias) / softcap); no softcap where None."""

    weight: Float[Tensor, "vocabulary width"]
    bias: Float[Tensor, " vocabulary"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocabulary"]:
        """Logits of a few rows; for many, and for a loss, see `log_likelihood`."""
        logits = functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)  # some norms end in float32
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def log_likelihood(
    hidden: Float[Tensor, "rows width"], unembedding: Unembedding, targets: Int[Tensor, " rows"]
) -> tuple[Float[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """Log-probability of each row's target, and whether the target is the row's most likely token.

        log p(target) = logits[target] - logsumexp(logits),   logits = unembedding.logits(hidden)

    Rows go through in chunks whose logits are computed again in the backward pass instead of being kept, so the memory
    needed does not grow with rows x vocabulary. Logits in half precision are summed in float32; float64 stays float64.
    """
    parts = [
        _recomputed(_score_targets, chunk, unembedding)
        for chunk in _chunks(hidden, targets, unembedding.weight.shape[0])
    ]
    return torch.cat([likelihood for likelihood, _ in parts]), torch.cat([correct for _, correct in parts])


def divergence(
    hidden: Float[Tensor, "rows width"], unembedding: Unembedding, teacher: Float[Tensor, "rows width"]
) -> tuple[Float[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """How far each row's distribution is from its teacher's, in nats, and whether both have the same most likely token.

        KL(p || q) = sum_v p(v) (log p(v) - log q(v)),   p, q = softmax(unembedding.logits(teacher, hidden))

    The gradient goes to `hidden` and the unembedding through q alone. Chunks as in `log_likelihood`.
    """
    parts = [
        _recomputed(_score_teacher, chunk, unembedding)
        for chunk in _chunks(hidden, teacher.detach(), unembedding.weight.shape[0])
    ]
    return torch.cat([distance for distance, _ in parts]), torch.cat([same for _, same in parts])


def _chunks(hidden: Tensor, others: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, _CHUNK_VALUES // vocabulary)
    return zip(hidden.split(rows), others.split(rows), strict=True)


def _recomputed(
    score: Callable[[Unembedding, Tensor, Tensor], tuple[Tensor, Tensor]],
    chunk: tuple[Tensor, Tensor],
    unembedding: Unembedding,
) -> tuple[Tensor, Tensor]:
    """`score` of one chunk, computed again in the backward pass."""

    def run(weight: Tensor, bias: Tensor | None, hidden: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return score(Unembedding(weight, bias, unembedding.scale, unembedding.softcap), hidden, other)

    arguments = (unembedding.weight, unembedding.bias, *chunk)
    return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)


def _score_targets(unembedding: Unembedding, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = _in_full(unembedding.logits(hidden))
    return -functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


def _score_teacher(unembedding: Unembedding, hidden: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    logits = _in_full(unembedding.logits(hidden))
    with torch.no_grad():
        expected = _in_full(unembedding.logits(teacher))
    logs = (functional.log_softmax(logits, -1), functional.log_softmax(expected, -1))
    return functional.kl_div(*logs, reduction="none", log_target=True).sum(-1), logits.argmax(-1) == expected.argmax(-1)


def _in_full(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
