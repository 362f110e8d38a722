"""Tokenizing a data set exactly as the trainer does, without a trainer.

Text prompts and completions are tokenized by `pair_tokens`, with the same prompt tokens as in generation: see boundary.py.
"""

import copy
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.fingerprint import generate_random_fingerprint
from transformers import AddedToken, AutoTokenizer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from caftune.checkpoints.opening import opening_tokenizer
from caftune.data.boundary import PairTokens, has_second_bos, tokenize_pairs, without_second_bos
from caftune.data.prompts import is_chat, with_fixed_date
from caftune.data.template_errors import (
    raise_for_refused_row,
    remove_byte_order_mark,
    template_in,
    warn_of_prompt_mismatch,
)
from caftune.errors import CaftuneError
from caftune.training.checks import cut_length, refuse_many_dropped, refuse_missing_parts
from caftune.training.config import CAFTConfig
from caftune.training.trainer import CAFTTrainer

_logger = logging.getLogger(__name__)
_RECORDED = 100  # numbers of left-out rows that are recorded


@dataclass(frozen=True)
class Prepared:
    """The tokenized rows of a data set, and the numbers (from 0) of the rows left out: see `prepared`."""

    rows: Dataset
    total: int  # rows before any were left out
    dropped: list[int] = field(default_factory=list)

    @property
    def facts(self) -> dict[str, Any]:
        """The entry of results.jsonl for the rows left out."""
        return {"count": len(self.dropped), "of": self.total, "rows": self.dropped[:_RECORDED]}


def prepared(dataset: Dataset, tokenizer: Any, args: CAFTConfig, *, name: str, source: str | None = None) -> Prepared:
    """`input_ids` and `labels` as the trainer will make them, without a model, before shuffling and packing.

    The trainer takes them as they are. Rows that `max_length` leaves without a token to train on are left out, and logged.

    Args:
        source: the file or hub id of the rows, for errors.

    Raises:
        CaftuneError: no row with a token to train on, options that do not fit the tokenizer, a row that the chat template
            refuses, or one whose prompt and completion cannot be tokenized separately.
    """
    # SFTTrainer prepares data in a method; it reads these attributes and nothing else of the trainer (TRL 1.16).
    trainer = CAFTTrainer.__new__(CAFTTrainer)
    trainer.dropped_rows = {}
    refuse_missing_parts(dataset, args, name=name)
    _refuse_other_values(args)
    trainer._tokenizer, trainer.chat_template = copy.deepcopy(tokenizer), None
    _apply_tokenizer_options(trainer._tokenizer, args)
    paired = {"prompt", "completion"} <= set(dataset.column_names)
    trainer.completion_only_loss = paired if args.completion_only_loss is None else args.completion_only_loss
    if args.assistant_only_loss:
        _refuse_no_conversations(dataset, name)
        trainer.chat_template = _marked_template(trainer._tokenizer)
    _fix_template_dates(trainer)
    packing = args.packing if args.eval_packing is None or name != "eval" else args.eval_packing
    plain = copy.copy(args)
    plain.shuffle_dataset, plain.max_length = False, cut_length(args, packing=packing)
    if packing:
        plain.truncation_mode = "keep_start"  # SFTTrainer keeps the start of packed rows
    total, given = len(dataset), dataset
    if is_pair_of_texts(dataset):
        given = pair_tokens(dataset, trainer._tokenizer, name)
    try:
        rows = trainer._prepare_dataset(given, trainer._tokenizer, plain, False, None, name)
    except CaftuneError:
        raise
    except Exception:  # name the row, if the template refuses one; else raise the error unchanged
        raise_for_refused_row(dataset, trainer._tokenizer, trainer.chat_template, source or f"the {name} data")
        raise
    if name == "train":
        warn_of_prompt_mismatch(dataset, trainer._tokenizer, trainer.chat_template, source or "the train data")
    dropped = trainer.dropped_rows.get(name, [])
    if len(dropped) == total:
        refuse_many_dropped(dropped, total, plain.max_length, name=name)
    rows = rows.remove_columns([column for column in rows.column_names if column == "completion_mask"])
    return Prepared(rows, total, dropped)


def _fix_template_dates(trainer: Any) -> None:
    """Fix the date in templates that write today's (Llama 3's), as for prompts in generation."""
    own = trainer._tokenizer.chat_template
    if isinstance(own, dict):
        trainer._tokenizer.chat_template = {name: with_fixed_date(template) for name, template in own.items()}
    elif own is not None:
        trainer._tokenizer.chat_template = with_fixed_date(own)
    if trainer.chat_template is not None:
        trainer.chat_template = with_fixed_date(trainer.chat_template)


