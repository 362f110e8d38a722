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
from typing import Any, Literal

from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

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
from caftune.recipe import Recipe, RecipeError, trainer_config
from caftune.run_folder import is_begun, last_checkpoint, open_stage, record, refuse_other_stage
from caftune.tokenization import tokenized
from caftune.trainer import CAFTTrainer

_DEFAULT_LENGTH = 1024
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
    """Stage 1: train the heads on the labels. Returns the heads folder."""
    labels = Path(recipe.output, "labels", "labels.jsonl")
    if not labels.is_file():
        raise RecipeError(f"{labels} is missing. Run `caftune label` first.")
    if recipe.heads.path is not None:
        raise RecipeError(
            f"heads.path names finished heads ({recipe.heads.path}), which `caftune train` uses as they are. "
            "Remove heads.path to pretrain new ones."
        )
    answers = read_labels(labels)
    expected = json.loads((labels.parent / _EXPECTED).read_text())["rows"]
    if len(answers) < expected:
        raise RecipeError(
            f"{labels} has {len(answers)} of {expected} rows. Run `caftune label` again: it goes on there."
        )
    rows = label_dataset(answers)
    held_out = max(1, round(len(rows) * recipe.heads.held_out))
    if held_out >= len(rows):
        raise DataError(
            f"{labels} has {len(rows)} rows, too few to train on some and evaluate on others. Label more prompts."
        )
    split = rows.train_test_split(test_size=held_out, seed=recipe.seed)
    args = stage_one_config(recipe, Path(recipe.output, "pretrain"))
    folder = open_stage(recipe, "pretrain", {"labels": str(labels)})
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


def stage_one_config(recipe: Recipe, folder: Path) -> CAFTConfig:
    """CAFTConfig of stage 1."""
    return trainer_config(
        recipe,
        "pretrain",
        output_dir=str(folder),
        pretrain_heads=True,
        num_heads=recipe.heads.count,
        head_kind=recipe.heads.kind,
        aux_decay=recipe.loss.decay,
        # Labels have the length they have; packing needs one.
        max_length=_training_length(recipe) if recipe.pretrain.get("packing") else None,
        **_model_options(recipe, "pretrain"),
    )


def stage_two_config(recipe: Recipe, folder: Path, **ours: Any) -> CAFTConfig:
    """CAFTConfig of stage 2."""
    loss = recipe.loss
    heads = recipe.heads.path or str(Path(recipe.output, "heads"))
    if loss.weight > 0 and "heads" not in ours and recipe.heads.path is None and not Path(heads).is_dir():
        raise RecipeError(
            f"{heads} is missing. Run `caftune pretrain-heads` first, name other heads in heads.path, or set loss.weight=0."
        )
    _refuse_other_heads(recipe)
    for key in ("lora_rank", "learning_rate", "max_grad_norm"):
        if getattr(recipe.heads, key) is not None and not recipe.heads.train:
            raise RecipeError(f"heads.{key} needs heads.train: true, for heads are frozen in stage 2 otherwise.")
    chosen = {
        "heads": heads if loss.weight > 0 else None,
        "force_heads": recipe.heads.force,
        "train_heads": recipe.heads.train,
        "heads_lora_rank": recipe.heads.lora_rank,
        "heads_learning_rate": recipe.heads.learning_rate,
        "heads_max_grad_norm": recipe.heads.max_grad_norm,
        "aux_weight": loss.weight,
        "aux_decay": loss.decay,
        "aux_schedule": loss.schedule,
        "max_length": _training_length(recipe),
        "output_dir": str(folder),
        **_model_options(recipe, "trainer"),
    }
    return trainer_config(recipe, "trainer", **{**chosen, **ours})


def _training_length(recipe: Recipe) -> int:
    context = context_length(recipe)
    length = recipe.data.max_length or min(_DEFAULT_LENGTH, context or _DEFAULT_LENGTH)
    if context is not None and length > context:
        raise RecipeError(f"data.max_length must be at most the model's context of {context} tokens, got {length}.")
    return length


def _model_options(recipe: Recipe, section: Literal["pretrain", "trainer"]) -> dict[str, Any]:
    """What `from_pretrained` is given beyond the name: the base's revision, bfloat16 around 4 bits."""
    options = {"revision": recipe.model.revision} if recipe.model.revision is not None else {}
    if section == "trainer" and recipe.model.tuning == "qlora":
        options["dtype"] = "bfloat16"
    given = getattr(recipe, section).get("model_init_kwargs", {})
    return {"model_init_kwargs": {**options, **given}} if options else {}


def _refuse_other_heads(recipe: Recipe) -> None:
    """Raise RecipeError where the recipe asks for other heads than heads.path holds."""
    if recipe.heads.path is None or recipe.loss.weight == 0:
        return
    found = describe_heads(recipe.heads.path)
    for key, value in {"count": len(found["horizons"]), "kind": found["kind"]}.items():
        if key in recipe.heads.model_fields_set and getattr(recipe.heads, key) != value:
            raise RecipeError(
                f"heads.{key} must be {value!r}, as in {recipe.heads.path}, got {getattr(recipe.heads, key)!r}. Remove it."
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
        modules_to_save=lora.modules_to_save or None,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )


def quantization(recipe: Recipe) -> Any:
    """Four bits with the settings of the QLoRA paper (NormalFloat4, double quantisation, bfloat16), None for other tunings."""
    config = AutoConfig.from_pretrained(recipe.model.name, revision=recipe.model.revision or "main")
    if recipe.model.lora.merge and getattr(config, "quantization_config", None):
        raise RecipeError(
            f"model.name must be an unquantised base, and {recipe.model.name} is published quantised: an adapter cannot be "
            "merged into it. Name the unquantised base (tuning: qlora rounds it), or set model.lora.merge=false."
        )
    if recipe.model.tuning != "qlora":
        return None
    if not is_bitsandbytes_available():
        raise RecipeError("model.tuning=qlora needs bitsandbytes. Install it with `pip install caftune[qlora]`.")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
    )


def evaluated(trainer: CAFTTrainer) -> dict[str, float]:
    """The losses and accuracies of an evaluation, without timings."""
    metrics = trainer.evaluate()
    entry = next(entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry)
    names = [name for name in {**metrics, **entry} if name.endswith(("_loss", "_accuracy"))]
    return {name.removeprefix("eval_"): {**metrics, **entry}[name] for name in names}


def _refuse_missing_model(recipe: Recipe) -> None:
    name = recipe.model.name
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name, "config.json").is_file():
        raise RecipeError(f"model.name must be a folder with a config.json or a hub id, and {name} is no such folder.")
