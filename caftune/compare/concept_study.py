"""How well a model predicts whole concepts, where next-token losses average over their fragments.

Only the labelled tokens of rows (an answer, for example) are searched; the tokens before them are context. Every occurrence
of a concept that its tokenizer cuts into several tokens is scored as a whole: the log-probability of all its tokens, and
whether each of them was the model's first guess.

The paper gives no definition of a concept and reports no such measure. Both are ours: see `caftune.evals.concepts`.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from caftune.compare.summary import ArmConcepts, ConceptGroup
from caftune.core.backbone import Backbone, evaluating
from caftune.core.cross_entropy import log_likelihood
from caftune.core.objective import IGNORED
from caftune.evals.concepts import Concept, find_concepts, offsets_of, token_positions

_BATCH = 16
_NAMES = 12

Found = tuple[Concept, str, tuple[int, ...]]  # a concept, its text, and the positions of its tokens in the row
Scores = dict[int, tuple[float, bool]]  # by position: log p of the token there, and whether it is the most likely one


def study_concepts(
    model: Any, tokenizer: Any, rows: Dataset, kind: str, terms: Sequence[str] = (), limit: int | None = None
) -> list[dict[str, Any]]:
    """Score every concept of at least two tokens in the labelled parts of `rows` (input_ids and labels).

    Adjacent labelled tokens are decoded together, without special tokens, and searched as one text. A concept that contains
    the first token of a row is left out: nothing predicts that token.

    Args:
        model: a causal language model, or its `Backbone`.
        tokenizer: the one that made the rows.
        kind, terms: of `find_concepts`.
        limit: number of rows, from the first; None: all.

    Returns:
        One dictionary per concept, by rows and positions: `row`; `name`; `text` (the parts of one that is not contiguous
        with … between them); `tokens`; `log_prob`, the sum over its tokens of log p(token | all before it), in nats;
        `exact`, whether each token was the most likely one. For a contiguous concept that is what greedy decoding writes
        from its first token on; the gaps of another one hold the text's tokens.

    Raises:
        UnsupportedModelError: the model's parts cannot be found.
        CaftuneError: no such kind of concepts.
    """
    backbone = model if isinstance(model, Backbone) else Backbone.of(model)
    chosen = rows if limit is None else rows.select(range(min(limit, len(rows))))
    ids, labels = list(chosen["input_ids"]), list(chosen["labels"])
    found = {
        number: list(_concepts_of(tokens, targets, tokenizer, kind, terms))
        for number, (tokens, targets) in enumerate(zip(ids, labels, strict=True))
    }
    # rows of similar length share a batch
    order = sorted((number for number in found if found[number]), key=lambda number: len(ids[number]))
    scored: dict[int, Scores] = {}
    with torch.inference_mode(), evaluating(backbone.model):
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            wanted = [sorted({place for _, _, places in found[number] for place in places}) for number in batch]
            scored |= zip(batch, _score(backbone, [ids[number] for number in batch], wanted), strict=True)
    return [
        {
            "row": number,
            "name": concept.name,
            "text": text,
            "tokens": len(places),
            "log_prob": math.fsum(scored[number][place][0] for place in places),
            "exact": all(scored[number][place][1] for place in places),
        }
        for number in sorted(scored)
        for concept, text, places in found[number]
    ]


def summarise_concepts(runs: Sequence[Sequence[Mapping[str, Any]]]) -> ArmConcepts:
    """Means over the concepts of each run as `study_concepts` gives them: of all, by number of tokens, by name.

    All runs have the same concepts, those of data.eval; only the 12 most frequent names are kept.
    """
    names = Counter(concept["name"] for concept in runs[0])
    frequent = sorted(names, key=lambda name: (-names[name], name))[:_NAMES]
    lengths = sorted({concept["tokens"] for concept in runs[0]})

    def group(key: str, value: Any) -> ConceptGroup:
        parts = [[concept for concept in run if concept[key] == value] for run in runs]
        return ConceptGroup(len(parts[0]), *_means(parts))

    by_tokens = {str(length): group("tokens", length) for length in lengths}
    return ArmConcepts(*_means(runs), by_tokens, {name: group("name", name) for name in frequent})


def _means(runs: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[list[float], list[float]]:
    """The mean of exp(log_prob) and the share of `exact` of each run that has concepts."""
    some = [run for run in runs if run]
    probability = [math.fsum(math.exp(concept["log_prob"]) for concept in run) / len(run) for run in some]
    return probability, [sum(concept["exact"] for concept in run) / len(run) for run in some]


def _concepts_of(
    ids: Sequence[int], labels: Sequence[int], tokenizer: Any, kind: str, terms: Sequence[str]
) -> Iterator[Found]:
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


def _score(backbone: Backbone, rows: Sequence[list[int]], wanted: Sequence[list[int]]) -> list[Scores]:
    """The scores of each row's `wanted` positions."""
    width, device = max(map(len, rows)), backbone.model.device
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    with backbone.capture() as call:
        backbone.trunk(input_ids=tokens, attention_mask=mask, use_cache=False)
    flat = [(number, place) for number, places in enumerate(wanted) for place in places]
    index = torch.tensor(flat, device=device).T
    # the token at a position is predicted from the position before
    hidden: Float[Tensor, "places width"] = backbone.close(call.hidden)[index[0], index[1] - 1]
    logs, hits = log_likelihood(hidden, backbone.unembedding(), tokens[index[0], index[1]])
    scores: list[Scores] = [{} for _ in rows]
    for (number, place), log, hit in zip(flat, logs.double().tolist(), hits.tolist(), strict=True):
        scores[number][place] = (log, hit)
    return scores
