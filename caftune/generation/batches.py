"""Answers in padded batches; where a model allows it, a finished answer leaves its batch and a waiting prompt takes its place.

`generate` computes every row of a batch until the longest has ended. In a refilled batch finished rows are removed from the
cache, and new ones, prefilled as a separate batch, are added, aligned at the right as in a left-padded batch. This needs a
cache of keys and values only: see `can_refill`.
"""

import inspect
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad as padded
from transformers import DynamicCache, GenerationConfig, GenerationMixin
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from caftune.core.finite import nan_logits
from caftune.generation.cache import add_rows, buffered_cache, can_buffer, keep_rows

_REFILLED_SHARE = 4  # 1/4 of a batch must be free before new prompts are prefilled: a few at a time are slow

# Logits of rows, and the numbers of their prompts -> the next token of each.
Choice = Callable[[Float[Tensor, "rows tokens"], Sequence[int]], list[int]]


def answer_in_batches(
    model: Any,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    *,
    batch_size: int,
    seeds: Sequence[int] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """(index, tokens), shortest prompts first, so that the prompts of a batch need little padding.

    Tokens may be followed by padding: see `until_end`. None of the model's own generation settings is used. `seeds`: of each
    prompt, where the configuration samples.

    Raises:
        CaftuneError: the model's logits are NaN.
    """
    if can_refill(model):
        yield from refilled_batches(model, prompts, config, batch_size=batch_size, seeds=seeds or ())
        return
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, mask = _left_padded([prompts[i] for i in batch], config.pad_token_id or 0, model.device)
        watch = _RefuseNaN(model)
        with torch.inference_mode(), only_these_settings(model, config):
            output = model.generate(
                ids, attention_mask=mask, generation_config=config, logits_processor=LogitsProcessorList([watch])
            )
        watch.check()
        yield from zip(batch, output[:, ids.shape[1] :].tolist(), strict=True)


class _RefuseNaN(LogitsProcessor):
    """Raises CaftuneError for NaN logits: at the first token, or in `check` for later ones, so that no step synchronises."""

    def __init__(self, model: Any) -> None:
        self._model, self._seen = model, torch.zeros(())

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        is_first = not self._seen.dim()
        self._seen = scores.isnan().any()[None] | (False if is_first else self._seen)
        if is_first:
            self.check()
        return scores

    def check(self) -> None:
        if bool(self._seen.any()):
            raise nan_logits(self._model)


@contextmanager
def only_these_settings(model: Any, config: GenerationConfig) -> Iterator[None]:
    """`generate` fills settings that a configuration leaves open from the model's own (a repetition penalty); not here."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def can_refill(model: Any) -> bool:
    """Whether rows can leave and join a batch: their whole state is keys and values, and transformers prepares their inputs."""
    prepares = getattr(type(model), "prepare_inputs_for_generation", None)
    if prepares is not GenerationMixin.prepare_inputs_for_generation or getattr(model, "_is_stateful", False):
        return False  # not a model of transformers, or one with other inputs or another state
    return not model.config.is_encoder_decoder and can_buffer(model.config)


def refilled_batches(
    model: Any, prompts: Sequence[list[int]], config: GenerationConfig, *, batch_size: int, seeds: Sequence[int]
) -> Iterator[tuple[int, list[int]]]:
    """(index, tokens) in the order in which answers finish; the shortest prompts come first.

    An answer ends with an end-of-text token or after `max_new_tokens`. Each prompt has its own random numbers, from
    its seed, so an answer does not depend on the others in its batch (except by rounding).
    """
    choose = _choice(config, seeds)
    ends = set(config.eos_token_id or ())
    waiting = deque(sorted(range(len(prompts)), key=lambda index: len(prompts[index])))
    running: _RunningBatch | None = None
    while waiting or running:
        free = batch_size - (len(running.indices) if running else 0)
        if waiting and (running is None or free * _REFILLED_SHARE >= batch_size):
            group = [waiting.popleft() for _ in range(min(free, len(waiting)))]
            read = _RunningBatch.prefill(model, group, [prompts[index] for index in group], choose)
            if running:
                running.join(read)
            else:
                running = read
        elif running:
            running.decode_step(model, choose)
        assert running is not None
        is_over = [tokens[-1] in ends or len(tokens) >= (config.max_new_tokens or 0) for tokens in running.tokens]
        if any(is_over):
            yield from running.drop(is_over)
            running = running if running.indices else None


@dataclass
class _RunningBatch:
    """A batch of unfinished answers: the indices of their prompts, their tokens, the attention mask and the cache."""

    indices: list[int]
    tokens: list[list[int]]
    mask: Int[Tensor, "rows columns"]
    cache: DynamicCache

    @classmethod
    def prefill(cls, model: Any, indices: list[int], prompts: list[list[int]], choose: Choice) -> "_RunningBatch":
        """Prefill prompts, and choose the first token of each answer."""
        ids, mask = _left_padded(prompts, 0, model.device)
        cache = buffered_cache(model.config)
        logits = _logits(model, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
        return cls(indices, [[token] for token in choose(logits, indices)], mask, cache)

    def decode_step(self, model: Any, choose: Choice) -> None:
        """Add one token to every answer."""
        ids = torch.tensor([tokens[-1:] for tokens in self.tokens], device=model.device)
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], dim=1)
        logits = _logits(model, ids, self.mask, self.mask.sum(1, keepdim=True) - 1, self.cache)
        for tokens, token in zip(self.tokens, choose(logits, self.indices), strict=True):
            tokens.append(token)

    def join(self, others: "_RunningBatch") -> None:
        """Add other rows. The shorter ones get masked columns at the left."""
        columns = max(self.mask.shape[1], others.mask.shape[1])
        masks = [padded(rows.mask, (columns - rows.mask.shape[1], 0)) for rows in (self, others)]
        add_rows(self.cache, others.cache, columns)
        self.mask, self.indices, self.tokens = (
            torch.cat(masks),
            self.indices + others.indices,
            self.tokens + others.tokens,
        )

    def drop(self, is_over: Sequence[bool]) -> "list[tuple[int, list[int]]]":
        """Remove rows, and columns that are then masked in all. Returns the removed rows' (index, tokens)."""
        ended = [(self.indices[row], self.tokens[row]) for row, over in enumerate(is_over) if over]
        left = [row for row, over in enumerate(is_over) if not over]
        # The last rows take the places of those removed, so that the others stay where they are.
        last = [row for row in left if row >= len(left)]
        rows = [last.pop() if is_over[place] else place for place in range(len(left))]
        self.indices, self.tokens = [self.indices[row] for row in rows], [self.tokens[row] for row in rows]
        if rows:
            mask = self.mask[torch.tensor(rows, device=self.mask.device)]
            columns = mask.shape[1] - int(mask.any(0).int().argmax())
            self.mask = mask[:, -columns:]
            keep_rows(self.cache, rows, columns)
        return ended


def _left_padded(prompts: Sequence[list[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of prompts, aligned at the right."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


@torch.inference_mode()
def _logits(
    model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache
) -> Float[Tensor, "rows tokens"]:
    """The logits at the last column, in float32 as in `generate`. Raises CaftuneError where one is NaN."""
    known = inspect.signature(model.forward).parameters
    more = {name: value for name, value in (("position_ids", positions), ("logits_to_keep", 1)) if name in known}
    outputs = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more)
    logits: Tensor = outputs.logits[:, -1].float()
    if bool(logits.isnan().any()):
        raise nan_logits(model)
    return logits


def _choice(config: GenerationConfig, seeds: Sequence[int]) -> Choice:
    if not config.do_sample:
        return lambda logits, _: logits.argmax(-1).tolist()
    drawn = [random.Random(seed) for seed in seeds]
    warpers = LogitsProcessorList(_warpers(config))

    def sampled(logits: Float[Tensor, "rows tokens"], indices: Sequence[int]) -> list[int]:
        """Inverse-CDF sampling: the first token whose cumulative probability exceeds a random number."""
        scores = warpers(torch.empty(0, dtype=torch.long), logits)  # type: ignore[arg-type]
        ends = scores.double().softmax(-1).cumsum(-1)
        numbers = torch.tensor([[drawn[index].random()] for index in indices], dtype=ends.dtype, device=ends.device)
        found: list[int] = torch.searchsorted(ends, numbers * ends[:, -1:], right=True).squeeze(1).tolist()
        return found

    return sampled


def _warpers(config: GenerationConfig) -> list[Any]:
    """The processors that `generate` applies to logits before it samples, in its order."""
    found: list[Any] = []
    if config.temperature not in (None, 1.0):
        found.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        found.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1:
        found.append(TopPLogitsWarper(config.top_p))
    return found
