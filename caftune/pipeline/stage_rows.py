"""What each stage trains on: the labels or a text for the heads, the task's rows for the model."""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from caftune.checkpoints.heads_folder import file_name
from caftune.data.forms import load_rows, refuse_unnamed_split
from caftune.data.prompts import is_chat, refuse_messages_without_template
from caftune.errors import CaftuneError
from caftune.generation.labels import label_dataset, read_labels
from caftune.pipeline.folder import forget_unknown_commit, kept_identity
from caftune.pipeline.recipe import first_difference
from caftune.pipeline.schema import DataSection, Recipe
from caftune.pipeline.stage_config import context_length, embedding_rows, load_tokenizer
from caftune.training.checks import refuse_long_rows, refuse_many_dropped, refuse_unknown_padding, refuse_unknown_tokens
from caftune.training.config import CAFTConfig
from caftune.training.prepare import Prepared, prepare, row_options

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


def head_rows(recipe: Recipe, args: CAFTConfig) -> HeadRows:
    """The rows of stage 1, from heads.text or the labels. A conversation is wholly in one of the two parts.

    Raises:
        CaftuneError: no labels yet, too few rows to divide, no finished answer, or more than a tenth of the rows without a
            token to train on within the training length.
    """
    tokenizer, text = load_tokenizer(recipe), recipe.heads.text
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if text is not None:  # cut at the training length: nothing is lost but text to read on
        rows = load_rows(text, recipe.labels.columns, limit=recipe.labels.limit, chat=has_template)
        about: dict[str, Any] = {"text": file_name(text), "rows": 0}
    else:
        rows, about = _finished_labels(recipe, has_template=has_template)
    name, counted = ("labels", "answers") if text is None else ("heads.text", "rows")
    if text is None and args.max_length is None:  # labels are tokens already, and cut only to be packed
        found = Prepared(rows, len(rows))
    else:
        found = prepare(rows, tokenizer, args, name=name, source=text)
    refuse_many_dropped(found.dropped, found.total, args.max_length, name=name)
    _refuse_unknown(found, tokenizer, args, embedding_rows(recipe, args), name=name)
    train, held_out = _divided(found.rows, recipe.heads.held_out, recipe.seed, recipe.head_source)
    return HeadRows(train, held_out, {"labels": found.facts} if found.dropped else {}, {**about, counted: len(train)})


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


def _finished_labels(recipe: Recipe, *, has_template: bool) -> tuple[Dataset, dict[str, Any]]:
    """The labels of the run, ready to be trained on, and how they were made, for the record."""
    labels = Path(recipe.head_source)
    if not labels.is_file():
        raise CaftuneError(f"{labels} is missing. Run `caftune label` (again), or name a text in heads.text.")
    kept = kept_identity(labels.parent, "labels")
    made, in_conversation = kept["labels"], _recorded_form(Path(recipe.output))
    drawn = {name: made[name] for name in ("max_new_tokens", "temperature", "top_p", "top_k")}
    about = {"answers of the base to": file_name(str(made["prompts"])), "answers": 0, **drawn}
    model = {"model.name": recipe.model.name, "model.revision": recipe.model.revision}
    wanted = recipe.labels.model_dump(include=_MADE_WITH)
    forget_unknown_commit(kept, model)
    forget_unknown_commit(made, wanted)
    if made.get("chat") is None:  # the default stands for the form that was used; labels of old versions are plain text
        if in_conversation is None:
            made["chat"] = False if has_template else wanted["chat"]
        elif wanted["chat"] is not None:
            made["chat"] = in_conversation
    difference = first_difference({name: kept[name] for name in model}, model)
    difference = difference or first_difference({name: made[name] for name in wanted}, wanted, "labels")
    if difference:
        raise CaftuneError(
            f"{labels} was made with another recipe ({difference}). Run `caftune label` again: cached answers are reused."
        )
    rows = label_dataset(read_labels(labels), keep_truncated=recipe.labels.keep_truncated)
    return rows, {**about, "in_conversation": in_conversation}


def _recorded_form(output: Path) -> bool | None:
    """Whether the prompts of the labels were in a conversation, by the result of `label`; None where it does not say."""
    path = output / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((result.get("chat") for result in map(json.loads, lines) if result["stage"] == "label"), None)


def read_task_rows(data: DataSection, source: str, *, limit: int | None, chat: bool) -> Dataset:
    """Rows of the task in the form that they are trained on in; `chat`: the base has a chat template."""
    chat = chat if data.chat is None else data.chat
    return load_rows(source, data.columns, limit=limit, chat=chat, texts_too=bool(data.chat))


def task_rows(
    recipe: Recipe,
    name: str,
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
        kept: rows that were prepared before with this recipe and tokenizer. They are used again where the options of rows
            are the same; those of this call are added.
    """
    source, kept = getattr(recipe.data, name), {} if kept is None else kept
    if source is None:
        return None
    limit = recipe.data.limit if limit is None else limit
    key = (limit, *row_options(args, name))
    if key not in kept:
        rows = _unprepared(recipe.data, name, tokenizer, args, limit)
        kept[key] = prepare(rows, tokenizer, args, name=name, source=source)
    found = kept[key]
    if is_whole:
        refuse_many_dropped(found.dropped, found.total, args.max_length, name=name)
    _refuse_unknown(found, tokenizer, args, embedding_rows(recipe, args), name=name)
    if args.max_length is None:
        refuse_long_rows(found.rows, context_length(recipe), name=f"data.{name}")
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
            f"data.{name} has prompts and no completions to train on. Name the answers' column in data.columns."
        )
    separator = data.separator
    if separator and "prompt" in rows.column_names and not is_chat(rows):
        rows = rows.map(lambda row: {"prompt": row["prompt"] + separator})
    return rows


def _refuse_unknown(found: Prepared, tokenizer: Any, args: CAFTConfig, embedded: int, *, name: str) -> None:
    """Raise CaftuneError for tokens and padding without an embedding."""
    refuse_unknown_tokens(found.rows, tokenizer, embedded, name=name, dropped=found.dropped)
    refuse_unknown_padding(args, tokenizer, embedded)
