"""How well a model predicts whole concepts, where next-token losses average over their fragments.

Searched are the labelled tokens of rows (an answer, for example); what stands before them is context. Every occurrence of a
concept that its tokenizer cuts into several tokens is scored as a whole: the log-probability of all its tokens, and whether
each of them was the model's first guess.

The paper gives no definition of a concept and reports no such measure. Both are ours: see `caftune.evals.concepts`.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Bool, Float
from torch import Tensor

from caftune.core.backbone import Backbone, evaluating
from caftune.core.cross_entropy import log_likelihood
from caftune.core.objective import IGNORED
from caftune.evals.concepts import Concept, find_concepts, offsets_of, token_positions

_BATCH = 16
_NAMES = 12


def study_concepts(
    model: Any, tokenizer: Any, rows: Dataset, kind: str, terms: Sequence[str] = (), limit: int | None = None
) -> list[dict[str, Any]]:
    """Score every concept of at least two tokens in the labelled parts of `rows` (input_ids and labels).

    Labelled tokens that follow each other are decoded together, special tokens apart, and searched as one text. A concept
    with the first token of a row is left out: nothing predicts it.

    Args:
        model: a causal language model, or its `Backbone`.
        tokenizer: the one that made the rows.
        kind: of `find_concepts`.
        terms: of `find_concepts`.
        limit: only so many rows, from the first; None: all.

    Returns:
        One dictionary per concept, by rows and then as they are written: `row`; `name`; `text` (the parts of one that is not
        contiguous with … between them); `tokens`; `log_prob`, the sum over its tokens of log p(token | all before it), in
        nats; `exact`, whether each token was the most likely one. For a contiguous concept that is what greedy decoding
        would have written from its first token on; in the gaps of another the text's own tokens stand.

    Raises:
        UnsupportedModelError: the model's parts cannot be found.
        CaftuneError: no such kind of concepts.
    """
    backbone = model if isinstance(model, Backbone) else Backbone.of(model)
    chosen = rows if limit is None else rows.select(range(min(limit, len(rows))))
    ids, labels = list(chosen["input_ids"]), list(chosen["labels"])
    found: dict[int, list[_Found]] = {}
    for number, (tokens, targets) in enumerate(zip(ids, labels, strict=True)):
        found[number] = list(_concepts_of(tokens, targets, tokenizer, kind, terms))
    order = sorted((number for number in found if found[number]), key=lambda number: len(ids[number]))
    scored: dict[int, dict[int, tuple[float, bool]]] = {}
    with torch.inference_mode(), evaluating(backbone.model):
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            wanted = [sorted({place for _, _, places in found[number] for place in places}) for number in batch]
            scores = _score(backbone, [ids[number] for number in batch], wanted)
            scored |= zip(batch, scores, strict=True)
    return [
        {"row": number, "name": concept.name, "text": text, **_whole(scored[number], places)}
        for number in sorted(scored)
        for concept, text, places in found[number]
    ]


def summarise_concepts(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over concepts as `study_concepts` gives them.

    Returns:
        `count`, `probability` (mean of exp(log_prob)) and `exact` (share), None where there are no concepts; the same three in
        `by_tokens`, by number of tokens, and in `by_name`, for the 12 most frequent names.
    """
    names = Counter(concept["name"] for concept in found)
    frequent = sorted(names, key=lambda name: (-names[name], name))[:_NAMES]
    lengths = sorted({concept["tokens"] for concept in found})
    return {
        **_means(found),
        "by_tokens": {str(n): _means([concept for concept in found if concept["tokens"] == n]) for n in lengths},
        "by_name": {name: _means([concept for concept in found if concept["name"] == name]) for name in frequent},
    }


def _means(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    count = len(found)
    if not count:
        return {"count": 0, "probability": None, "exact": None}
    probability = math.fsum(math.exp(concept["log_prob"]) for concept in found) / count
    return {"count": count, "probability": probability, "exact": sum(concept["exact"] for concept in found) / count}


_Found = tuple[Concept, str, tuple[int, ...]]  # a concept, its text, and the positions of its tokens in the row


def _concepts_of(
    ids: Sequence[int], labels: Sequence[int], tokenizer: Any, kind: str, terms: Sequence[str]
) -> Iterator[_Found]:
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    searched = [label != IGNORED and token not in special for token, label in zip(ids, labels, strict=True)]
    for is_searched, places in groupby(range(len(ids)), key=searched.__getitem__):
        run = list(places)
        if not is_searched:
            continue
        text, offsets = offsets_of([ids[place] for place in run], tokenizer)
        for concept, positions in token_positions(find_concepts(text, kind, terms), offsets):
            written = "…".join(text[start:end] for start, end in concept.ranges)
            if run[positions[0]] > 0:
                yield concept, written, tuple(run[position] for position in positions)


def _whole(scores: Mapping[int, tuple[float, bool]], places: Sequence[int]) -> dict[str, Any]:
    return {
        "tokens": len(places),
        "log_prob": math.fsum(scores[place][0] for place in places),
        "exact": all(scores[place][1] for place in places),
    }


def _score(
    backbone: Backbone, rows: Sequence[list[int]], wanted: Sequence[list[int]]
) -> list[dict[int, tuple[float, bool]]]:
    """Of each row's `wanted` positions: the log-probability of the token there, and whether it is the most likely one."""
    width, device = max(map(len, rows)), backbone.model.device
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    with backbone.capture() as call:
        backbone.trunk(input_ids=tokens, attention_mask=mask, use_cache=False)
    flat = [(number, place) for number, places in enumerate(wanted) for place in places]
    index = torch.tensor(flat, device=device).T
    # the token at a place is predicted from the place before
    hidden: Float[Tensor, "places width"] = backbone.close(call.hidden)[index[0], index[1] - 1]
    logs, hits = log_likelihood(hidden, backbone.unembedding(), tokens[index[0], index[1]])
    return _by_row(flat, logs, hits, len(rows))


def _by_row(
    flat: Sequence[tuple[int, int]], logs: Float[Tensor, " places"], hits: Bool[Tensor, " places"], count: int
) -> list[dict[int, tuple[float, bool]]]:
    scores: list[dict[int, tuple[float, bool]]] = [{} for _ in range(count)]
    for (number, place), log, hit in zip(flat, logs.double().tolist(), hits.tolist(), strict=True):
        scores[number][place] = (log, hit)
    return scores
