"""What the stages make of a recipe, in one call: options, rows, and the base's parts."""

from pathlib import Path
from typing import Any

from caftune.pipeline import stage_config, stage_rows
from caftune.pipeline.base_model import BaseModel
from caftune.pipeline.run import Run
from caftune.pipeline.schema import Recipe


def base_of(recipe: Recipe) -> BaseModel:
    return BaseModel.of(recipe.model)


def load_config(recipe: Recipe) -> Any:
    return base_of(recipe).config


def load_tokenizer(recipe: Recipe) -> Any:
    return base_of(recipe).tokenizer()


def load_model(recipe: Recipe, name: str | None = None) -> Any:
    base = base_of(recipe)
    return (base if name is None else base.other(name)).load()


def stage_one_config(recipe: Recipe, folder: Path) -> Any:
    return stage_config.stage_one_config(recipe, base_of(recipe), folder)


def adapt_config(recipe: Recipe, folder: Path, heads: Path) -> Any:
    return stage_config.adapt_config(recipe, base_of(recipe), folder, heads)


def stage_two_config(recipe: Recipe, folder: Path) -> Any:
    run = Run.open(recipe)
    return stage_config.stage_two_config(recipe, run.base, folder, run.stage_two_heads)


def head_rows(recipe: Recipe, args: Any) -> stage_rows.HeadRows:
    return stage_rows.head_rows(recipe, base_of(recipe), args)


def task_rows(recipe: Recipe, name: str, tokenizer: Any, args: Any) -> Any:
    return stage_rows.task_rows(recipe.data, name, base_of(recipe), tokenizer, args)
