"""Rows as they are trained on: tokenized, labelled and cut, once for each data set and before a model is loaded.

SFTTrainer does this when it is built, with the model in memory. A plan, a preview and every refusal of a row come earlier, and
the number of a row that is left out must be known. Text prompts and completions are tokenized by `pair_tokens`, so that a
prompt has the tokens that it has in generation (data/boundary.py); all other forms by SFTTrainer's own method, so that they
are its rows to the token. A trainer takes prepared rows as they are, and only shuffles and packs them.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.fingerprint import generate_random_fingerprint
from transformers import AddedToken, AutoTokenizer

from caftune.checkpoints.opening import opening_tokenizer
from caftune.core.objective import IGNORED
from caftune.data.boundary import PairTokens, has_second_bos, tokenize_pairs, without_second_bos
from caftune.data.prompts import fix_dates, is_chat, with_fixed_date
from caftune.data.template_errors import (
    raise_for_lost_row,
    raise_for_refused_row,
    remove_byte_order_mark,
    template_in,
    warn_of_prompt_mismatch,
)
from caftune.errors import CaftuneError
from caftune.training._trl import SFTTrainer, get_training_chat_template, has_generation_markers
from caftune.training.checks import cut_length, find_truncated_rows, refuse_missing_parts
from caftune.training.config import CAFTConfig

_logger = logging.getLogger(__name__)
_RECORDED = 100  # numbers of left-out rows that are recorded
# Options of SFTConfig that say which tokens a row has, and which of them are trained on.
ROW_OPTIONS = (
    *("assistant_only_loss", "completion_only_loss", "truncation_mode"),
    *("chat_template_path", "eos_token", "pad_token"),
)
_TOKENS = Features({"input_ids": List(Value("int64")), "labels": List(Value("int64")), "apart": Value("bool")})


@dataclass(frozen=True)
class Prepared:
    """The prepared rows of a data set (`input_ids`, `labels`), and the numbers (from 0) of the rows left out."""

    rows: Dataset
    total: int  # rows before any were left out
    dropped: list[int] = field(default_factory=list)

    @property
    def facts(self) -> dict[str, Any]:
        """The entry of results.jsonl for the rows left out."""
        return {"count": len(self.dropped), "of": self.total, "rows": self.dropped[:_RECORDED]}


def prepare(dataset: Dataset, tokenizer: Any, args: CAFTConfig, *, name: str, source: str | None = None) -> Prepared:
    """`input_ids` and `labels` as a trainer of `args` would make them, before shuffling and packing.

    Rows that `max_length` leaves without a token to train on are left out, and logged.

    Args:
        source: the file or hub id of the rows, for errors.

    Raises:
        CaftuneError: no row with a token to train on, options that do not fit the tokenizer, a row that the chat template
            refuses or leaves out in part, or one whose prompt and completion cannot be tokenized separately.
    """
    refuse_missing_parts(dataset, args, name=name)
    refuse_other_values(args)
    tokenizer, source = copy.deepcopy(tokenizer), source or f"the {name} data"
    _apply_tokenizer_options(tokenizer, args)
    template = None  # None: the tokenizer's own
    if args.assistant_only_loss:
        template = _marked_template(dataset, tokenizer, name)
    template = _fix_dates(tokenizer, template)
    dataset = _with_one_bos(dataset, tokenizer, name)
    rows = _tokenized(dataset, tokenizer, template, args, name, source)
    if name == "train":
        warn_of_prompt_mismatch(dataset, tokenizer, template, source)
    length, mode = _cut(args, name)
    if length is None:
        return Prepared(rows, len(rows))
    dropped, shortened = find_truncated_rows(rows, length, mode, name=name)
    kept = rows.select(sorted(set(range(len(rows))) - set(dropped))) if dropped else rows
    return Prepared(_shorten(kept, length, mode, name) if shortened else kept, len(rows), dropped)


def row_options(args: CAFTConfig, name: str) -> tuple[Any, ...]:
    """What decides on a data set's prepared rows. Trainings for which it is equal can share them."""
    return (name, *(getattr(args, option) for option in ROW_OPTIONS), *_cut(args, name))


