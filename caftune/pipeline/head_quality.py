"""How good heads are, next to the untrained copies they began as and the model itself.

On text (best: the model's own, held out), for each horizon h: the loss in nats, and how often the token t + h is the head's
first guess (top-1) or among its first five (top-5). `trunk` is the model's own next-token prediction of the same tokens, from
one position before: what no head can be expected to exceed.

From sampled positions of that text the model also continues greedily by itself. `agreement` is how often head h guesses the
token that the model then writes. `accepted_length` is the mean number of leading guesses that are right in a row: how many
tokens beyond its own the model would accept of a draft of all heads.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig

from caftune.core.backbone import Backbone, evaluating
from caftune.core.cross_entropy import Unembedding, chunks, in_full
from caftune.core.heads import AuxiliaryHeads, autocast_like
from caftune.core.objective import IGNORED, horizon_targets
from caftune.generation.backends import until_end
from caftune.generation.batches import answer_in_batches

_BATCH = 16
_TOP = 5


def measure_heads(
    backbone: Backbone,
    heads: AuxiliaryHeads,
    rows: Dataset,
    *,
    eos: Sequence[int] | None = None,
    positions: int = 512,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure `heads` on `rows` (input_ids and labels): see the head of this file.

    Args:
        eos: tokens that end a continuation; None: the model's own.
        positions: from how many places of the text the model continues by itself.
        seed: draws these places.

    Returns:
        `heads`, `untrained` and `trunk`, each with `loss`, `top1`, `top5` by horizon (the first two also `agreement` by
        horizon, and `accepted_length`); `targets` by horizon; `positions`.
    """
    untrained = AuxiliaryHeads.build(backbone, replace(heads.config, final_norm=True))  # else a copy predicts nothing
    kinds = {"heads": heads, "untrained": untrained}
    places = _draw_places(rows, positions, seed, reach=heads.config.horizons[-1])
    with torch.inference_mode(), evaluating(backbone.model), evaluating(heads), evaluating(untrained):
        sums, guesses = _read(backbone, kinds, rows, places)
        own = _continue(backbone.model, rows, places, heads.config.horizons[-1], eos)
    report: dict[str, Any] = {"targets": {}, "positions": len(places)}
    for horizon in heads.config.horizons:
        report["targets"][str(horizon)] = int(sums["trunk", horizon][0])
    for name in ("trunk", *kinds):
        totals = {h: sums[name, h] for h in heads.config.horizons}
        report[name] = {
            measure: {str(h): float(total[i] / max(float(total[0]), 1.0)) for h, total in totals.items()}
            for i, measure in enumerate(("loss", "top1", "top5"), start=1)
        }
        if name in kinds:
            report[name] |= _agreement(guesses[name], own, heads.config.horizons)
    return report


def _draw_places(rows: Dataset, count: int, seed: int, *, reach: int) -> list[tuple[int, int]]:
    """(row, position) of places inside the labelled parts, with `reach` tokens of their row still to come."""
    found = [
        (number, t)
        for number, labels in enumerate(rows["labels"])
        for t in range(len(labels) - reach)
        if labels[t + 1] != IGNORED
    ]
    return sorted(random.Random(seed).sample(found, min(count, len(found))))


