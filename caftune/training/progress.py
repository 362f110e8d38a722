"""Running a stage: its progress output, resuming it, and stopping it on SIGTERM."""

import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from caftune.training._compat import evaluation_leaves_rng, use_current_cadence
from caftune.training.divergence import StopOnDivergence
from caftune.training.resumption import refuse_missing_optimizer_state, too_short_error


class StopOnSigterm(TrainerCallback):
    """On SIGTERM, which schedulers send before they kill: finish the step, write a checkpoint, stop.

    All processes stop at the same step, whichever received the signal. Not transformers' `enable_jit_checkpoint`: it (5.23)
    saves before the optimizer step, after the batch has been drawn, and waits three seconds.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._signalled = False
        self._before: Any = None
        self.stopped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            self._before = signal.signal(signal.SIGTERM, self._on_signal)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._signalled:
            self._trainer.accelerator.set_trigger()
        if self._trainer.accelerator.check_trigger():
            self.stopped = control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Restore the earlier handler."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _on_signal(self, *_: Any) -> None:
        self._signalled = True


class ResumeCallback(TrainerCallback):
    """Resume from a checkpoint with the current options.

    Refuses a checkpoint without the optimizer's state, where transformers restarts optimizer and learning rate silently.
    """

    def __init__(self, checkpoint: str) -> None:
        self._checkpoint = Path(checkpoint)
        self._before = json.loads((self._checkpoint / "trainer_state.json").read_text(encoding="utf-8"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        use_current_cadence(args, state)
        best = self._checkpoint.with_name(Path(self._before.get("best_model_checkpoint") or "none").name)
        if best.is_dir():  # transformers looks for it where the folder was before it was moved
            state.best_model_checkpoint = str(best)
        if state.global_step > state.max_steps:
            raise too_short_error(self._checkpoint, state.global_step, state.max_steps)
        if state.global_step < state.max_steps and not control.should_training_stop:  # early stopping has ended it
            refuse_missing_optimizer_state(self._checkpoint)
        ended = self._before["max_steps"]
        if state.max_steps != ended and state.is_world_process_zero:
            text = f"The training ends at step {state.max_steps} instead of {ended}, {_length_note(args)}."
            tqdm.write(text, file=sys.stderr)


def _length_note(args: Any) -> str:
    """Whether the result equals that of a run that had this length from the start."""
    dependent = depends_on_length(args)
    if not dependent:
        return "with the result of a run of that length from the start"
    return (
        f"with another result than a run of that length from the start: {' and '.join(dependent)} depend on the length, and "
        "the steps so far used the one before"
    )


def depends_on_length(args: Any) -> list[str]:
    """The options that make a step depend on the total number of steps."""
    found = []
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if kind not in ("constant", "constant_with_warmup", "inverse_sqrt"):
        found.append(f"lr_scheduler_type={kind}")
    if 0 < args.warmup_steps < 1:
        found.append(f"warmup_steps={args.warmup_steps}")
    if getattr(args, "aux_weight", 0) and args.aux_schedule != "constant" and not args.pretrain_heads:
        found.append(f"loss.schedule={args.aux_schedule}")
    return found


class StageProgress(ProgressCallback):
    """transformers' progress bars, with short log lines: losses, rounded."""

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


def run(trainer: Trainer, *, checkpoint: str | None) -> None:
    """Train, from `checkpoint` if it is given.

    Raises:
        CaftuneError: the checkpoint has no optimizer state (`save_only_model`) and steps remain; or training would
            end before the checkpoint's step.
        DivergedError: weights or losses became NaN or infinite; CaftuneError where the initial weights are.
        SystemExit: SIGTERM was received; the checkpoint is written.
    """
    if checkpoint is not None:
        trainer.add_callback(ResumeCallback(checkpoint))
        if trainer.is_world_process_zero():
            tqdm.write(f"Resuming from {checkpoint}.", file=sys.stderr)
    stop = StopOnSigterm(trainer)
    trainer.add_callback(stop)
    trainer.add_callback(StopOnDivergence(trainer))
    try:
        with evaluation_leaves_rng(trainer):
            trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        stop.restore()
        _close_bars(trainer)
    state = trainer.state
    is_early = state.global_step < state.max_steps and not stop.stopped
    if is_early and state.best_global_step and state.is_world_process_zero:
        tqdm.write(
            f"Stopped early after step {state.global_step} of {state.max_steps}: the best evaluation is that of step "
            f"{state.best_global_step}, whose weights are used.",
            file=sys.stderr,
        )
    if stop.stopped:
        resumes = "" if trainer.args.save_only_model else " The same command resumes from there."
        tqdm.write(
            f"Stopped by SIGTERM after step {trainer.state.global_step}, with a checkpoint in {trainer.args.output_dir}."
            + resumes,
            file=sys.stderr,
        )
        raise SystemExit(128 + signal.SIGTERM)


def _close_bars(trainer: Trainer) -> None:
    """Close bars that an error left open, so that its message starts on a new line."""
    for callback in trainer.callback_handler.callbacks:
        for bar in (getattr(callback, "prediction_bar", None), getattr(callback, "training_bar", None)):
            if bar is not None:
                bar.close()


def log_line(logs: dict[str, float]) -> str:
    """`loss 1.234  h1 1.200  h2 2.340 ...`; empty where the entry holds no loss."""
    names = [name for name in logs if name == "loss" or (name.endswith("_loss") and name != "train_loss")]
    shown = {name: name if name == "eval_loss" else name.removesuffix("_loss") for name in names}
    return "  ".join(f"{shown[name]} {logs[name]:.3f}" for name in names)
