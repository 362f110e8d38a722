"""The tokens of a data set as the trainer will make them, before there is a trainer."""

import copy
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from caftune.config import CAFTConfig
from caftune.errors import CaftuneError
from caftune.template_errors import refuse_refused_row, remove_byte_order_mark, template_in
from caftune.trainer import CAFTTrainer


def tokenized(dataset: Dataset, tokenizer: Any, args: CAFTConfig, *, name: str, source: str | None = None) -> Dataset:
    """`input_ids` and `labels` as the trainer will make them, without a model, before shuffling and packing.

    Args:
        source: the file or hub id that the rows are of, for errors.

    Raises:
        CaftuneError: rows whose answer lies wholly beyond `max_length`, counted and named; a row that the chat template
            refuses.
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
    try:
        return trainer._prepare_dataset(dataset, trainer._tokenizer, plain, False, None, name)
    except CaftuneError:
        raise
    except Exception:  # it names no row; where none is refused by the template, it is of something else
        refuse_refused_row(dataset, trainer._tokenizer, trainer.chat_template, source or f"the {name} data")
        raise


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