def _cut(args: CAFTConfig, name: str) -> tuple[int | None, str]:
    """The length that rows are cut to, and which end is kept. SFTTrainer keeps the start of packed rows."""
    packing = args.packing if args.eval_packing is None or name != "eval" else args.eval_packing
    return cut_length(args, packing=packing), "keep_start" if packing else args.truncation_mode


def _tokenized(
    dataset: Dataset, tokenizer: Any, template: str | None, args: CAFTConfig, name: str, source: str
) -> Dataset:
    paired = {"prompt", "completion"} <= set(dataset.column_names)
    completion_only = paired if args.completion_only_loss is None else args.completion_only_loss
    if paired and not is_chat(dataset):
        return pair_tokens(dataset, tokenizer, name, completion_only=completion_only)
    if is_chat(dataset):
        raise_for_lost_row(dataset, tokenizer, template, source)
    # SFTTrainer prepares data in a method that reads these three attributes of the trainer and no others (TRL 1.16).
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer, chat_template=template, completion_only_loss=completion_only)
    whole = copy.copy(args)
    whole.shuffle_dataset, whole.max_length = False, None
    try:
        rows = SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, whole, False, None, name)
    except Exception:  # name the row, if the template refuses one; else raise the error unchanged
        raise_for_refused_row(dataset, tokenizer, template, source)
        raise
    return rows.remove_columns([column for column in rows.column_names if column == "completion_mask"])


def _shorten(rows: Dataset, length: int, mode: str, name: str) -> Dataset:
    part, columns = slice(length) if mode == "keep_start" else slice(-length, None), ("input_ids", "labels")
    return _mapped(
        rows,
        lambda batch: {column: [values[part] for values in batch[column]] for column in columns},
        desc=f"Truncating {name} dataset",
    )


def _mapped(rows: Dataset, function: Callable[..., dict[str, list[Any]]], **options: Any) -> Dataset:
    """`map` in batches, without a hash of the function: hashing a tokenizer takes seconds, and no cache is used."""
    return rows.map(function, batched=True, new_fingerprint=generate_random_fingerprint(), **options)


def _fix_dates(tokenizer: Any, template: str | None) -> str | None:
    """Fix the date in templates that write today's, as for prompts in generation."""
    fix_dates(tokenizer)
    return template if template is None else with_fixed_date(template)


