"""Stage 1: the heads are pretrained on the base's own answers (or a text), and measured on those held out."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import Dataset

from caftune.checkpoints.heads_folder import PICTURE_FILE, QUALITY_FILE, load_heads
from caftune.core.backbone import Backbone
from caftune.errors import CaftuneError
from caftune.files import write_json
from caftune.generation.backends import end_tokens
from caftune.pipeline.base_model import BaseModel, free_memory
from caftune.pipeline.folder import Stage, is_main_process, last_checkpoint
from caftune.pipeline.head_quality import measure_heads
from caftune.pipeline.heads_choice import HeadsRef
from caftune.pipeline.run import Run
from caftune.pipeline.schema import Recipe
from caftune.pipeline.stage_config import stage_one_config
from caftune.pipeline.stage_rows import head_rows
from caftune.pipeline.stage_trainer import command_line, evaluated, stage_trainer
from caftune.training.progress import run as run_training
from caftune.training.progress import show_progress

_MEASURED_ROWS = 256


def pretrain_heads(recipe: Recipe) -> Path:
    """Stage 1: train the heads, on the labels or on heads.text. Returns the heads folder."""
    if recipe.heads.path is not None:
        raise CaftuneError(
            f"heads.path names finished heads ({recipe.heads.path}), which `caftune train` uses as they are. "
            "Remove heads.path to pretrain new ones."
        )
    run = Run.open(recipe)
    recipe, base, heads = run.recipe, run.base, run.folder.heads
    args = stage_one_config(recipe, base, run.folder.path / "pretrain")
    rows, held_out, dropped, about = head_rows(recipe, base, args)
    folder = Stage(recipe, "pretrain", {"labels": recipe.head_source}).open()
    trainer = stage_trainer(base, args, base.tokenizer(), rows, held_out)
    show_progress(trainer, "pretrain-heads")
    run_training(trainer, checkpoint=last_checkpoint(folder))
    if is_main_process():
        for file in (QUALITY_FILE, PICTURE_FILE):  # of heads that were here before
            (heads / file).unlink(missing_ok=True)
    trainer.export(heads, about={"command": command_line(), "data": about})
    metrics = evaluated(trainer)
    result = {"stage": "pretrain-heads", "rows": len(rows), "metrics": metrics, **dropped}
    run.folder.record(result)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        del trainer  # the base is loaded again, as users of the heads will have it
        free_memory()
        quality = _measure(base, HeadsRef.find(heads), held_out, heads, seed=recipe.seed, force=recipe.heads.force)
        run.folder.record({**result, "quality": quality})
    return heads


def measure_quality(recipe: Recipe) -> dict[str, Any]:
    """Measure the recipe's heads on its held-out labels. Writes quality.json (and a picture, with matplotlib) to their folder.

    Heads of heads.path keep their folder as it is: their report goes to the run folder.
    """
    run = Run.open(recipe)
    recipe, heads = run.recipe, run.heads
    args = stage_one_config(recipe, run.base, run.folder.path / "pretrain")
    held_out = head_rows(recipe, run.base, args).held_out
    if recipe.heads.path is None:  # what is held out must be what was
        Stage(recipe, "pretrain", {"labels": recipe.head_source}).refuse_other()
    target = heads.folder if recipe.heads.path is None else run.folder.path
    return _measure(run.base, heads, held_out, target, seed=recipe.seed, force=recipe.heads.force)


def _measure(
    base: BaseModel, heads: HeadsRef, held_out: Dataset, target: Path, *, seed: int, force: bool
) -> dict[str, Any]:
    """Measure heads on the held-out rows, and write quality.json into `target`."""
    model, tokenizer = base.load(), base.tokenizer()
    backbone = Backbone.of(model)
    found = load_heads(heads.folder, backbone, tokenizer, force=force)
    rows = held_out.select(range(min(_MEASURED_ROWS, len(held_out))))
    quality = measure_heads(backbone, found, rows, eos=end_tokens(model.generation_config, tokenizer), seed=seed)
    quality["weights_sha256"] = heads.sha256
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / QUALITY_FILE, quality)
    with suppress(ImportError):
        from caftune.checkpoints.quality_card import plot_quality

        plot_quality(quality, target / PICTURE_FILE)
    return quality
