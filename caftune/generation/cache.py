"""A cache of keys and values whose rows can leave and join: a step, a lost row and a new row copy little.

transformers' own layers copy all keys and values at every step, which takes a third of the time of a step on a CPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_SPARE = 64  # columns that a new buffer has beyond those in use


class _Buffered:
    """Keys and values as views of buffers: the rows in use, and the columns that later tokens can see.

    Columns are aligned at the right. What a buffer holds outside the views is finite: a mask may hide it, but 0 * NaN is NaN.
    """

    keys: Float[Tensor, "rows heads columns width"]
    values: Float[Tensor, "rows heads columns width"]
    is_initialized: bool
    _buffers: tuple[Tensor, Tensor] | None = None
    _begin, _end = 0, 0  # columns of the buffers that are in use

    def _longest(self) -> int | None:
        """Columns to keep for later tokens; None: all."""
        return None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add the states of new tokens to all rows. Returns what these tokens can see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)  # type: ignore[attr-defined]
        rows, new = len(key_states), key_states.shape[-2]
        self._make_room(rows, self._end - self._begin, new, like=(key_states, value_states))
        assert self._buffers is not None
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, self._end : self._end + new] = states
        self._end += new
        seen = [buffer[:rows, :, self._begin : self._end] for buffer in self._buffers]
        longest = self._longest()
        if longest is not None:
            self._begin = max(self._begin, self._end - longest)
        self._show(rows)
        return seen[0], seen[1]

    def keep_rows(self, rows: Sequence[int], columns: int) -> None:
        """Keep these rows, in this order, and their last `columns` columns. Only rows that change place are copied."""
        assert self._buffers is not None
        for place, row in enumerate(rows):
            if place != row:  # rows[place + 1:] never names `place`: see `_RunningBatch.drop`
                for buffer in self._buffers:
                    buffer[place, :, self._begin : self._end] = buffer[row, :, self._begin : self._end]
        self._begin = max(self._begin, self._end - columns)
        self._show(len(rows))

    def add_rows(self, other: "_Buffered") -> None:
        """Add the rows of another layer. Where one has fewer columns, the others' are for it to be masked."""
        count, more = len(self.keys), len(other.keys)
        width, added = max(self._end - self._begin, other._end - other._begin), other._end - other._begin
        self._make_room(count + more, width, 0, like=(self.keys, self.values))
        assert self._buffers is not None
        for buffer, states in zip(self._buffers, (other.keys, other.values), strict=True):
            buffer[count : count + more, :, self._end - added : self._end] = states
        self._show(count + more)

    def _make_room(self, rows: int, width: int, new: int, *, like: tuple[Tensor, Tensor]) -> None:
        """Room for `rows` rows, for `width` columns up to the current one, and for `new` ones after it."""
        if self._buffers is not None:
            fits = rows <= len(self._buffers[0]) and self._end + new <= self._buffers[0].shape[-2]
            if fits and self._end >= width:
                self._begin = self._end - width
                return
        used, rows = self._end - self._begin, max(rows, len(self._buffers[0]) if self._buffers else 0)
        made = []
        for number, states in enumerate(like):
            buffer = states.new_zeros(rows, states.shape[1], width + new + _SPARE, states.shape[3])
            if self._buffers is not None:
                old = self._buffers[number]
                buffer[: len(old), :, width - used : width] = old[:, :, self._begin : self._end]
            made.append(buffer)
        self._buffers, self._begin, self._end = (made[0], made[1]), 0, width

    def _show(self, rows: int) -> None:
        assert self._buffers is not None
        self.keys, self.values = (buffer[:rows, :, self._begin : self._end] for buffer in self._buffers)


class _Layer(_Buffered, DynamicLayer):  # type: ignore[misc]
    """All columns are kept."""


class _SlidingLayer(_Buffered, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """The columns that the window of a later token reaches are kept."""

    def _longest(self) -> int:
        return self.sliding_window - 1

    def update(self, key_states: Tensor, *others: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """As in a layer without a window, and count the columns, for transformers' masks."""
        self.cumulative_length += key_states.shape[-2]
        return super().update(key_states, *others, **more)


def can_buffer(config: Any) -> bool:
    """Whether a model's memory is keys and values only, of all tokens or of a window."""
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def buffered_cache(config: Any) -> DynamicCache:
    """An empty cache for a model for which `can_buffer`."""
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    cache.layers = [
        _SlidingLayer(layer.sliding_window) if isinstance(layer, DynamicSlidingWindowLayer) else _Layer()
        for layer in cache.layers
    ]
    return cache


@torch.inference_mode()
def keep_rows(cache: DynamicCache, rows: Sequence[int], columns: int) -> None:
    """Keep rows of a cache in this order, and the last `columns` columns."""
    layers: Any = cache.layers
    for layer in layers:
        layer.keep_rows(rows, columns)
        _count(layer, columns)


@torch.inference_mode()
def add_rows(cache: DynamicCache, other: DynamicCache, columns: int) -> None:
    """Add the rows of another cache; both then have `columns` columns, the missing ones at the left."""
    layers: Any = zip(cache.layers, other.layers, strict=True)
    for layer, more in layers:
        layer.add_rows(more)
        _count(layer, columns)


def _count(layer: Any, columns: int) -> None:
    """A sliding-window layer also counts the columns that it has dropped."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = columns
