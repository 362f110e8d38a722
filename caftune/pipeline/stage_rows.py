"""What each stage trains on: the labels or a text for the heads, the task's rows for the model."""

import random
from typing import Any, NamedTuple

from datasets import Dataset

from caftune.checkpoints.heads_folder import file_name
from caftune.data.forms import load_rows, refuse_unnamed_split
from caftune.data.prompts import is_chat, refuse_messages_without_template
from caftune.errors import CaftuneError
from caftune.generation.labels import label_dataset, read_labels
from caftune.pipeline.base_model import BaseModel
from caftune.pipeline.folder import RunFolder, forget_unknown_commit, kept_identity
from caftune.pipeline.recipe import DataSection, HeadsSection, LabelsSection, Recipe, first_difference
from caftune.pipeline.stage_config import embedding_rows
from caftune.training.checks import refuse_long_rows, refuse_many_dropped, refuse_unknown_padding, refuse_unknown_tokens
from caftune.training.config import CAFTConfig
from caftune.training.tokenization import Prepared, prepared, with_one_bos

# What answers depend on; where they came from does not matter.
_MADE_WITH = {
    *("prompts", "columns", "limit", "chat", "system", "skip_long_prompts"),
    *("max_new_tokens", "temperature", "top_p", "top_k"),
}


def head_source(heads: HeadsSection, folder: RunFolder) -> str:
    """The file or hub id that stage 1 trains on."""
    return heads.text or str(folder.labels)


def describe_head_source(heads: HeadsSection, folder: RunFolder, rows: Dataset) -> dict[str, Any]:
    """What stage 1 was trained on, for the record: the labels as they were made."""
    if heads.text is not None:
        return {"text": file_name(heads.text), "rows": len(rows)}
    kept = kept_identity(folder.labels.parent)["labels"]
    drawn = {name: kept[name] for name in ("max_new_tokens", "temperature", "top_p", "top_k")}
    drawn["in_conversation"] = folder.results().get("label", {}).get("chat")
    return {"answers of the base to": file_name(str(kept["prompts"])), "answers": len(rows), **drawn}


class HeadRows(NamedTuple):
    """Stage 1's training rows, its held-out rows, and what results.jsonl records of rows left out."""

    train: Dataset
    held_out: Dataset
    dropped: dict[str, Any]


def head_rows(recipe: Recipe, base: BaseModel, args: CAFTConfig) -> HeadRows:
    """The rows of stage 1. A conversation is wholly in one of the two parts.

    Raises:
        CaftuneError: no labels yet, too few rows to divide, no finished answer, or more than a tenth of the rows without a
            token to train on within the training length.
    """
    folder = RunFolder(recipe.output)
    if recipe.heads.text is not None:
        found = _text_rows(recipe.heads.text, recipe.labels, base.tokenizer(), args)
    else:
        found = _label_rows(recipe.labels, folder, base, args)
    rows, tokenizer, embedded = found.rows, base.tokenizer(), embedding_rows(base, args)
    name = "heads.text" if recipe.heads.text else "labels"
    refuse_unknown_tokens(rows, tokenizer, embedded, name=name, dropped=found.dropped)
    refuse_unknown_padding(args, tokenizer, embedded)
    conversation = rows["row"] if "row" in rows.column_names else list(range(len(rows)))
    names = sorted(set(conversation))
    count = max(1, round(len(names) * recipe.heads.held_out))
    if count >= len(names):
        raise CaftuneError(
            f"{head_source(recipe.heads, folder)} has {len(names)} rows, too few to train on some and evaluate on others. "
            "Give more."
        )
    held_out = set(random.Random(recipe.seed).sample(names, count))
    kept = rows.remove_columns("row") if "row" in rows.column_names else rows
    parts = [[i for i, name in enumerate(conversation) if (name in held_out) is side] for side in (False, True)]
    return HeadRows(kept.select(parts[0]), kept.select(parts[1]), {"labels": found.facts} if found.dropped else {})


def _label_rows(section: LabelsSection, folder: RunFolder, base: BaseModel, args: CAFTConfig) -> Prepared:
    labels = _finished_labels(section, folder, base)
    if args.max_length is None:  # labels are not cut unless they are packed
        return Prepared(labels, len(labels))
    found = prepared(labels, base.tokenizer(), args, name="labels")
    refuse_many_dropped(found.dropped, found.total, args.max_length, name="labels")
    return found


