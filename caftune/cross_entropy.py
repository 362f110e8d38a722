"""Cross-entropy of `hidden @ W.T` against targets, without holding the logits of all rows."""

from collections.abc import Iterator
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
    parts = [_run(chunk, unembedding) for chunk in _chunks(hidden, targets, unembedding.weight.shape[0])]
    return torch.cat([likelihood for likelihood, _ in parts]), torch.cat([correct for _, correct in parts])


def _chunks(hidden: Tensor, targets: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, _CHUNK_VALUES // vocabulary)
    return zip(hidden.split(rows), targets.split(rows), strict=True)


def _run(chunk: tuple[Tensor, Tensor], unembedding: Unembedding) -> tuple[Tensor, Tensor]:
    def score(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = Unembedding(weight, bias, unembedding.scale, unembedding.softcap).logits(hidden)
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        return -functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets

    hidden, targets = chunk
    arguments = (hidden, unembedding.weight, unembedding.bias, targets)
    return checkpoint(score, *arguments, use_reentrant=False, preserve_rng_state=False)
