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
from caftune.pipeline.recipe import first_difference
from caftune.pipeline.schema import DataSection, LabelsSection, Recipe
from caftune.pipeline.stage_config import embedding_rows
from caftune.training.checks import refuse_long_rows, refuse_many_dropped, refuse_unknown_padding, refuse_unknown_tokens
from caftune.training.config import CAFTConfig
from caftune.training.prepare import Prepared, prepare, refuse_other_values, row_options

# What answers depend on; where they came from does not matter.
_MADE_WITH = {
    *("prompts", "columns", "limit", "chat", "system", "skip_long_prompts"),
    *("max_new_tokens", "temperature", "top_p", "top_k"),
}


class HeadRows(NamedTuple):
    """Stage 1's training rows and held-out rows, the entry of results.jsonl for rows left out, and that of heads.json."""

    train: Dataset
    held_out: Dataset
    dropped: dict[str, Any]
    about: dict[str, Any]


def head_rows(recipe: Recipe, base: BaseModel, args: CAFTConfig) -> HeadRows:
    """The rows of stage 1, from heads.text or the labels. A conversation is wholly in one of the two parts.

    Raises:
        CaftuneError: no labels yet, too few rows to divide, no finished answer, or more than a tenth of the rows without a
            token to train on within the training length.
    """
    text, labels = recipe.heads.text, recipe.labels
    if text is None:  # checked before the base is opened
        rows, about = _finished_labels(labels, RunFolder(recipe.output), base)
        tokenizer = base.tokenizer()
    else:  # cut at the training length: nothing is lost but text to read on
        tokenizer = base.tokenizer()
        chat = bool(getattr(tokenizer, "chat_template", None))
        rows = load_rows(text, labels.columns, limit=labels.limit, chat=chat, place="labels.columns")
        about = {"text": file_name(text), "rows": 0}
    name, counted = ("labels", "answers") if text is None else ("heads.text", "rows")
    if text is None and args.max_length is None:  # labels are tokens already, and cut only to be packed
        found = Prepared(rows, len(rows))
    else:
        found = prepare(rows, tokenizer, args, name=name, source=text)
    refuse_many_dropped(found.dropped, found.total, args.max_length, name=name)
    _refuse_unknown(found, tokenizer, args, embedding_rows(base, args), name=name)
    train, held_out = _divided(found.rows, recipe.heads.held_out, recipe.seed, recipe.head_source)
    dropped = {"dropped": {"labels": found.facts}} if found.dropped else {}
    return HeadRows(train, held_out, dropped, {**about, counted: len(train)})


def _divided(rows: Dataset, share: float, seed: int, source: str) -> tuple[Dataset, Dataset]:
    """The rows to train on and a random share of them to evaluate on. Rows of one conversation have one number in `row`."""
    has_number = "row" in rows.column_names
    conversation = rows["row"] if has_number else range(len(rows))
    names = sorted(set(conversation))
    count = max(1, round(len(names) * share))
    if count >= len(names):
        raise CaftuneError(
            f"{source} has {len(names)} rows, too few to train on some and evaluate on others. Give more."
        )
    held_out = set(random.Random(seed).sample(names, count))
    kept = rows.remove_columns("row") if has_number else rows
    parts = [[i for i, name in enumerate(conversation) if (name in held_out) is side] for side in (False, True)]
    return kept.select(parts[0]), kept.select(parts[1])


