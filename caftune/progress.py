"""What a person sees while a stage runs: a bar, and one short line per log entry."""

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback


class StageProgress(TrainerCallback):
    """A progress bar for training and evaluation whose log lines hold what matters, rounded."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name, unit="step", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        line = log_line(logs or {})
        if line:
            tqdm.write(f"{self.name} {state.global_step:>6}  {line}", file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def show_progress(trainer: Trainer, name: str) -> None:
    """Replace the trainer's own progress output."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(StageProgress(name))


def log_line(logs: dict[str, float]) -> str:
    """`loss 1.234  h1 1.20  h2 2.34 ...`; empty where the entry holds no loss."""
    names = [name for name in logs if name == "loss" or (name.endswith("_loss") and name != "train_loss")]
    return "  ".join(
        f"{name if name.endswith('eval_loss') else name.removesuffix('_loss')} {logs[name]:.3f}" for name in names
    )
