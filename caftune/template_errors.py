"""What goes wrong with chat templates: an error within one, named with its row, and byte order marks of their files."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError

from caftune.errors import CaftuneError

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
def named_with_its_row(place: str) -> Iterator[None]:
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


def refuse_refused_row(rows: Dataset, tokenizer: Any, template: str | None, place: str) -> None:
    """Raise CaftuneError for the first of the rows that the chat template refuses; None where there is none.

    Args:
        template: in place of the tokenizer's own; None: that.
        place: what the rows are of: a file, for example.
    """
    for number, row in enumerate(rows):
        options = {"chat_template": template, "tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}
        with named_with_its_row(f"{place}, row {number} (from 0)"):
            for messages, is_open in _written(row):
                tokenizer.apply_chat_template(messages, add_generation_prompt=is_open, tokenize=False, **options)


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