def is_pair_of_texts(dataset: Dataset) -> bool:
    """Whether the rows are prompts and completions that are text."""
    return {"prompt", "completion"} <= set(dataset.column_names) and not is_chat(dataset)


def pair_tokens(dataset: Dataset, tokenizer: Any, name: str) -> Dataset:
    """`input_ids` and `completion_mask` of prompts and completions that are text.

    Raises:
        CaftuneError: a row whose prompt and completion cannot be tokenized separately.
    """

    def tokens(rows: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        found: list[PairTokens] = []
        try:
            found.extend(tokenize_pairs(rows["prompt"], rows["completion"], tokenizer))
        except CaftuneError as error:
            raise CaftuneError(f"Row {numbers[len(found)]} (from 0) of the {name} data: {error}") from error
        masks = [[int(place >= pair.prompt) for place in range(len(pair.ids))] for pair in found]
        return {
            "input_ids": [pair.ids for pair in found],
            "completion_mask": masks,
            "apart": [pair.apart for pair in found],
        }

    features = Features(
        {"input_ids": List(Value("int64")), "completion_mask": List(Value("int64")), "apart": Value("bool")}
    )
    made = dataset.map(
        tokens,
        with_indices=True,
        batched=True,
        remove_columns=dataset.column_names,
        features=features,
        new_fingerprint=generate_random_fingerprint(),  # hashing a tokenizer takes seconds, and the cache is not used
        desc=f"Tokenizing {name} dataset",
    )
    apart = [number for number, is_apart in enumerate(made["apart"]) if is_apart]
    if apart:
        _logger.warning(
            f"{len(apart)} of {len(made)} {name} rows (the first is row {apart[0]}, from 0) have a prompt whose end the "
            "tokenizer would merge with the completion. Both are tokenized separately, as in generation."
        )
    return made.remove_columns("apart")


def with_one_bos(dataset: Dataset, tokenizer: Any, name: str) -> Dataset:
    """The rows without a BOS at the start of their texts (rendered conversations), where the tokenizer adds one."""
    column = next((each for each in ("prompt", "text") if each in dataset.column_names), None)
    if column is None or is_chat(dataset):
        return dataset
    twice = [row for row, text in enumerate(dataset[column]) if has_second_bos(text, tokenizer)]
    if not twice:
        return dataset
    _logger.warning(
        f"{len(twice)} of {len(dataset)} {name} rows (the first is row {twice[0]}, from 0) begin with {tokenizer.bos_token}, "
        "which the tokenizer adds by itself. One BOS is kept."
    )
    return dataset.map(lambda row: {column: without_second_bos(row[column], tokenizer)})


def _refuse_other_values(args: CAFTConfig) -> None:
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
        raise CaftuneError(f"chat_template_path must end in .jinja or .j2 where it is a file, got {place}. Rename it.")
    if not Path(place).exists() and (is_file or Path(place).is_absolute()):
        raise CaftuneError(
            f"chat_template_path must be a template file, a folder or a hub id, and {place} does not exist. Check the name."
        )
    given = template_in(place)
    if given is not None:
        tokenizer.chat_template = given
        return
    with opening_tokenizer(place, "chat_template_path"):
        source = AutoTokenizer.from_pretrained(place)
    if not source.chat_template:
        raise CaftuneError(
            f"chat_template_path must name a tokenizer with a chat template, and {place} has none. Name another."
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


def _refuse_no_conversations(dataset: Dataset, name: str) -> None:
    if not is_chat(dataset):
        raise CaftuneError(
            f"assistant_only_loss must be used with conversations, and the {name} data has the columns "
            f"{', '.join(dataset.column_names)} of text or tokens. Leave it out, or write the rows as messages."
        )


def _marked_template(tokenizer: Any) -> str | None:
    """The template that marks the assistant's turns; None where the tokenizer's does."""
    if not tokenizer.chat_template:
        raise CaftuneError(
            "assistant_only_loss needs conversations and a chat template, and the tokenizer has none. Leave it out, or name a "
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
            "assistant_only_loss must be used with a chat template that marks the assistant's turns, and this tokenizer's has "
            "no {% generation %} ... {% endgeneration %} around them. Write a copy of it with these marks and name the file "
            "in chat_template_path, or leave assistant_only_loss out."
        ) from error
