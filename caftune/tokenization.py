"""The tokens of a data set as the trainer will make them, before there is a trainer.

Rows whose prompt and completion are text are tokenized here (`pair_tokens`), as models get their prompts: see boundary.py.
"""

import copy
import logging
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.fingerprint import generate_random_fingerprint
from transformers import AutoTokenizer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from caftune.boundary import has_second_bos, split_prompt, tokenize_pair, without_second_bos
from caftune.config import CAFTConfig
from caftune.errors import CaftuneError
from caftune.prompts import is_chat
from caftune.template_errors import refuse_refused_row, remove_byte_order_mark, template_in
from caftune.trainer import CAFTTrainer

_logger = logging.getLogger(__name__)


def tokenized(dataset: Dataset, tokenizer: Any, args: CAFTConfig, *, name: str, source: str | None = None) -> Dataset:
    """`input_ids` and `labels` as the trainer will make them, without a model, before shuffling and packing.

    Args:
        source: the file or hub id that the rows are of, for errors.

    Raises:
        CaftuneError: rows whose answer lies wholly beyond `max_length`, counted and named; a row that the chat template
            refuses; a row whose prompt and completion cannot be tokenized apart.
    """
    # SFTTrainer prepares data in a method; it reads these three attributes and nothing else of the trainer (TRL 1.16).
    trainer = CAFTTrainer.__new__(CAFTTrainer)
    trainer._tokenizer, trainer.chat_template = copy.deepcopy(tokenizer), None
    _apply_tokenizer_options(trainer._tokenizer, args)
    paired = {"prompt", "completion"} <= set(dataset.column_names)
    trainer.completion_only_loss = paired if args.completion_only_loss is None else args.completion_only_loss
    if args.assistant_only_loss and not has_generation_markers(trainer._tokenizer.chat_template):
        trainer.chat_template = get_training_chat_template(trainer._tokenizer)
    plain = copy.copy(args)
    plain.shuffle_dataset = False
    if args.packing and args.packing_strategy == "bfd_split":
        plain.max_length = None  # what is beyond max_length becomes a document of its own
    if is_pair_of_texts(dataset):
        dataset = pair_tokens(dataset, trainer._tokenizer, name)
    try:
        prepared = trainer._prepare_dataset(dataset, trainer._tokenizer, plain, False, None, name)
    except CaftuneError:
        raise
    except Exception:  # it names no row; where none is refused by the template, it is of something else
        refuse_refused_row(dataset, trainer._tokenizer, trainer.chat_template, source or f"the {name} data")
        raise
    return prepared.remove_columns([column for column in prepared.column_names if column == "completion_mask"])


def is_pair_of_texts(dataset: Dataset) -> bool:
    """Whether the rows are prompts and completions that are text."""
    return {"prompt", "completion"} <= set(dataset.column_names) and not is_chat(dataset)


def pair_tokens(dataset: Dataset, tokenizer: Any, name: str) -> Dataset:
    """`input_ids` and `completion_mask` of prompts and completions that are text.

    Raises:
        CaftuneError: a row whose prompt and completion cannot be tokenized apart.
    """

    def tokens(row: dict[str, Any], number: int) -> dict[str, Any]:
        try:
            found = tokenize_pair(row["prompt"], row["completion"], tokenizer)
        except CaftuneError as error:
            raise CaftuneError(f"Row {number} (from 0) of the {name} data: {error}") from error
        mask = [int(place >= found.prompt) for place in range(len(found.ids))]
        return {"input_ids": found.ids, "completion_mask": mask, "apart": found.apart}

    features = Features(
        {"input_ids": List(Value("int64")), "completion_mask": List(Value("int64")), "apart": Value("bool")}
    )
    made = dataset.map(
        tokens,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=features,
        new_fingerprint=generate_random_fingerprint(),  # hashing a tokenizer takes seconds, and nothing is looked up by it
        desc=f"Tokenizing {name} dataset",
    )
    apart = [number for number, is_apart in enumerate(made["apart"]) if is_apart]
    if apart:
        _logger.warning(
            f"{len(apart)} of {len(made)} {name} rows (the first is row {apart[0]}, from 0) have a prompt whose end the "
            "tokenizer would join with the completion. They are tokenized apart, as the prompts are in generation."
        )
    return made.remove_columns("apart")


def split_texts(dataset: Dataset, tokenizer: Any, name: str) -> Dataset:
    """The rows with the white space between prompt and completion where a model writes it, for a trainer that tokenizes them.

    Raises:
        CaftuneError: a row whose prompt and completion have to be tokenized apart.
    """

    def split(row: dict[str, Any], number: int) -> dict[str, str]:
        if tokenize_pair(row["prompt"], row["completion"], tokenizer).apart:
            raise CaftuneError(
                f"Row {number} (from 0) of the {name} data has a prompt whose end the tokenizer joins with the completion, "
                "which chat_template_path cannot keep apart. End the prompt with a whole word, or name a .jinja file."
            )
        found = split_prompt(row["prompt"], tokenizer)
        return {"prompt": found.text, "completion": found.gap + row["completion"]}

    return dataset.map(split, with_indices=True)


def with_one_bos(dataset: Dataset, tokenizer: Any, name: str) -> Dataset:
    """Texts that begin with the BOS that the tokenizer adds (rendered conversations, say), without it: it would come twice."""
    column = next((each for each in ("prompt", "text") if each in dataset.column_names), None)
    if column is None or is_chat(dataset):
        return dataset
    twice = [row for row, text in enumerate(dataset[column]) if has_second_bos(text, tokenizer)]
    if not twice:
        return dataset
    _logger.warning(
        f"{len(twice)} of {len(dataset)} {name} rows (the first is row {twice[0]}, from 0) begin with {tokenizer.bos_token}, "
        "which the tokenizer adds by itself. It is trained on once, not twice."
    )
    return dataset.map(lambda row: {column: without_second_bos(row[column], tokenizer)})


def _apply_tokenizer_options(tokenizer: Any, args: CAFTConfig) -> None:
    """What SFTTrainer's own __init__ does to the tokenizer before it prepares the data."""
    if args.eos_token is not None:
        tokenizer.eos_token = args.eos_token
    if args.chat_template_path is not None:
        path = Path(args.chat_template_path)
        if not path.exists() and (args.chat_template_path.endswith((".jinja", ".j2")) or path.is_absolute()):
            raise CaftuneError(
                f"chat_template_path must be a template file, a folder or a hub id, and {path} is not there. Check the name."
            )
        given = template_in(args.chat_template_path)
        tokenizer.chat_template = given or AutoTokenizer.from_pretrained(args.chat_template_path).chat_template
    remove_byte_order_mark(tokenizer)
