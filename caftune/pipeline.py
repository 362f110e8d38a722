"""The stages of a run, each read top to bottom: label, pretrain_heads, finetune, export; and preview.

    output/
      labels/    labels.jsonl                        the base's own answers
      pretrain/  checkpoints of stage 1
      heads/     heads.safetensors, heads.json
      train/     checkpoints of stage 2 (ordinary ones)
      model/     the result: an ordinary checkpoint
      results.jsonl                                  one line per finished stage

What keeps two runs apart is in run_folder.py.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM

from caftune.checkpoint import describe_heads, write_json
from caftune.config import CAFTConfig
from caftune.data import DataError, load_rows
from caftune.export import export_model, load_trained, refuse_tied_adapters
from caftune.labels import (
    Sampling,
    encode_prompts,
    generate_labels,
    is_chat,
    label_dataset,
    read_labels,
    refuse_long_prompts,
    refuse_messages_without_template,
)
from caftune.objective import IGNORED, horizon_targets
from caftune.progress import run, show_progress
from caftune.recipe import Recipe, RecipeError
from caftune.run_folder import is_begun, last_checkpoint, open_stage, record, refuse_other_stage
from caftune.stage_options import (
    context_length,
    load_tokenizer,
    lora_config,
    quantization,
    stage_one_config,
    stage_two_config,
)
from caftune.tokenization import tokenized
from caftune.trainer import CAFTTrainer

_EXPECTED = "expected.json"  # in the labels folder: how many rows there will be


def label(recipe: Recipe) -> Path:
    """The base model answers the prompts. Returns the labels file."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("caftune label must run in one process, got several. Start it without a launcher.")
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
    if room < 1:
        raise RecipeError(
            f"labels.max_new_tokens must be below the model's context of {context_length(recipe)} tokens, "
            f"got {recipe.labels.max_new_tokens}."
        )
    if not recipe.labels.skip_long_prompts:
        refuse_long_prompts(prompts, room)
    asked = {row: prompt for row, prompt in enumerate(prompts) if len(prompt) <= room}
    folder = open_stage(recipe, "labels", {"prompts": recipe.labels.prompts})
    write_json(folder / _EXPECTED, {"rows": len(asked)})
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
    """Stage 1: train the heads, on the labels or on heads.text. Returns the heads folder."""
    if recipe.heads.path is not None:
        raise RecipeError(
            f"heads.path names finished heads ({recipe.heads.path}), which `caftune train` uses as they are. "
            "Remove heads.path to pretrain new ones."
        )
    labels = Path(recipe.output, "labels", "labels.jsonl")
    args = stage_one_config(recipe, Path(recipe.output, "pretrain"))
    source = recipe.heads.text or str(labels)
    rows = _finished_labels(labels) if recipe.heads.text is None else _text_rows(recipe, args)
    held_out = max(1, round(len(rows) * recipe.heads.held_out))
    if held_out >= len(rows):
        raise DataError(f"{source} has {len(rows)} rows, too few to train on some and evaluate on others. Give more.")
    split = rows.train_test_split(test_size=held_out, seed=recipe.seed)
    folder = open_stage(recipe, "pretrain", {"labels": source})
    heads = Path(recipe.output, "heads")
    trainer = CAFTTrainer(
        recipe.model.name,
        args,
        train_dataset=split["train"],
        eval_dataset=split["test"],
        processing_class=load_tokenizer(recipe),
    )
    show_progress(trainer, "pretrain-heads")
    before = evaluated(trainer)
    run(trainer, checkpoint=last_checkpoint(folder))
    after = evaluated(trainer)
    trainer.export(heads)
    record(recipe, {"stage": "pretrain-heads", "rows": len(split["train"]), "before": before, "after": after})
    return heads


def _finished_labels(labels: Path) -> Dataset:
    if not labels.is_file():
        raise RecipeError(f"{labels} is missing. Run `caftune label` first, or name a text in heads.text.")
    answers = read_labels(labels)
    expected = json.loads((labels.parent / _EXPECTED).read_text())["rows"]
    if len(answers) < expected:
        raise RecipeError(
            f"{labels} has {len(answers)} of {expected} rows. Run `caftune label` again: it goes on there."
        )
    return label_dataset(answers)


def _text_rows(recipe: Recipe, args: CAFTConfig) -> Dataset:
    """The rows of heads.text as tokens. They are cut at the training length: nothing is lost but text to read on."""
    tokenizer = load_tokenizer(recipe)
    chat = bool(getattr(tokenizer, "chat_template", None))
    rows = load_rows(str(recipe.heads.text), recipe.labels.columns, limit=recipe.labels.limit, chat=chat)
    return tokenized(rows, tokenizer, args, name="heads.text")


def finetune(recipe: Recipe) -> Path:
    """Stage 2: concept-aware fine-tuning, then export. Returns the model folder."""
    tokenizer = load_tokenizer(recipe)
    args = stage_two_config(recipe, Path(recipe.output, "train"))
    sources = {"train": recipe.data.train, "eval": recipe.data.eval}
    files = {**sources, "heads": args.heads and Path(args.heads, "heads.json")}
    if is_begun(recipe, "train"):
        refuse_other_stage(recipe, "train", files)  # before the data are prepared
    train, evaluation = (task_rows(recipe, name, tokenizer, args) for name in sources)
    if train is None:
        raise RecipeError("data.train must name a file or hub id, got nothing. Add it to the recipe.")
    folder = open_stage(recipe, "train", files)
    trainer = CAFTTrainer(
        recipe.model.name,
        args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=lora_config(recipe),
        quantization_config=quantization(recipe),
    )
    if recipe.model.tuning != "full" and recipe.model.lora.merge:
        refuse_tied_adapters(trainer.model)
    show_progress(trainer, "train")
    run(trainer, checkpoint=last_checkpoint(folder))
    metrics = evaluated(trainer) if evaluation is not None else {}
    model = Path(recipe.output, "model")
    native = trainer.export(model, merged=recipe.model.lora.merge)
    copied = {"native_multi_token_modules": f"{len(native)} tensors, copied from the base unchanged"} if native else {}
    record(
        recipe, {"stage": "train", "rows": len(train), "metrics": metrics, **copied, "log": trainer.state.log_history}
    )
    return model


