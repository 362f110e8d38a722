"""What a person sees while a stage runs: transformers' bars, and one short line per log entry."""

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer


class StageProgress(ProgressCallback):
    """transformers' progress bars, with log lines that hold what matters, rounded."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        line = log_line(logs or {})
        if line and state.is_world_process_zero:
            tqdm.write(f"{self.name} {state.global_step:>6}  {line}", file=sys.stderr)


def show_progress(trainer: Trainer, name: str) -> None:
    """Replace the trainer's own progress output."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(StageProgress(name))


def told(checkpoint: str | None) -> str | None:
    """Say from which checkpoint a stage goes on, if from any."""
    if checkpoint is not None:
        tqdm.write(f"Going on from {checkpoint}.", file=sys.stderr)
    return checkpoint


def log_line(logs: dict[str, float]) -> str:
    """`loss 1.234  h1 1.200  h2 2.340 ...`; empty where the entry holds no loss."""
    names = [name for name in logs if name == "loss" or (name.endswith("_loss") and name != "train_loss")]
    shown = {name: name if name == "eval_loss" else name.removesuffix("_loss") for name in names}
    return "  ".join(f"{shown[name]} {logs[name]:.3f}" for name in names)
