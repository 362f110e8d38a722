"""The stages of a run, each read top to bottom: label, pretrain_heads, finetune, export; and preview.

    output/
      labels/    labels.jsonl                        the base's own answers
      pretrain/  checkpoints of stage 1
      heads/     heads.safetensors, heads.json
      train/     checkpoints of stage 2 (ordinary ones)
      model/     the result: an ordinary checkpoint
      results.jsonl                                  one line per finished stage

Each stage folder holds the `recipe.yaml` sections it depends on and a `provenance.json`. The same command on the same
recipe goes on where it stopped; on another recipe it refuses.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from caftune.checkpoint import export_model, provenance, write_json
from caftune.config import CAFTConfig
from caftune.data import DataError, load_rows
from caftune.labels import (
    Sampling,
    encode_prompts,
    generate_labels,
    label_dataset,
    read_labels,
    refuse_long_prompts,
    refuse_messages_without_template,
)
from caftune.objective import IGNORED, horizon_targets
from caftune.progress import show_progress
from caftune.recipe import Recipe, RecipeError, first_difference, save_recipe, trainer_config
from caftune.trainer import CAFTTrainer, tokenized

_DEFAULT_LENGTH = 1024


def label(recipe: Recipe) -> Path:
    """The base model answers the prompts. Returns the labels file."""
    if recipe.labels.prompts is None:
        raise RecipeError("labels.prompts must name a file or hub id with prompts, got nothing. Add it to the recipe.")
    tokenizer = load_tokenizer(recipe)
    rows = load_rows(
        recipe.labels.prompts,
        recipe.labels.columns,
        limit=recipe.labels.limit,
        chat=bool(getattr(tokenizer, "chat_template", None)),
    )
    prompts = encode_prompts(rows, tokenizer)
    room = (context_length(recipe) or sys.maxsize) - recipe.labels.max_new_tokens
    if not recipe.labels.skip_long_prompts:
        refuse_long_prompts(prompts, room)
    asked = {row: prompt for row, prompt in enumerate(prompts) if len(prompt) <= room}
    folder = open_stage(recipe, "labels", {"prompts": recipe.labels.prompts})
    settings = recipe.labels.model_dump(include={field.name for field in fields(Sampling)})
    path = folder / "labels.jsonl"
    generate_labels(load_model(recipe), tokenizer, asked, path, Sampling(**settings, seed=recipe.seed))
    answers = read_labels(path)
    finished = sum(answer.finish == "stop" for answer in answers)
    record(
        recipe,
        {
            "stage": "label",
            "rows": len(answers),
            "left_out": len(prompts) - len(asked),
            "finished_by_the_model": finished,
        },
    )
    return path


def pretrain_heads(recipe: Recipe) -> Path:
    """Stage 1: train the heads on the labels. Returns the heads folder."""
    labels = Path(recipe.output, "labels", "labels.jsonl")
    if not labels.is_file():
        raise RecipeError(f"{labels} is missing. Run `caftune label` first.")
    rows = label_dataset(read_labels(labels))
    held_out = max(1, round(len(rows) * recipe.heads.held_out))
    if held_out >= len(rows):
        raise DataError(
            f"{labels} has {len(rows)} rows, too few to train on some and evaluate on others. Label more prompts."
        )
    split = rows.train_test_split(test_size=held_out, seed=recipe.seed)
    folder = open_stage(recipe, "pretrain", {"labels": str(labels)})
    heads = Path(recipe.output, "heads")
    args = stage_one_config(recipe, folder)
    trainer = CAFTTrainer(
        recipe.model.name,
        args,
        train_dataset=split["train"],
        eval_dataset=split["test"],
        processing_class=load_tokenizer(recipe),
    )
    show_progress(trainer, "pretrain-heads")
    before = evaluated(trainer)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    after = evaluated(trainer)
    trainer.export(heads)
    record(recipe, {"stage": "pretrain-heads", "rows": len(split["train"]), "before": before, "after": after})
    return heads


def finetune(recipe: Recipe) -> Path:
    """Stage 2: concept-aware fine-tuning, then export. Returns the model folder."""
    tokenizer = load_tokenizer(recipe)
    args = stage_two_config(recipe, Path(recipe.output, "train"))
    files = {"train": recipe.data.train, "eval": recipe.data.eval}
    train, evaluation = (task_data(recipe, name, tokenizer, args) for name in files)
    if train is None:
        raise RecipeError("data.train must name a file or hub id, got nothing. Add it to the recipe.")
    folder = open_stage(recipe, "train", {name: path for name, path in files.items() if path})
    trainer = CAFTTrainer(
        recipe.model.name,
        args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=lora_config(recipe),
    )
    show_progress(trainer, "train")
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    metrics = evaluated(trainer) if evaluation is not None else {}
    model = Path(recipe.output, "model")
    trainer.export(model)
    record(recipe, {"stage": "train", "rows": len(train), "metrics": metrics, "log": trainer.state.log_history})
    return model


def export(recipe: Recipe, checkpoint: str | None = None) -> Path:
    """Write a checkpoint of stage 2 (the last one by default) as an ordinary model. Returns its folder."""
    folder = Path(recipe.output, "train")
    source = checkpoint or (get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    if source is None or not Path(source).is_dir():
        raise RecipeError(
            f"{checkpoint or folder} holds no checkpoint. Run `caftune train` first, or name another one."
        )
    if recipe.model.tuning == "lora":
        from peft import PeftModel

        model: Any = PeftModel.from_pretrained(load_model(recipe), source)
    else:
        model = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    target = Path(recipe.output, "model")
    export_model(model, target, load_tokenizer(recipe), base_name=recipe.model.name)
    return target


def preview(recipe: Recipe, count: int = 3) -> Iterator[tuple[list[str], list[bool], dict[int, list[str]]]]:
    """For the first rows of data.train: the tokens, which of them are trained on, and each horizon's target per position."""
    tokenizer = load_tokenizer(recipe)
    args = stage_two_config(recipe, Path(recipe.output, "train"), heads=None, aux_weight=0.0)
    rows = task_data(recipe, "train", tokenizer, args, limit=count)
    if rows is None:
        raise RecipeError("data.train must name a file or hub id, got nothing. Add it to the recipe.")
    horizons = range(1, recipe.heads.count + 2)
    for row in rows.with_format("torch"):
        labels = row["labels"][None]
        targets = {h: horizon_targets(labels, h)[0].tolist() for h in horizons}
        yield (
            tokenizer.convert_ids_to_tokens(row["input_ids"].tolist()),
            [token != IGNORED for token in row["labels"].tolist()],
            {h: [tokenizer.convert_ids_to_tokens(t) if t != IGNORED else "" for t in targets[h]] for h in horizons},
        )


