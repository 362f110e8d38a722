"""What goes wrong with chat templates: errors, byte order marks, prompts that are written otherwise than in training."""

import json
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError

from caftune.errors import CaftuneError

_logger = logging.getLogger(__name__)
_COMPARED = 200  # rows, spread evenly
_SHOWN = 8  # tokens of what differs
BYTE_ORDER_MARK = "\ufeff"
_TEMPLATE = "<template>"  # the file that jinja2 names in the traceback of an error within a template


def remove_byte_order_mark(tokenizer: Any) -> None:
    """Take the mark off the tokenizer's own chat template, which would write it before every conversation."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str) and template.startswith(BYTE_ORDER_MARK):
        tokenizer.chat_template = template.removeprefix(BYTE_ORDER_MARK)


def template_in(path: str | None) -> str | None:
    """The chat template that a file (.jinja, .j2) holds, without a byte order mark; None where `path` is no such file.

    Raises:
        CaftuneError: the file is not in UTF-8.
    """
    if path is None or not path.endswith((".jinja", ".j2")) or not Path(path).is_file():
        return None
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CaftuneError(
            f"{path} must be text in UTF-8, and is not ({error}). Convert it, with iconv for example."
        ) from error


@contextmanager
def name_row_in_errors(place: str) -> Iterator[None]:
    """Raise what a chat template raises within the block as a CaftuneError that names the row; other errors as they are."""
    try:
        yield
    except Exception as error:
        if not _is_of_a_template(error):
            raise
        raise CaftuneError(
            f"{place}: the chat template refuses this conversation ({error}). Fix or remove the row, or use a template that "
            "can write it (trainer.chat_template_path)."
        ) from error


def raise_for_refused_row(rows: Dataset, tokenizer: Any, template: str | None, place: str) -> None:
    """Raise CaftuneError for the first of the rows that the chat template refuses; None where there is none.

    Args:
        template: in place of the tokenizer's own; None: that.
        place: what the rows are of: a file, for example.
    """
    for number, row in enumerate(rows):
        options = {"chat_template": template, "tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}
        with name_row_in_errors(f"{place}, row {number} (from 0)"):
            for messages, is_open in _written(row):
                tokenizer.apply_chat_template(messages, add_generation_prompt=is_open, tokenize=False, **options)


def warn_of_prompt_mismatch(rows: Dataset, tokenizer: Any, template: str | None, place: str) -> None:
    """Warn where the last answers of rows do not follow, in training, the prompt behind which a model generates them.

    Some chat templates open a thought in the generation prompt alone (DeepSeek-R1's distillates'): a model is then trained on
    one text and gets another. Two hundred rows are compared, by their tokens.

    Args:
        template: that of training, in place of the tokenizer's own, with which models are asked; None: that.
        place: what the rows are of: a file, for example.
    """
    compared = range(0, len(rows), -(-len(rows) // _COMPARED) or 1)
    pairs = ((number, _prompt_and_whole(rows[number], tokenizer, template)) for number in compared)
    apart = [(number, *pair) for number, pair in pairs if pair and pair[1][: len(pair[0])] != pair[0]]
    if not apart:
        return
    number, prompt, whole = apart[0]
    start = next((i for i, (one, other) in enumerate(zip(prompt, whole, strict=False)) if one != other), len(whole))
    before, asked, trained = (
        tokenizer.decode(ids)
        for ids in (prompt[max(0, start - _SHOWN) : start], prompt[start:], whole[start:][:_SHOWN])
    )
    _logger.warning(
        f"{len(apart)} of {len(compared)} rows of {place} that were compared (the first is row {number}, from 0) are trained "
        "on with other tokens before the answer than a model gets when it is evaluated or used: behind "
        f"{before!r} its prompt ends with {asked!r}, and training goes on with {trained!r}. Name a chat template that writes "
        "both alike in trainer.chat_template_path; it is exported with the model."
    )


def _prompt_and_whole(row: dict[str, Any], tokenizer: Any, template: str | None) -> tuple[list[int], list[int]] | None:
    """The tokens of a row up to its last answer, and with it; None for a row without, or one that the template refuses."""
    messages = row.get("messages") or []
    if messages and messages[-1]["role"] == "assistant":
        asked, whole = messages[:-1], messages
    elif isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        asked, whole = row["prompt"], row["prompt"] + row["completion"]
    else:
        return None
    tools = row.get("tools")
    options = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
    }
    how = {"return_dict": True, **options}
    try:
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, **how)["input_ids"] if asked else []
        return prompt, tokenizer.apply_chat_template(whole, **{"chat_template": template, **how})["input_ids"]
    except Exception as error:  # a template that refuses the row in training has been refused with it
        if not _is_of_a_template(error):
            raise
        return None


def _written(row: dict[str, Any]) -> list[tuple[list[Any], bool]]:
    """The conversations that are written of a row, and whether the assistant is to speak next."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(row.get("messages"), list):
        return [(row["messages"], False)]
    if isinstance(prompt, list):
        return [(prompt, True), *([(prompt + completion, False)] if isinstance(completion, list) else [])]
    return []


def _is_of_a_template(error: Exception) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return isinstance(error, TemplateError) or any(frame.f_code.co_filename == _TEMPLATE for frame, _ in frames)
