"""Soft targets: the model's own next-token distributions in place of the tokens of the data."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from caftune.core.backbone import Backbone
from caftune.core.cross_entropy import Unembedding, divergence, top_divergence, top_tokens


@dataclass(frozen=True)
class Teacher:
    """The model's next-token distribution at every position: as hidden states, or as its k most likely tokens."""

    hidden: Float[Tensor, "positions width"]
    top: tuple[Int[Tensor, "positions k"], Float[Tensor, "positions k"]] | None

    @classmethod
    def of(
        cls,
        hidden: Float[Tensor, "batch tokens width"],
        positions: Int[Tensor, " targets"],
        backbone: Backbone,
        k: int | None,
    ) -> "Teacher":
        """Take the distributions from the last layer's output.

        Args:
            positions: those with a next token, counted through the batch; the distributions at others are not computed.
            k: the number of most likely tokens to keep; None: all.
        """
        closed = backbone.close(hidden).flatten(0, 1)
        if k is None:
            return cls(closed, None)
        every = []
        for found in top_tokens(closed[positions], backbone.unembedding(), k):
            place = found.new_zeros(len(closed), found.shape[-1])
            place[positions] = found
            every.append(place)
        return cls(closed, (every[0], every[1]))

    def distance(
        self,
        hidden: Float[Tensor, "targets width"],
        unembedding: Unembedding,
        positions: Int[Tensor, " targets"],
        horizon: int,
    ) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """Sum of KL(teacher at position + horizon - 1 || head at position), and how often their most likely tokens agree."""
        later = positions + horizon - 1
        if self.top is None:
            losses, agreements = divergence(hidden, unembedding, self.hidden[later])
        else:
            losses, agreements = top_divergence(hidden, unembedding, *(part[later] for part in self.top))
        return losses.sum(), agreements.sum()
