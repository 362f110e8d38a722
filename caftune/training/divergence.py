"""Stop a training that diverged, name the step, and export nothing.

The weights decide: a loss that is not finite may not change them (float16's loss scaling skips such steps), and gradients can
make them NaN in a step with a finite loss. They are checked where the trainer synchronises anyway: before it logs, evaluates,
saves or ends.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback

from caftune.core.finite import first_and_count, not_finite, refuse_not_finite
from caftune.errors import CaftuneError

_MAX_NOT_FINITE_STEPS = 20  # in a row without a finite loss are a divergence, even with finite weights


class DivergedError(CaftuneError):
    """The weights or losses of a training are NaN or infinite.

    Attributes:
        step: the first optimizer step, from 1, without a finite loss.
        result: the run's measurements up to that step, if the stage records them.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step
        self.result: Mapping[str, Any] = {}


class LossWatch:
    """Tracks since which optimizer step losses are not finite. Only reading `since` synchronises the device."""

    def __init__(self) -> None:
        self._step = 0
        self._odd: Tensor | None = None  # the first and the last of the latest steps in a row without a finite loss

    def add(self, loss: Tensor, step: int) -> None:
        """Add the loss of a micro-batch of `step` (from 1); a step is finite if all its micro-batches are."""
        self._step = step
        odd = torch.zeros(2, dtype=torch.long, device=loss.device) if self._odd is None else self._odd
        first, last = odd
        again = torch.stack([torch.where(last >= step - 1, first, step).clamp(min=1), torch.full_like(last, step)])
        self._odd = torch.where(loss.detach().isfinite().all(), odd, again)

    @property
    def since(self) -> int:
        """The first of the latest steps in a row without a finite loss; 0 if the last step's loss is finite."""
        first, last = (0, 0) if self._odd is None else self._odd.tolist()
        return first if last == self._step else 0


class StopOnDivergence(TrainerCallback):
    """Raises DivergedError if a CAFTTrainer's training diverges, and CaftuneError if its initial weights are not finite.

    All processes raise at the same step.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._warned = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check the loaded weights."""
        refuse_not_finite(
            self._weights(trained=False),
            "The weights that training begins with",
            "The base, the heads or the checkpoint is broken: use another, or download it again.",
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check before anything is logged, evaluated or saved, and before the end."""
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self._check(state)

    on_epoch_end = on_step_end

    def _check(self, state: Any) -> None:
        odd = not_finite(self._weights(trained=True))
        since, broken = self._of_all_processes(self._trainer.loss_watch.since, bool(odd))
        many = state.global_step - since + 1 >= min(_MAX_NOT_FINITE_STEPS, state.max_steps)
        if broken or (since and many):
            raise DivergedError(self._explain(state, since, odd), since or state.global_step)
        if since and since != self._warned and state.is_world_process_zero:
            self._warned = since
            text = f"Step {since} has no finite loss. The weights are finite, so training continues."
            tqdm.write(text, file=sys.stderr)

    def _weights(self, *, trained: bool) -> dict[str, Tensor]:
        every = self._trainer.model.named_parameters()
        return {name: weight for name, weight in every if weight.requires_grad or not trained}

    def _of_all_processes(self, since: int, broken: bool) -> tuple[int, bool]:
        """The first step without a finite loss in any process, and whether any process has weights that are not finite."""
        found = torch.tensor([[since, broken]], device=self._trainer.args.device)
        steps, flags = self._trainer.accelerator.gather(found).T.tolist()
        return min((step for step in steps if step), default=0), any(flags)

    def _explain(self, state: Any, since: int, odd: list[str]) -> str:
        folder = self._trainer.args.output_dir
        where = f"from step {since} on" if since else f"in the weights after step {state.global_step}"
        named = f" ({first_and_count(odd)})" if odd else ""
        return (
            f"The training diverged: losses and weights must be finite numbers, got NaN or inf {where}, of {state.max_steps}"
            f"{named}. Nothing was exported; earlier checkpoints are unchanged. Lower learning_rate, lengthen the warm-up or "
            f"use bf16 instead of fp16, and remove {folder} to train again."
        )