def stage_one_config(recipe: Recipe, folder: Path) -> CAFTConfig:
    """CAFTConfig of stage 1."""
    return trainer_config(
        recipe,
        "pretrain",
        output_dir=str(folder),
        pretrain_heads=True,
        heads=recipe.heads.path,
        force_heads=recipe.heads.force,
        num_heads=recipe.heads.count,
        head_kind=recipe.heads.kind,
        aux_decay=recipe.loss.decay,
        max_length=None,
    )


def stage_two_config(recipe: Recipe, folder: Path, **ours: Any) -> CAFTConfig:
    """CAFTConfig of stage 2."""
    loss = recipe.loss
    heads = recipe.heads.path or str(Path(recipe.output, "heads"))
    if loss.weight > 0 and "heads" not in ours and recipe.heads.path is None and not Path(heads).is_dir():
        raise RecipeError(
            f"{heads} is missing. Run `caftune pretrain-heads` first, name other heads in heads.path, or set loss.weight=0."
        )
    context = context_length(recipe)
    length = recipe.data.max_length or min(_DEFAULT_LENGTH, context or _DEFAULT_LENGTH)
    if context is not None and length > context:
        raise RecipeError(f"data.max_length must be at most the model's context of {context} tokens, got {length}.")
    chosen = {
        "heads": heads if loss.weight > 0 else None,
        "force_heads": recipe.heads.force,
        "train_heads": recipe.heads.train,
        "aux_weight": loss.weight,
        "aux_decay": loss.decay,
        "aux_schedule": loss.schedule,
        "max_length": length,
        "output_dir": str(folder),
    }
    return trainer_config(recipe, "trainer", **{**chosen, **ours})


