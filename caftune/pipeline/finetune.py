"""Stage 2: concept-aware fine-tuning, and its result as an ordinary model. `export` writes one from a checkpoint."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from caftune.checkpoints.cards import write_model_card
from caftune.checkpoints.export import export_saved, load_trained, refuse_tied_adapters
from caftune.checkpoints.heads_folder import read_heads, save_heads
from caftune.core.backbone import Backbone
from caftune.core.finite import refuse_not_finite
from caftune.core.heads import AuxiliaryHeads, HeadsConfig
from caftune.errors import CaftuneError
from caftune.pipeline.adapt import adapt_heads_of
from caftune.pipeline.base_model import BaseModel
from caftune.pipeline.folder import RunFolder, is_main_process, last_checkpoint, whole_checkpoint
from caftune.pipeline.heads_choice import HeadsRef
from caftune.pipeline.lm_eval_tasks import read_harness_tasks
from caftune.pipeline.plan import plan_of_run
from caftune.pipeline.run import Run
from caftune.pipeline.schema import ModelSection, Recipe
from caftune.pipeline.stage_config import (
    lora_config,
    quantization,
    refuse_evaluation_without_rows,
    refuse_quantised_base,
    stage_two_config,
)
from caftune.pipeline.stage_trainer import command_line, evaluated, stage_trainer, task_sets
from caftune.training.config import CAFTConfig
from caftune.training.divergence import DivergedError
from caftune.training.measured_cost import Costs, memory_bytes
from caftune.training.progress import run as run_training
from caftune.training.progress import show_progress
from caftune.training.trained_heads import merged_state, training_record
from caftune.training.trainer import CAFTTrainer


def finetune_model(recipe: Recipe) -> Path:
    """Stage 2: concept-aware fine-tuning, then export. Returns the model folder."""
    run = Run.open(recipe)
    recipe, base = run.recipe, run.base
    tokenizer = base.tokenizer()
    if recipe.data.train is None:
        raise CaftuneError("data.train must name a file or hub id, got nothing. Add it to the recipe.")
    refuse_evaluation_without_rows(recipe)
    read_harness_tasks(recipe.eval)  # what cannot be evaluated is refused before it is trained
    stage = run.train_stage()
    args = stage_two_config(recipe, base, stage.folder, run.stage_two_heads)
    adapter, rounding = lora_config(recipe.model), quantization(recipe.model, base)
    if recipe.adapt is not None and recipe.loss.weight > 0:
        if run.folder.is_begun("train") and Path(str(args.heads), "heads.json").is_file():
            stage.refuse_other(may_resume=True)  # before adapt trains these heads further
        adapt_heads_of(run)
        # again: accelerate's state is the last trainer's
        args = stage_two_config(recipe, base, stage.folder, run.stage_two_heads)
    if run.folder.is_begun("train"):
        stage.refuse_other(may_resume=True)  # before the data are prepared
    train, evaluation, dropped = task_sets(recipe.data, base, tokenizer, args, run.prepared)
    stage.open()
    held = memory_bytes()
    trainer = stage_trainer(base, args, tokenizer, train, evaluation, peft_config=adapter, quantization_config=rounding)
    if recipe.model.tuning != "full" and recipe.model.lora.merge:
        refuse_tied_adapters(trainer.model)
    costs = _trained(trainer, stage.folder, train)
    native = trainer.export(run.folder.model, merged=recipe.model.lora.merge)
    if recipe.heads.keep and trainer.heads is not None:
        best = trainer.state.best_global_step if args.load_best_model_at_end else None
        steps = best or trainer.state.global_step
        _keep_heads(run.folder, trainer.heads.config, merged_state(trainer.heads), args, steps)
    metrics = evaluated(trainer) if evaluation is not None else {}  # last: bf16_full_eval rounds the weights
    copied = {"native_multi_token_modules": f"{len(native)} tensors, copied from the base unchanged"} if native else {}
    planned = _plan(lambda: plan_of_run(recipe, base, args, train))
    run.folder.record(
        {"stage": "train", "rows": len(train or ()), "metrics": metrics, **copied, **dropped}
        | {"costs": {**costs, "memory_before_bytes": held}, "plan": planned}
        | {"log": trainer.state.log_history}
    )
    return run.folder.model


def _trained(trainer: CAFTTrainer, folder: Path, rows: Any) -> dict[str, Any]:
    """Train, from the last checkpoint in `folder` if there is one. Returns the costs."""
    show_progress(trainer, "train")
    with Costs(trainer) as costs:
        try:
            run_training(trainer, checkpoint=last_checkpoint(folder))
        except DivergedError as error:
            error.result = {"rows": len(rows or ()), "costs": costs.total(), "log": trainer.state.log_history}
            raise
    return costs.total()


def _keep_heads(
    folder: RunFolder, config: HeadsConfig, state: Mapping[str, Tensor], args: CAFTConfig, steps: int
) -> None:
    """Write heads as those of the exported model, for which they can draft."""
    if is_main_process():
        refuse_not_finite(
            state, "The heads to keep", "Train them with a lower heads.learning_rate, or set heads.keep=false."
        )
        model, target, trust = str(folder.model), folder.path / "model-heads", args.trust_remote_code
        backbone = Backbone.of(load_trained(model, model, trust_remote_code=trust))
        heads = AuxiliaryHeads.build(backbone, config)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust)
        about = {**training_record(args, steps), "command": command_line()}
        save_heads(target, heads, backbone, tokenizer, training=about, state=state)
        tqdm.write(f"Heads that draft for it: {target} (caftune generate {model} {target} PROMPT)", file=sys.stderr)


def _plan(planned: Callable[[], dict[str, float]]) -> dict[str, float] | None:
    """The plan of this run, to be shown next to its costs. It is made when the run ends, so that nothing waits for it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return None  # plan and FLOPs are those of one process
    try:
        return planned()
    except Exception as error:  # the run is done and must be recorded, whatever its plan raises
        tqdm.write(f"This run has no plan next to its costs: {error}", file=sys.stderr)
        return None