def export(recipe: Recipe, checkpoint: str | None = None) -> Path:
    """Write a checkpoint of stage 2 (by default the one `train` would) as an ordinary model. Returns its folder."""
    folder = Path(recipe.output, "train")
    source = checkpoint or _chosen_checkpoint(recipe, folder)
    if source is None or not any(Path(source, name).is_file() for name in ("config.json", "adapter_config.json")):
        raise RecipeError(
            f"{checkpoint or folder} holds no checkpoint. Run `caftune train` first, or name one of {folder}/checkpoint-*."
        )
    if Path(source).resolve().parent != folder.resolve():
        raise RecipeError(f"{source} must be one of {folder}/checkpoint-*: it belongs to another run. Use its recipe.")
    heads = recipe.heads.path or str(Path(recipe.output, "heads"))
    files = {"train": recipe.data.train, "eval": recipe.data.eval}
    refuse_other_stage(
        recipe, "train", {**files, "heads": Path(heads, "heads.json") if recipe.loss.weight > 0 else None}
    )
    model = load_trained(source, recipe.model.name, recipe.model.revision)
    target = Path(recipe.output, "model")
    export_model(
        model, target, load_tokenizer(recipe), base_name=recipe.model.name, base_revision=recipe.model.revision
    )
    record(recipe, {"stage": "export", "checkpoint": Path(source).name})
    return target


def _chosen_checkpoint(recipe: Recipe, folder: Path) -> str | None:
    """The best checkpoint where the recipe asks for it, else the last."""
    last = last_checkpoint(folder)
    if last is None or not recipe.trainer.get("load_best_model_at_end"):
        return last
    best = json.loads(Path(last, "trainer_state.json").read_text())["best_model_checkpoint"]
    return str(folder / Path(best).name) if best else last


def preview(recipe: Recipe, count: int = 3) -> Iterator[tuple[list[str], list[bool], dict[int, list[str]]]]:
    """For the first rows of data.train: the tokens, which of them are trained on, and each horizon's target per position."""
    tokenizer = load_tokenizer(recipe)
    args = stage_two_config(recipe, Path(recipe.output, "train"), heads=None, aux_weight=0.0)
    rows = task_rows(recipe, "train", tokenizer, args, limit=count)
    if rows is None:
        raise RecipeError("data.train must name a file or hub id, got nothing. Add it to the recipe.")
    count = len(describe_heads(recipe.heads.path)["horizons"]) if recipe.heads.path else recipe.heads.count
    horizons = range(1, count + 2)
    prepared = rows if "input_ids" in rows.column_names else tokenized(rows, tokenizer, args, name="train")
    for row in prepared.with_format("torch"):
        labels = row["labels"][None]
        targets = {h: horizon_targets(labels, h)[0].tolist() for h in horizons}
        yield (
            tokenizer.convert_ids_to_tokens(row["input_ids"].tolist()),
            [token != IGNORED for token in row["labels"].tolist()],
            {h: [tokenizer.convert_ids_to_tokens(t) if t != IGNORED else "" for t in targets[h]] for h in horizons},
        )


def task_rows(
    recipe: Recipe, name: str, tokenizer: Any, args: CAFTConfig, *, limit: int | None = None
) -> Dataset | None:
    """The rows of data.train or data.eval, after a trial of what the trainer will do with them; None where none is named."""
    source = getattr(recipe.data, name)
    if source is None:
        return None
    chat = bool(getattr(tokenizer, "chat_template", None) or args.chat_template_path)
    rows = load_rows(source, recipe.data.columns, limit=limit or recipe.data.limit, chat=chat)
    if is_chat(rows) and not chat:
        refuse_messages_without_template(tokenizer)
    if "prompt" in rows.column_names and "completion" not in rows.column_names:
        raise DataError(
            f"data.{name} has prompts and no completions to train on. Name the answers' column in data.columns."
        )
    if recipe.data.separator and "prompt" in rows.column_names and not is_chat(rows):
        rows = rows.map(lambda row: {"prompt": row["prompt"] + recipe.data.separator})
    prepared = tokenized(rows, tokenizer, args, name=name)
    # Where SFTTrainer would do more than this, it gets the rows as they are.
    more = args.shuffle_dataset or args.packing_strategy == "bfd_split" or args.eos_token or args.chat_template_path
    return rows if more else prepared


def load_model(recipe: Recipe) -> Any:
    """The base model, in the dtype it was published in, on the GPU where there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    revision = recipe.model.revision or "main"
    model: Any = AutoModelForCausalLM.from_pretrained(recipe.model.name, dtype="auto", revision=revision)
    return model.to(device).eval()


def evaluated(trainer: CAFTTrainer) -> dict[str, float]:
    """The losses and accuracies of an evaluation, without timings."""
    metrics = trainer.evaluate()
    entry = next(entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry)
    names = [name for name in {**metrics, **entry} if name.endswith(("_loss", "_accuracy"))]
    return {name.removeprefix("eval_"): {**metrics, **entry}[name] for name in names}