def _finished_labels(section: LabelsSection, folder: RunFolder, base: BaseModel) -> tuple[Dataset, dict[str, Any]]:
    """The labels of the run, ready to be trained on, and how they were made, for the record."""
    labels = folder.labels
    if not labels.is_file():
        raise CaftuneError(f"{labels} is missing. Run `caftune label` (again), or name a text in heads.text.")
    kept = kept_identity(labels.parent)
    made, in_conversation = kept["labels"], folder.results().get("label", {}).get("chat")
    drawn = {name: made[name] for name in ("max_new_tokens", "temperature", "top_p", "top_k")}
    about = {"answers of the base to": file_name(str(made["prompts"])), "answers": 0, **drawn}
    model = {"model.name": base.name, "model.revision": base.revision}
    wanted = section.model_dump(include=_MADE_WITH)
    forget_unknown_commit(kept, model)
    forget_unknown_commit(made, wanted)
    difference = first_difference({name: kept[name] for name in model}, model)
    if made.get("chat") is None and difference is None:
        # the default stands for the form that was used; labels of old versions are plain text
        if in_conversation is None:
            made["chat"] = False if getattr(base.tokenizer(), "chat_template", None) else wanted["chat"]
        elif wanted["chat"] is not None:
            made["chat"] = in_conversation
    difference = difference or first_difference({name: made[name] for name in wanted}, wanted, "labels")
    if difference:
        raise CaftuneError(
            f"{labels} was made with another recipe ({difference}). Run `caftune label` again: cached answers are reused."
        )
    rows = label_dataset(read_labels(labels), keep_truncated=section.keep_truncated)
    return rows, {**about, "in_conversation": in_conversation}


def read_task_rows(data: DataSection, source: str, *, limit: int | None, chat: bool) -> Dataset:
    """Rows of the task in the form that they are trained on in; `chat`: the base has a chat template."""
    chat = chat if data.chat is None else data.chat
    return load_rows(source, data.columns, limit=limit, chat=chat, texts_too=bool(data.chat))


def task_rows(
    section: DataSection,
    name: str,
    base: BaseModel,
    tokenizer: Any,
    args: CAFTConfig,
    *,
    limit: int | None = None,
    is_whole: bool = True,
    kept: dict[Any, Prepared] | None = None,
) -> Prepared | None:
    """The rows of data.train or data.eval as a trainer takes them, tokenized and cut; None where none is named.

    Args:
        limit: the number of rows to read, instead of data.limit.
        is_whole: refuse a data set in which more than a tenth of the rows have no token to train on within max_length.
        kept: rows that were prepared before with this section and tokenizer. They are used again where the options of rows
            are the same; those of this call are added.
    """
    source, kept = getattr(section, name), {} if kept is None else kept
    if source is None:
        return None
    limit = section.limit if limit is None else limit
    refuse_other_values(args)
    key = (limit, *row_options(args, name))
    if key not in kept:
        rows = _unprepared(section, name, tokenizer, args, limit)
        kept[key] = prepare(rows, tokenizer, args, name=name, source=source)
    found = kept[key]
    if is_whole:
        refuse_many_dropped(found.dropped, found.total, args.max_length, name=name)
    _refuse_unknown(found, tokenizer, args, embedding_rows(base, args), name=name)
    if args.max_length is None:
        refuse_long_rows(found.rows, base.context, name=f"data.{name}")
    return found


def _unprepared(data: DataSection, name: str, tokenizer: Any, args: CAFTConfig, limit: int | None) -> Dataset:
    """The rows of data.train or data.eval, read and checked, with data.separator."""
    source = getattr(data, name)
    if name == "eval":
        refuse_unnamed_split(source, "data.eval")
    chat = bool(getattr(tokenizer, "chat_template", None) or args.chat_template_path)
    rows = read_task_rows(data, source, limit=limit, chat=chat)
    if is_chat(rows) and not chat:
        refuse_messages_without_template(tokenizer)
    if "prompt" in rows.column_names and "completion" not in rows.column_names:
        raise CaftuneError(
            f"data.{name} must have completions to train on, got prompts only. Name the answers' column in data.columns."
        )
    separator = data.separator
    if separator and "prompt" in rows.column_names and not is_chat(rows):
        rows = rows.map(lambda row: {"prompt": row["prompt"] + separator})
    return rows


def _refuse_unknown(found: Prepared, tokenizer: Any, args: CAFTConfig, embedded: int, *, name: str) -> None:
    """Raise CaftuneError for tokens and padding without an embedding."""
    refuse_unknown_tokens(found.rows, tokenizer, embedded, name=name, dropped=found.dropped)
    refuse_unknown_padding(args, tokenizer, embedded)
