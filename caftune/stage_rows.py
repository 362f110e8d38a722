"""What each stage trains on: the labels or a text for the heads, the task's rows for the model."""

import json
import random
from pathlib import Path
from typing import Any

from datasets import Dataset

from caftune.checkpoint import file_name
from caftune.config import CAFTConfig
from caftune.data import load_rows, refuse_unnamed_split
from caftune.errors import CaftuneError
from caftune.labels import label_dataset, read_labels
from caftune.prompts import is_chat, refuse_messages_without_template
from caftune.recipe import Recipe, first_difference
from caftune.run_folder import forget_unknown_commit, kept_identity
from caftune.stage_options import load_tokenizer
from caftune.tokenization import is_pair_of_texts, split_texts, tokenized, with_one_bos

# What answers depend on; where they came from does not matter.
_MADE_WITH = {
    *("prompts", "columns", "limit", "chat", "system", "skip_long_prompts"),
    *("max_new_tokens", "temperature", "top_p", "top_k"),
}


def head_source(recipe: Recipe) -> str:
    """The file or hub id that stage 1 trains on."""
    return recipe.heads.text or str(Path(recipe.output, "labels", "labels.jsonl"))


def describe_head_source(recipe: Recipe, rows: Dataset) -> dict[str, Any]:
    """What stage 1 was trained on, for the record: the labels as they were made."""
    if recipe.heads.text is not None:
        return {"text": file_name(recipe.heads.text), "rows": len(rows)}
    kept = kept_identity(Path(recipe.output, "labels"), "labels")["labels"]
    drawn = {name: kept[name] for name in ("max_new_tokens", "temperature", "top_p", "top_k")}
    drawn["in_conversation"] = _recorded(recipe, "label").get("chat")
    return {"answers of the base to": file_name(str(kept["prompts"])), "answers": len(rows), **drawn}


def head_rows(recipe: Recipe, args: CAFTConfig) -> tuple[Dataset, Dataset]:
    """The rows that stage 1 trains on, and those kept for evaluating the heads. A conversation is on one side as a whole.

    Raises:
        CaftuneError: there are no labels yet.
        CaftuneError: too few rows to divide, or none that was finished.
    """
    is_text = recipe.heads.text is not None
    rows = _text_rows(recipe, args) if is_text else _finished_labels(recipe, Path(head_source(recipe)))
    conversation = rows["row"] if "row" in rows.column_names else list(range(len(rows)))
    names = sorted(set(conversation))
    count = max(1, round(len(names) * recipe.heads.held_out))
    if count >= len(names):
        raise CaftuneError(
            f"{head_source(recipe)} has {len(names)} rows, too few to train on some and evaluate on others. Give more."
        )
    held_out = set(random.Random(recipe.seed).sample(names, count))
    kept = rows.remove_columns("row") if "row" in rows.column_names else rows
    parts = [[i for i, name in enumerate(conversation) if (name in held_out) is side] for side in (False, True)]
    return kept.select(parts[0]), kept.select(parts[1])


def _finished_labels(recipe: Recipe, labels: Path) -> Dataset:
    """The labels of the run, ready to be trained on."""
    if not labels.is_file():
        raise CaftuneError(f"{labels} is missing. Run `caftune label` (again), or name a text in heads.text.")
    kept = kept_identity(labels.parent, "labels")
    model = {"model.name": recipe.model.name, "model.revision": recipe.model.revision}
    wanted = recipe.labels.model_dump(include=_MADE_WITH)
    forget_unknown_commit(kept, model)
    forget_unknown_commit(kept["labels"], wanted)
    _fill_in_chat(recipe, kept["labels"], wanted)
    difference = first_difference({name: kept[name] for name in model}, model)
    difference = difference or first_difference({name: kept["labels"][name] for name in wanted}, wanted, "labels")
    if difference:
        raise CaftuneError(
            f"{labels} was made with another recipe ({difference}). Run `caftune label` again: what is known is not asked "
            "twice."
        )
    return label_dataset(read_labels(labels), keep_truncated=recipe.labels.keep_truncated)


def _fill_in_chat(recipe: Recipe, kept: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Make `labels.chat` comparable: the default is what it came to, and older labels were asked as plain text."""
    given = _recorded(recipe, "label").get("chat")
    if kept.get("chat") is not None:
        return
    if given is None:
        has_template = bool(getattr(load_tokenizer(recipe), "chat_template", None))
        kept["chat"] = False if has_template else wanted["chat"]
    elif wanted["chat"] is not None:
        kept["chat"] = given


def _recorded(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The result of a stage, empty without one."""
    path = Path(recipe.output, "results.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((result for result in map(json.loads, lines) if result["stage"] == stage), {})


def _text_rows(recipe: Recipe, args: CAFTConfig) -> Dataset:
    """The rows of heads.text as tokens. They are cut at the training length: nothing is lost but text to read on."""
    tokenizer = load_tokenizer(recipe)
    chat = bool(getattr(tokenizer, "chat_template", None))
    rows = load_rows(str(recipe.heads.text), recipe.labels.columns, limit=recipe.labels.limit, chat=chat)
    rows = with_one_bos(rows, tokenizer, "heads.text")
    return tokenized(rows, tokenizer, args, name="heads.text", source=str(recipe.heads.text))


def read_task_rows(recipe: Recipe, source: str, *, limit: int | None, chat: bool) -> Dataset:
    """Rows of the task in the form that they are trained on in; `chat`: the base has a chat template."""
    wanted = recipe.data.chat
    chat = chat if wanted is None else wanted
    return load_rows(source, recipe.data.columns, limit=limit, chat=chat, texts_too=bool(wanted))


def task_rows(
    recipe: Recipe, name: str, tokenizer: Any, args: CAFTConfig, *, limit: int | None = None
) -> Dataset | None:
    """The rows of data.train or data.eval, after a trial of what the trainer will do with them; None where none is named."""
    source = getattr(recipe.data, name)
    if source is None:
        return None
    if name == "eval":
        refuse_unnamed_split(source, "data.eval")
    chat = bool(getattr(tokenizer, "chat_template", None) or args.chat_template_path)
    rows = read_task_rows(recipe, source, limit=recipe.data.limit if limit is None else limit, chat=chat)
    if is_chat(rows) and not chat:
        refuse_messages_without_template(tokenizer)
    if "prompt" in rows.column_names and "completion" not in rows.column_names:
        raise CaftuneError(
            f"data.{name} has prompts and no completions to train on. Name the answers' column in data.columns."
        )
    if recipe.data.separator and "prompt" in rows.column_names and not is_chat(rows):
        rows = rows.map(lambda row: {"prompt": row["prompt"] + recipe.data.separator})
    rows = with_one_bos(rows, tokenizer, name)
    prepared = tokenized(rows, tokenizer, args, name=name, source=source)
    if is_pair_of_texts(rows):
        # SFTTrainer takes the EOS of another tokenizer together with its template, and has to add it itself.
        takes_eos = not (args.chat_template_path or ".jinja").endswith((".jinja", ".j2"))
        return split_texts(rows, tokenizer, name) if takes_eos else prepared
    # Where SFTTrainer would do more than this, it gets the rows as they are.
    more = args.shuffle_dataset or args.packing_strategy == "bfd_split" or args.eos_token or args.chat_template_path
    return rows if more else prepared
