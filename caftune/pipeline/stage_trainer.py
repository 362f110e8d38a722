"""What the stages that train share: their rows, their trainer, and what is recorded of them."""

import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from caftune.pipeline.base_model import BaseModel
from caftune.pipeline.schema import DataSection
from caftune.pipeline.stage_rows import task_rows
from caftune.training.config import CAFTConfig
from caftune.training.prepare import Prepared
from caftune.training.trainer import CAFTTrainer


class TaskSets(NamedTuple):
    """The rows of data.train and data.eval (None where none are named), and the entry of results.jsonl for rows left out."""

    train: Dataset | None
    evaluation: Dataset | None
    dropped: dict[str, Any]


def task_sets(
    section: DataSection, base: BaseModel, tokenizer: Any, args: CAFTConfig, kept: dict[Any, Prepared]
) -> TaskSets:
    """The task's rows, prepared for training; `kept` are those prepared before in this run: see `task_rows`."""
    train, evaluation = (task_rows(section, name, base, tokenizer, args, kept=kept) for name in ("train", "eval"))
    found = {"train": train, "eval": evaluation}
    dropped = {name: part.facts for name, part in found.items() if part and part.dropped}
    return TaskSets(train and train.rows, evaluation and evaluation.rows, {"dropped": dropped} if dropped else {})


def stage_trainer(
    base: BaseModel, args: CAFTConfig, tokenizer: Any, train: Any, evaluation: Any, **adaptation: Any
) -> CAFTTrainer:
    """The trainer of a stage on prepared rows; `adaptation` are the configurations of an adapter and of quantization."""
    if args.padding_free and not args.packing:
        args.max_length = None  # the rows are cut already, and TRL takes padding_free only without it
    with base.opening():
        return CAFTTrainer(
            base.name,
            args,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            **adaptation,
        )


def evaluated(trainer: CAFTTrainer) -> dict[str, float]:
    """The losses and accuracies of an evaluation, without timings."""
    metrics = trainer.evaluate()
    entry = next(entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry)
    names = [name for name in {**metrics, **entry} if name.endswith(("_loss", "_accuracy"))]
    return {name.removeprefix("eval_"): {**metrics, **entry}[name] for name in names}


def command_line() -> str:
    """The command, without the program's folder and without addresses of servers, which may hold keys."""
    words = [word for word in sys.argv[1:] if not word.startswith("labels.server.")]
    return shlex.join([Path(sys.argv[0]).name, *words])