def _finished_labels(section: LabelsSection, folder: RunFolder, base: BaseModel) -> Dataset:
    """The labels of the run, ready to be trained on."""
    labels = folder.labels
    if not labels.is_file():
        raise CaftuneError(f"{labels} is missing. Run `caftune label` (again), or name a text in heads.text.")
    kept = kept_identity(labels.parent)
    model = {"model.name": base.name, "model.revision": base.revision}
    wanted = section.model_dump(include=_MADE_WITH)
    forget_unknown_commit(kept, model)
    forget_unknown_commit(kept["labels"], wanted)
    _fill_in_chat(folder.results().get("label", {}).get("chat"), base, kept["labels"], wanted)
    difference = first_difference({name: kept[name] for name in model}, model)
    difference = difference or first_difference({name: kept["labels"][name] for name in wanted}, wanted, "labels")
    if difference:
        raise CaftuneError(
            f"{labels} was made with another recipe ({difference}). Run `caftune label` again: what is known is not asked "
            "twice."
        )
    return label_dataset(read_labels(labels), keep_truncated=section.keep_truncated)


def _fill_in_chat(given: bool | None, base: BaseModel, kept: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Make `labels.chat` comparable: replace the default by the form that was used; older labels used plain text."""
    if kept.get("chat") is not None:
        return
    if given is None:
        has_template = bool(getattr(base.tokenizer(), "chat_template", None))
        kept["chat"] = False if has_template else wanted["chat"]
    elif wanted["chat"] is not None:
        kept["chat"] = given


def _text_rows(text: str, section: LabelsSection, tokenizer: Any, args: CAFTConfig) -> Prepared:
    """The rows of heads.text as tokens. They are cut at the training length: nothing is lost but text to read on."""
    chat = bool(getattr(tokenizer, "chat_template", None))
    rows = load_rows(text, section.columns, limit=section.limit, chat=chat)
    rows = with_one_bos(rows, tokenizer, "heads.text")
    found = prepared(rows, tokenizer, args, name="heads.text", source=text)
    refuse_many_dropped(found.dropped, found.total, args.max_length, name="heads.text")
    return found


def read_task_rows(section: DataSection, source: str, *, limit: int | None, chat: bool) -> Dataset:
    """Rows of the task in the form that they are trained on in; `chat`: the base has a chat template."""
    wanted = section.chat
    chat = chat if wanted is None else wanted
    return load_rows(source, section.columns, limit=limit, chat=chat, texts_too=bool(wanted))


def task_rows(
    section: DataSection, name: str, base: BaseModel, tokenizer: Any, args: CAFTConfig, *, limit: int | None = None
) -> Dataset | None:
    """The rows of data.train or data.eval as `prepared_task_rows` gives them."""
    found = prepared_task_rows(section, name, base, tokenizer, args, limit=limit)
    return None if found is None else found.rows


def prepared_task_rows(
    section: DataSection,
    name: str,
    base: BaseModel,
    tokenizer: Any,
    args: CAFTConfig,
    *,
    limit: int | None = None,
    is_whole: bool = True,
) -> Prepared | None:
    """The rows of data.train or data.eval as the trainer takes them, tokenized and cut; None where none is named.

    Args:
        limit: the number of rows to read, instead of data.limit.
        is_whole: refuse a data set in which more than a tenth of the rows have no token to train on within max_length.
    """
    source = getattr(section, name)
    if source is None:
        return None
    if name == "eval":
        refuse_unnamed_split(source, "data.eval")
    chat = bool(getattr(tokenizer, "chat_template", None) or args.chat_template_path)
    rows = read_task_rows(section, source, limit=section.limit if limit is None else limit, chat=chat)
    if is_chat(rows) and not chat:
        refuse_messages_without_template(tokenizer)
    if "prompt" in rows.column_names and "completion" not in rows.column_names:
        raise CaftuneError(
            f"data.{name} has prompts and no completions to train on. Name the answers' column in data.columns."
        )
    if section.separator and "prompt" in rows.column_names and not is_chat(rows):
        rows = rows.map(lambda row: {"prompt": row["prompt"] + section.separator})
    rows = with_one_bos(rows, tokenizer, name)
    found = prepared(rows, tokenizer, args, name=name, source=source)
    if is_whole:
        refuse_many_dropped(found.dropped, found.total, args.max_length, name=name)
    embedded = embedding_rows(base, args)
    refuse_unknown_tokens(found.rows, tokenizer, embedded, name=name, dropped=found.dropped)
    refuse_unknown_padding(args, tokenizer, embedded)
    if args.max_length is None:
        refuse_long_rows(found.rows, base.context, name=f"data.{name}")
    return found