def _read(
    backbone: Backbone, kinds: dict[str, AuxiliaryHeads], rows: Dataset, places: Sequence[tuple[int, int]]
) -> tuple[dict[tuple[str, int], Tensor], dict[str, Tensor]]:
    """Pass the text through once. Returns sums (count, loss, top-1, top-5) and each head's guesses at `places`."""
    horizons = next(iter(kinds.values())).config.horizons
    sums = {(name, h): torch.zeros(4, dtype=torch.float64) for name in ("trunk", *kinds) for h in horizons}
    guesses = {name: torch.zeros(len(places), len(horizons), dtype=torch.long) for name in kinds}
    ids, labels = rows["input_ids"], rows["labels"]
    order = sorted(range(len(rows)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        tokens, mask = _padded([ids[i] for i in batch], 0, backbone.model.device)
        targets, _ = _padded([labels[i] for i in batch], IGNORED, backbone.model.device)
        here = [(n, batch.index(row), t) for n, (row, t) in enumerate(places) if row in batch]
        with backbone.capture() as call:
            backbone.trunk(input_ids=tokens, attention_mask=mask, use_cache=False)
        own = _scores(backbone.close(call.hidden), backbone.unembedding(), targets, 1, mask)
        for index, horizon in enumerate(horizons):
            wanted = horizon_targets(targets, horizon, attention_mask=mask) != IGNORED
            # the model predicts token t + horizon from position t + horizon - 1
            sums["trunk", horizon] += _total(own.roll(1 - horizon, dims=1)[wanted])
            for name, heads in kinds.items():
                with autocast_like(call.hidden):
                    hidden = heads.hidden(index, backbone, call)
                scores = _scores(hidden, backbone.unembedding(), targets, horizon, mask)
                sums[name, horizon] += _total(scores[wanted])
                for n, row, t in here:
                    guesses[name][n, index] = backbone.unembedding().logits(hidden[row, t]).argmax()
    return sums, guesses


def _scores(
    hidden: Float[Tensor, "batch tokens width"],
    unembedding: Unembedding,
    labels: Int[Tensor, "batch tokens"],
    horizon: int,
    mask: Tensor,
) -> Float[Tensor, "batch tokens three"]:
    """Loss, top-1 and top-5 of each position's target; zero where it has none."""
    targets = horizon_targets(labels, horizon, attention_mask=mask)
    rows = targets != IGNORED
    scores = torch.zeros(*targets.shape, 3, dtype=torch.float64, device=hidden.device)
    parts = []
    for some, wanted in chunks(unembedding.weight.shape[0], hidden[rows], targets[rows]):
        logits = in_full(unembedding.logits(some))
        loss = logits.logsumexp(-1) - logits.gather(1, wanted[:, None])[:, 0]
        first = logits.topk(min(_TOP, logits.shape[-1])).indices
        hits = (logits.argmax(-1) == wanted, (first == wanted[:, None]).any(-1))
        parts.append(torch.stack([loss.double(), *(hit.double() for hit in hits)], dim=-1))
    scores[rows] = torch.cat(parts) if parts else scores[rows]
    return scores


def _total(scores: Float[Tensor, "rows three"]) -> Float[Tensor, " four"]:
    return torch.cat([torch.tensor([len(scores)]).double(), scores.sum(0).cpu()])


def _continue(
    model: Any, rows: Dataset, places: Sequence[tuple[int, int]], count: int, eos: Sequence[int] | None
) -> list[list[int]]:
    """The `count` tokens that the model writes by itself, greedily, after each place, or fewer where it ends."""
    own = model.generation_config.eos_token_id
    ends = set(eos if eos is not None else [own] if isinstance(own, int) else own or ())
    greedy = GenerationConfig(
        max_new_tokens=count, do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=min(ends, default=0)
    )
    ids = rows["input_ids"]
    written: list[list[int]] = [[] for _ in places]
    for index, tokens in answer_in_batches(model, [ids[row][: t + 1] for row, t in places], greedy, batch_size=64):
        written[index] = until_end(tokens, ends).ids
    return written


def _agreement(guesses: Int[Tensor, "places heads"], own: list[list[int]], horizons: Sequence[int]) -> dict[str, Any]:
    """Share of guesses that the model writes itself, by horizon, and the mean number of leading ones in a row."""
    right = [
        [guess == tokens[h - 1] for guess, h in zip(row, horizons, strict=True) if h <= len(tokens)]
        for row, tokens in zip(guesses.tolist(), own, strict=True)
    ]
    by_horizon = {str(h): [row[i] for row in right if i < len(row)] for i, h in enumerate(horizons)}
    leading = [next((i for i, hit in enumerate(row) if not hit), len(row)) for row in right]
    return {
        "agreement": {h: sum(hits) / max(len(hits), 1) for h, hits in by_horizon.items()},
        "accepted_length": sum(leading) / max(len(leading), 1),
    }


def _padded(rows: Sequence[list[int]], filler: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    tokens = torch.tensor([row + [filler] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return tokens, mask
