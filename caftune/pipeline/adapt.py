"""`adapt`: the heads are trained once more, on the task's own data, before stage 2."""

from pathlib import Path
from typing import Any

from caftune.checkpoints.heads_folder import file_name
from caftune.errors import CaftuneError
from caftune.pipeline.base_model import free_memory
from caftune.pipeline.folder import Stage, last_checkpoint
from caftune.pipeline.run import Run
from caftune.pipeline.schema import Recipe
from caftune.pipeline.stage_config import adapt_config, inherited_options, refuse_evaluation_without_rows
from caftune.pipeline.stage_trainer import command_line, evaluated, stage_trainer, task_sets
from caftune.training.progress import run as run_training
from caftune.training.progress import show_progress


def adapt_heads(recipe: Recipe) -> Path:
    """Train the heads for an epoch on the task's data. Returns their folder.

    Raises:
        CaftuneError: the recipe has no `adapt`; or under DeepSpeed, which trains one model a process.
    """
    return adapt_heads_of(Run.open(recipe))


def adapt_heads_of(run: Run) -> Path:
    """`adapt_heads` in an open run."""
    options = inherited_options(run.recipe.adapt, run.recipe.trainer)
    recipe = run.recipe.model_copy(update={"adapt": options})
    base, data, source, target = run.base, recipe.data, run.heads, run.folder.adapted_heads
    refuse_evaluation_without_rows(recipe)
    args = adapt_config(recipe, base, target.parent, source.folder)
    files = {"train": data.train, "eval": data.eval, "heads": source.file}
    Stage(recipe, "adapt", files).open()  # with another length it counts as unfinished
    if (target / "heads.json").is_file() and run.folder.is_done("adapt"):
        return target
    if args.deepspeed_plugin is not None:
        raise CaftuneError(
            "adapt cannot run under DeepSpeed. Run `caftune adapt-heads` first, without it or with FSDP2."
        )
    tokenizer = base.tokenizer()
    rows, evaluation, dropped = task_sets(data, base, tokenizer, args, run.prepared)
    trainer = stage_trainer(base, args, tokenizer, rows, evaluation)
    show_progress(trainer, "adapt")
    run_training(trainer, checkpoint=last_checkpoint(target.parent))
    about: dict[str, Any] = {"data": {"task": file_name(str(data.train)), "rows": len(rows or ())}}
    trainer.export(target, about={"command": command_line(), **about, "adapted_from": source.sha256})
    metrics = evaluated(trainer) if evaluation is not None else {}
    run.folder.record({"stage": "adapt", "rows": len(rows or ()), "metrics": metrics, **dropped})
    del trainer
    free_memory()  # a trainer is part of cycles, and would keep its base in memory next to stage 2's
    return target