def pair_tokens(dataset: Dataset, tokenizer: Any, name: str, *, completion_only: bool = True) -> Dataset:
    """`input_ids` and `labels` of prompts and completions that are text.

    Args:
        completion_only: leave the prompt's tokens out of the labels.

    Raises:
        CaftuneError: a row whose prompt and completion cannot be tokenized separately.
    """

    def tokens(rows: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        found: list[PairTokens] = []
        try:
            found.extend(tokenize_pairs(rows["prompt"], rows["completion"], tokenizer))
        except CaftuneError as error:
            raise CaftuneError(f"Row {numbers[len(found)]} (from 0) of the {name} data: {error}") from error
        unlabelled = [pair.prompt if completion_only else 0 for pair in found]
        return {
            "input_ids": [pair.ids for pair in found],
            "labels": [[IGNORED] * count + pair.ids[count:] for pair, count in zip(found, unlabelled, strict=True)],
            "apart": [pair.apart for pair in found],
        }

    options = {"remove_columns": dataset.column_names, "features": _TOKENS, "desc": f"Tokenizing {name} dataset"}
    made = _mapped(dataset, tokens, with_indices=True, **options)
    apart = [number for number, is_apart in enumerate(made["apart"]) if is_apart]
    what = "have a prompt whose end the tokenizer would merge with the completion"
    _warn(apart, made, name, f"{what}. Both are tokenized separately, as in generation.")
    return made.remove_columns("apart")


def _with_one_bos(dataset: Dataset, tokenizer: Any, name: str) -> Dataset:
    """The rows without a BOS at the start of their texts (rendered conversations), where the tokenizer adds one."""
    column = next((each for each in ("prompt", "text") if each in dataset.column_names), None)
    if column is None or is_chat(dataset):
        return dataset
    twice = [row for row, text in enumerate(dataset[column]) if has_second_bos(text, tokenizer)]
    if not twice:
        return dataset
    _warn(
        twice, dataset, name, f"begin with {tokenizer.bos_token}, which the tokenizer adds by itself. One BOS is kept."
    )
    return _mapped(dataset, lambda rows: {column: [without_second_bos(text, tokenizer) for text in rows[column]]})


def _warn(rows: list[int], dataset: Dataset, name: str, what: str) -> None:
    if rows:
        _logger.warning(f"{len(rows)} of {len(dataset)} {name} rows (the first is row {rows[0]}, from 0) {what}")


def refuse_other_values(args: CAFTConfig) -> None:
    """Refuse unknown values of options that SFTTrainer would check late."""
    known = {"truncation_mode": ("keep_start", "keep_end"), "packing_strategy": ("bfd", "bfd_split", "wrapped")}
    for option, values in known.items():
        if getattr(args, option) not in values:
            raise CaftuneError(
                f"{option} must be one of {', '.join(values)}, got {getattr(args, option)!r}. Change it."
            )


def _apply_tokenizer_options(tokenizer: Any, args: CAFTConfig) -> None:
    """What SFTTrainer's own __init__ does to the tokenizer before it prepares the data."""
    _refuse_no_token(args.eos_token, tokenizer, "eos_token")
    if args.eos_token is not None:
        tokenizer.eos_token = args.eos_token
    if args.chat_template_path is not None:
        _set_template(tokenizer, args.chat_template_path)
    _refuse_no_token(args.pad_token, tokenizer, "pad_token")
    remove_byte_order_mark(tokenizer)


def _refuse_no_token(token: str | None, tokenizer: Any, option: str) -> None:
    if token is not None and token not in tokenizer.get_vocab():
        raise CaftuneError(f"{option} must be a token of the tokenizer, got {token!r}. Name another.")


def _set_template(tokenizer: Any, place: str) -> None:
    """Set the tokenizer's chat template to that of a file or of another tokenizer."""
    is_file = place.endswith((".jinja", ".j2"))
    if Path(place).is_file() and not is_file:
        raise CaftuneError(f"chat_template_path must end in .jinja or .j2 if it is a file, got {place}. Rename it.")
    if not Path(place).exists() and (is_file or Path(place).is_absolute()):
        raise CaftuneError(
            f"chat_template_path must be a template file, a folder or a hub id, got {place}, which does not exist. "
            "Check the name."
        )
    given = template_in(place)
    if given is not None:
        tokenizer.chat_template = given
        return
    with opening_tokenizer(place, "chat_template_path"):
        source = AutoTokenizer.from_pretrained(place)
    if not source.chat_template:
        raise CaftuneError(
            f"chat_template_path must name a tokenizer with a chat template, got {place}, which has none. Name another."
        )
    _clone_chat_template(tokenizer, source)


def _clone_chat_template(tokenizer: Any, source: Any) -> None:
    """As TRL's `clone_chat_template`, which needs a model: template, added tokens, EOS, and a vocabulary padded to 64."""
    tokenizer.chat_template = source.get_chat_template()
    tokenizer.add_tokens(
        [token for token in source.added_tokens_decoder.values() if token.content not in tokenizer.vocab]
    )
    tokenizer.eos_token = source.eos_token
    number = 0
    while len(tokenizer.vocab) % 64:
        tokenizer.add_tokens(AddedToken(f"<extra_id_{number}>"))
        number += 1


def _marked_template(dataset: Dataset, tokenizer: Any, name: str) -> str | None:
    """The template that marks the assistant's turns; None where the tokenizer's does."""
    if not is_chat(dataset):
        raise CaftuneError(
            "assistant_only_loss must be used with conversations, got the columns "
            f"{', '.join(dataset.column_names)} in the {name} data. Leave it out, or write the rows as messages."
        )
    if not tokenizer.chat_template:
        raise CaftuneError(
            "assistant_only_loss must be used with a chat template, got a tokenizer without one. Leave it out, or name a "
            "template in chat_template_path."
        )
    if has_generation_markers(tokenizer.chat_template):
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        if "patching is not supported" not in str(error):
            raise
        raise CaftuneError(
            "assistant_only_loss must be used with a chat template that marks the assistant's turns, got one without "
            "{% generation %} ... {% endgeneration %} around them. Write a copy of it with these marks and name the file "
            "in chat_template_path, or leave assistant_only_loss out."
        ) from error
