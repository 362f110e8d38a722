"""Whether a model keeps packed documents apart: asked of the model itself, before the first step."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from caftune.core.backbone import evaluating, has_flash_attention
from caftune.errors import CaftuneError

_logger = logging.getLogger(__name__)
_TOKENS = 8
# As a share of the largest logit. Documents that are kept apart differ by rounding only, if at all (experts see other
# batches); those that are not, by far more.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_HALF_TOLERANCE = 5e-3


class RefuseLeaks(TrainerCallback):
    """Before the first step of a run with packed rows: two forward passes that differ in the first of two documents.

    If what the model says within the second document moves, it sees across documents, with this attention
    implementation, and the run is refused.

    Args:
        refuse: raise an error; False: only warn, since SFTTrainer would train.
    """

    def __init__(self, trainer: Any, *, refuse: bool = True) -> None:
        self._trainer = trainer
        self._refuse = refuse

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        model = self._trainer.model
        if not self._trainer.padding_free:
            return
        moved, tolerance = _movement(self._trainer)
        if moved > tolerance:
            attention = getattr(model.config.get_text_config(), "_attn_implementation", None)
            problem = (
                f"packing and padding_free must be False for this model with attention {attention!r}: what it says within a "
                f"document changes with the document before it in the row (by {moved:.1%} of its largest logit), so it would "
                "be trained on text it should not see. Try attn_implementation='flash_attention_2' on a GPU."
            )
            if self._refuse:
                raise CaftuneError(problem)
            _logger.warning(problem)


def _movement(trainer: Any) -> tuple[float, float]:
    """The largest change of a logit of the second document, as a share of the largest logit; and what rounding explains."""
    vocabulary = trainer.model.get_input_embeddings().weight.shape[0]
    numbers = torch.arange(1, _TOKENS + 1)
    one, other, second = ((numbers * factor % vocabulary).tolist() for factor in (1, 3, 2))
    # FSDP2 casts the weights themselves.
    is_cast = trainer.is_fsdp_enabled and trainer.accelerator.mixed_precision != "no"
    is_half = any(parameter.dtype not in _TOLERANCE for parameter in trainer.model.parameters())
    half = is_half or is_cast or has_flash_attention(trainer.model)
    with evaluating(trainer.model), torch.no_grad(), nullcontext() if half else _without_autocast(trainer.model):
        logits, changed = (_second_logits(trainer, first, second) for first in (one, other))
    tolerance = _HALF_TOLERANCE if half else _TOLERANCE[logits.dtype]
    return float((logits - changed).abs().max() / logits.abs().max()), tolerance


@contextmanager
def _without_autocast(model: Any) -> Iterator[None]:
    """Full precision, in which a small leak does not drown in rounding: accelerate puts its autocast into the forward."""
    patched = vars(model).get("forward")
    if "_original_forward" not in vars(model):
        yield
        return
    model.forward = model._original_forward
    try:
        yield
    finally:
        model.forward = patched


def _second_logits(trainer: Any, first: list[int], second: list[int]) -> Tensor:
    """Logits at the second of two documents, in a batch as the trainer packs it."""
    batch = trainer.data_collator([{"input_ids": ids, "labels": ids} for ids in (first, second)])
    batch = {
        name: value.to(trainer.args.device) if isinstance(value, Tensor) else value for name, value in batch.items()
    }
    del batch["labels"]
    return trainer.model_wrapped(**batch, use_cache=False).logits[0, len(first) :]
