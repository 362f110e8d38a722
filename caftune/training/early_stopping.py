"""Early stopping, for runs that resume."""

from typing import Any

from transformers import EarlyStoppingCallback


class StopEarly(EarlyStoppingCallback):
    """transformers' early stopping; a resumed run stops where the uninterrupted one does.

    transformers 5.23 forgets the evaluations before a checkpoint (unless `restore_callback_states_from_checkpoint`, which takes
    the checkpoint's patience too), trains a run that had stopped for another epoch, and cannot save a checkpoint where that
    which it resumed from has no early stopping.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Continue to count where the checkpoint's run was, and stop if it had stopped."""
        super().on_train_begin(args, state, control, **kwargs)
        name = type(self).__name__
        kept = state.stateful_callbacks.get(name) if state.global_step > 0 else None
        self.early_stopping_patience_counter = kept["attributes"]["early_stopping_patience_counter"] if kept else 0
        state.stateful_callbacks[name] = self.state()
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True
        self._begins_at = state.global_step

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Count an evaluation, but not that of `eval_on_start`, which a resumed run makes at the checkpoint once more."""
        if state.global_step > self._begins_at or state.global_step == 0:
            super().on_evaluate(args, state, control, **kwargs)
