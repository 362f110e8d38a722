"""Work-arounds for other libraries: each names the library, the reason, and what ends it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from caftune.data.template_errors import remove_byte_order_mark, template_in

if TYPE_CHECKING:
    from caftune.training.config import CAFTConfig


@contextmanager
def as_sft_trainer_needs(args: "CAFTConfig", processing_class: Any, *, has_model: bool) -> Iterator[None]:
    """Within the block, SFTTrainer can be built from `args`, whose values are then put back.

    TRL 1.16 keeps the byte order mark of a chat template's file, so it becomes a token of every prompt. Ends when TRL removes
    it. And it warns that model_init_kwargs are unused where the model is already loaded, as CAFTTrainer did with them.
    """
    before = args.model_init_kwargs, args.chat_template_path
    if has_model:
        args.model_init_kwargs = None
    if processing_class is not None:
        template = template_in(args.chat_template_path)
        if template is not None:
            processing_class.chat_template, args.chat_template_path = template, None
        remove_byte_order_mark(processing_class)
    try:
        yield
    finally:
        args.model_init_kwargs, args.chat_template_path = before


def keep_trainable_on_cpu(model: Any) -> None:
    """Keep 4-bit weights in a layout that gradients flow through.

    bitsandbytes 0.50 packs them for a CPU kernel in the first evaluation (since its pull request 1804), and its backward pass
    cannot read that. Ends when it unpacks them for training.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_divided_by_trainer(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether Trainer divides what compute_loss returns by the number of micro-batches.

    transformers 5.23 decides so in `training_step` (5.16 without `loss_is_scaled_for_ga`). Ends when a trainer can be queried.
    """
    is_scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if is_scaled is None:
        by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        is_scaled = by_model or trainer.compute_loss_func is not None
    return not is_scaled


def use_current_cadence(args: Any, state: Any) -> None:
    """Take the cadence of logging, evaluating and saving from the options of a resumed run.

    transformers 5.23 takes it from the checkpoint. Ends with its pull request 36303 (open).
    """
    state.compute_steps(args, state.max_steps)
    state.train_batch_size = args.train_batch_size


@contextmanager
def evaluation_leaves_rng(trainer: Trainer) -> Iterator[None]:
    """Within the block, evaluations leave the random state of training unchanged.

    transformers 5.23: the evaluation's data loader draws a number, so dropout and the sample of targets would depend on when
    a run is evaluated (also after its last step). Ends when evaluations have a separate generator.
    """
    evaluate = trainer.evaluate

    def evaluate_apart(*args: Any, **options: Any) -> dict[str, float]:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            return evaluate(*args, **options)

    trainer.evaluate = evaluate_apart  # type: ignore[method-assign]
    try:
        yield
    finally:
        del trainer.evaluate  # the class's method again