def export_checkpoint(recipe: Recipe, checkpoint: str | None = None) -> Path:
    """Write a checkpoint of stage 2 (by default the one `train` would) as an ordinary model. Returns its folder."""
    run = Run.open(recipe)
    recipe, base, folder = run.recipe, run.base, run.folder.path / "train"
    source = whole_checkpoint(folder, checkpoint, best=bool(recipe.trainer.get("load_best_model_at_end")))
    stage = run.train_stage()
    stage.refuse_other()
    _write_model(recipe.model, base, source, run.folder.model, recipe.trainer.get("chat_template_path"))
    steps = int(Path(source).name.rpartition("-")[2])
    heads = HeadsRef.find(run.stage_two_heads) if run.stage_two_heads is not None else None
    args = stage_two_config(recipe, base, folder, heads.folder if heads else None)
    if recipe.heads.keep and heads is not None:
        own = Path(source, "heads")
        _keep_heads(run.folder, heads.config, read_heads(own if own.is_dir() else heads.folder), args, steps)
    write_model_card(run.folder.model, base.name, args, steps, heads=heads.description if heads else None)
    run.folder.record({"stage": "export", "checkpoint": Path(source).name})
    return run.folder.model


def _write_model(section: ModelSection, base: BaseModel, source: str, target: Path, template: str | None) -> None:
    """A checkpoint as `train` writes its result: a whole model, or the adapter alone where the recipe says so.

    Args:
        template: trainer.chat_template_path.
    """
    merged = section.tuning == "full" or section.lora.merge
    refuse_quantised_base(base, merge=merged)
    has_own = Path(source, "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(source, **base.other(source).where) if has_own else base.tokenizer()
    # SFTTrainer leaves as many rows as tokens where it takes the template of another tokenizer (TRL 1.16).
    is_resized = template and not template.endswith((".jinja", ".j2"))
    opened = base if Path(source, "adapter_config.json").is_file() else base.other(source)
    export_saved(
        source,
        target,
        tokenizer,
        base_name=base.name,
        base_revision=base.revision,
        merged=merged,
        vocab_size=len(tokenizer) if is_resized else None,
        trust_remote_code=base.trust_remote_code,
        opening=opened.opening(),
    )
