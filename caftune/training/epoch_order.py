"""The order of an epoch's rows, found again by a resumed run where it is drawn from torch's global random numbers."""

import base64
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer

_KEY = "EpochOrder"  # of the trainer's state, which checkpoints hold


class EpochOrder(Sampler[int]):
    """A sampler, and the random state that it drew the current epoch's order from.

    transformers 5.23 restores the random state of a checkpoint only after it has drawn the order (`group_by_length`), so a run
    that resumes within an epoch would train some rows twice and others never. A run that is not resumed draws what it always
    draws.
    """

    def __init__(self, sampler: Any, trainer: Trainer) -> None:
        self._sampler, self._trainer = sampler, trainer

    @property
    def generator(self) -> Any:
        """The sampler's own random numbers, which accelerate sets where processes share them; None: torch's global ones."""
        return self._sampler.generator

    @generator.setter
    def generator(self, generator: Any) -> None:
        self._sampler.generator = generator

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        kept: Any = self._trainer.state.stateful_callbacks  # a dict, once a training has begun
        epoch = self._trainer.state.epoch or 0.0
        is_within_epoch = abs(epoch - round(epoch)) > 1e-6
        if is_within_epoch and _KEY in kept:
            torch.set_rng_state(_state(kept[_KEY]["drawn_from"]))
        else:
            kept[_KEY] = {"drawn_from": _text(torch.get_rng_state())}
        return iter(self._sampler)


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _state(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