def task_data(
    recipe: Recipe, name: str, tokenizer: Any, args: CAFTConfig, *, limit: int | None = None
) -> Dataset | None:
    """data.train or data.eval, tokenized as the trainer will; None where the recipe names none."""
    source = getattr(recipe.data, name)
    if source is None:
        return None
    chat = bool(getattr(tokenizer, "chat_template", None))
    rows = load_rows(source, recipe.data.columns, limit=limit or recipe.data.limit, chat=chat)
    if "messages" in rows.column_names:
        refuse_messages_without_template(tokenizer)
    if rows.column_names == ["prompt"]:
        raise DataError(
            f"data.{name} has prompts and no completions to train on. Name the answers' column in data.columns."
        )
    return tokenized(rows, tokenizer, args, name=name)


def load_tokenizer(recipe: Recipe) -> Any:
    """The base's tokenizer."""
    _refuse_missing_model(recipe)
    return AutoTokenizer.from_pretrained(recipe.model.name, revision=recipe.model.revision or "main")


def load_model(recipe: Recipe) -> Any:
    """The base model, in the dtype it was published in, on the GPU where there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    revision = recipe.model.revision or "main"
    model: Any = AutoModelForCausalLM.from_pretrained(recipe.model.name, dtype="auto", revision=revision)
    return model.to(device).eval()


def context_length(recipe: Recipe) -> int | None:
    """The base's context in tokens, None where its configuration names none."""
    config = AutoConfig.from_pretrained(recipe.model.name, revision=recipe.model.revision or "main")
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def lora_config(recipe: Recipe) -> Any:
    """The recipe's LoraConfig, None for full fine-tuning."""
    if recipe.model.tuning == "full":
        return None
    from peft import LoraConfig

    lora = recipe.model.lora
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


# The sections of the recipe that each stage's result depends on.
_DEPENDS_ON: dict[str, Sequence[str]] = {
    "labels": ("seed", "model.name", "model.revision", "labels"),
    "pretrain": ("seed", "model.name", "model.revision", "labels", "heads", "loss.decay", "pretrain"),
    "train": ("seed", "model", "heads", "loss", "data", "trainer"),
}


def open_stage(recipe: Recipe, stage: str, files: Mapping[str, str | None]) -> Path:
    """The folder of a stage, made ready: it is new, or it belongs to this very recipe.

    Raises:
        RecipeError: the folder holds a stage of another recipe, or files that are not caftune's.
    """
    folder = Path(recipe.output, stage)
    everything = recipe.model_dump()
    mine = {key: _at(everything, key) for key in _DEPENDS_ON[stage]}
    kept = folder / "recipe.yaml"
    if kept.is_file():
        difference = first_difference(yaml.safe_load(kept.read_text(encoding="utf-8")), mine)
        if difference:
            raise RecipeError(
                f"{folder} holds the {stage} stage of another recipe ({difference}). Use another output, or remove {folder}."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"{folder} holds files of something else than caftune. Use another output.")
    folder.mkdir(parents=True, exist_ok=True)
    save_recipe(kept, mine)
    write_json(folder / "provenance.json", provenance({name: path for name, path in files.items() if path}))
    return folder


def record(recipe: Recipe, result: Mapping[str, Any]) -> None:
    """Append a line to results.jsonl."""
    with Path(recipe.output, "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def evaluated(trainer: CAFTTrainer) -> dict[str, float]:
    """The losses and accuracies of an evaluation, without timings."""
    metrics = trainer.evaluate()
    entry = next(entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry)
    names = [name for name in {**metrics, **entry} if name.endswith(("_loss", "_accuracy"))]
    return {name.removeprefix("eval_"): {**metrics, **entry}[name] for name in names}


def _at(values: Mapping[str, Any], place: str) -> Any:
    for key in place.split("."):
        values = values[key]
    return values


def _refuse_missing_model(recipe: Recipe) -> None:
    name = recipe.model.name
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name, "config.json").is_file():
        raise RecipeError(f"model.name must be a folder with a config.json or a hub id, and {name} is no such folder.")
