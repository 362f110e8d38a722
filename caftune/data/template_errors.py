"""Problems of chat templates: errors, lost messages, byte order marks, prompts that differ between training and generation."""

import json
import logging
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError

from caftune.errors import CaftuneError, not_utf8

_logger = logging.getLogger(__name__)
_COMPARED = 200  # rows, spread evenly
_SHOWN = 8  # tokens shown of each text
BYTE_ORDER_MARK = "\ufeff"
MARK = "caftune7mark"  # a text that no template writes by itself
_NEXT_TO_CALLS = "content (next to calls of tools)"
_TEMPLATE = "<template>"  # the file that jinja2 names in the traceback of an error within a template


def remove_byte_order_mark(tokenizer: Any) -> None:
    """Remove the mark from the tokenizer's chat template, which would write it before every conversation."""
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
        raise not_utf8(path, error) from error


@contextmanager
def name_row_in_errors(place: str) -> Iterator[None]:
    """Within the block errors of a chat template become CaftuneErrors that name the row; other errors pass."""
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
    """Raise CaftuneError for the first row that the chat template refuses, if there is one.

    Args:
        template: used instead of the tokenizer's; None: the tokenizer's.
        place: the source of the rows (a file, for example), for errors.
    """
    for number, row in enumerate(rows):
        options = {"chat_template": template, **_options(row)}
        with name_row_in_errors(f"{place}, row {number} (from 0)"):
            for messages, is_open in _written(row):
                tokenizer.apply_chat_template(messages, add_generation_prompt=is_open, tokenize=False, **options)


def raise_for_lost_row(rows: Dataset, tokenizer: Any, template: str | None, place: str) -> None:
    """`raise_for_lost_message` for the rows of a data set; the arguments are those of `raise_for_refused_row`."""
    last = ((_written(row)[-1:], {"chat_template": template, **_options(row)}) for row in rows)
    raise_for_lost_message(((messages, options) for found, options in last for messages, _ in found), tokenizer, place)


def raise_for_lost_message(
    conversations: Iterable[tuple[list[dict[str, Any]], Mapping[str, Any]]], tokenizer: Any, place: str
) -> None:
    """Raise CaftuneError for the first message that the chat template leaves out, or whose calls of tools it leaves out.

    Many templates skip without an error what they do not know: Qwen 3's the role `developer`, Llama 3's calls of tools,
    Llama 3.1's a content next to calls, Idefics 3's any content that is a text. A message of each kind is tried with a mark in
    place of its content, and of the names in its calls.

    Args:
        conversations: the messages of each row, and its options of the template.
        place: the source of the rows (a file, for example), for errors.
    """
    tried = set()
    for number, (messages, options) in enumerate(conversations):
        for index, message in enumerate(messages):
            for part, marked in _with_marks(message):
                kind = (message.get("role"), part, index == 0)
                # A text next to calls is often a thought, which templates remove where the final answer follows.
                after = [] if part == _NEXT_TO_CALLS else messages[index + 1 :]
                if kind in tried or not _leaves_out([*messages[:index], marked, *after], options, tokenizer):
                    tried.add(kind)
                    continue
                raise CaftuneError(
                    f"{place}, row {number} (from 0): the chat template must write the whole conversation, but leaves out "
                    f"the {part} of message {index} (from 0), role {message.get('role')}. Change the row, or use a template "
                    "that can write it (trainer.chat_template_path)."
                )


def warn_of_prompt_mismatch(rows: Dataset, tokenizer: Any, template: str | None, place: str) -> None:
    """Warn where the tokens before a row's last answer differ between training and generation.

    Some chat templates (of DeepSeek-R1's distillates) open a thought only in the generation prompt: the model is then
    prompted with a text that it was not trained on. The tokens of up to 200 rows are compared.

    Args:
        template: the training template; None: the tokenizer's, which is always used for generation.
        place: the source of the rows (a file, for example), for the warning.
    """
    compared = range(0, len(rows), -(-len(rows) // _COMPARED) or 1)
    pairs = ((number, _prompt_and_whole(rows[number], tokenizer, template)) for number in compared)
    apart = [(number, *pair) for number, pair in pairs if pair and pair[1][: len(pair[0])] != pair[0]]
    if not apart:
        return
    number, prompt, whole = apart[0]
    start = next((i for i, (one, other) in enumerate(zip(prompt, whole, strict=False)) if one != other), len(whole))
    shown = (prompt[max(0, start - _SHOWN) : start], prompt[start:], whole[start:][:_SHOWN])
    before, prompted, trained = map(tokenizer.decode, shown)
    _logger.warning(
        f"{len(apart)} of {len(compared)} rows of {place} that were compared (the first is row {number}, from 0) have other "
        "tokens before the answer in training than in evaluation and generation: after "
        f"{before!r} the prompt ends with {prompted!r}, and training continues with {trained!r}. Name a chat template that "
        "writes both alike in trainer.chat_template_path; it is exported with the model."
    )


def _prompt_and_whole(row: dict[str, Any], tokenizer: Any, template: str | None) -> tuple[list[int], list[int]] | None:
    """The tokens of a row without and with its last answer; None for a row without one, or one that the template refuses."""
    messages = row.get("messages") or []
    if messages and messages[-1]["role"] == "assistant":
        prompted, whole = messages[:-1], messages
    elif isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        prompted, whole = row["prompt"], row["prompt"] + row["completion"]
    else:
        return None
    how = {"return_dict": True, **_options(row)}
    try:
        prompt = tokenizer.apply_chat_template(prompted, add_generation_prompt=True, **how) if prompted else {}
        trained = tokenizer.apply_chat_template(whole, **{"chat_template": template, **how})
    except Exception as error:  # a row that the training template refuses was an error before
        if not _is_of_a_template(error):
            raise
        return None
    return prompt.get("input_ids", []), trained["input_ids"]


def _options(row: dict[str, Any]) -> dict[str, Any]:
    """A row's arguments of the chat template."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **(row.get("chat_template_kwargs") or {})}


def _written(row: dict[str, Any]) -> list[tuple[list[Any], bool]]:
    """The conversations that are rendered from a row, and whether each gets a generation prompt."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(row.get("messages"), list):
        return [(row["messages"], False)]
    if isinstance(prompt, list):
        return [(prompt, True), *([(prompt + completion, False)] if isinstance(completion, list) else [])]
    return []


def _with_marks(message: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The message with the mark in its calls of tools, and with the mark as its content; before each, the name of that part."""
    calls, call, content = (message.get(name) for name in ("tool_calls", "function_call", "content"))
    if calls and isinstance(calls, list):
        yield "calls of tools", {**message, "tool_calls": [_with_marked_name(each) for each in calls]}
    elif isinstance(call, dict):
        yield "call of a function", {**message, "function_call": _with_marked_name(call)}
    if isinstance(content, str) and content.strip():
        yield _NEXT_TO_CALLS if calls else "content", {**message, "content": MARK}


def _with_marked_name(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    return {**call, "function": {**function, "name": MARK}} if isinstance(function, dict) else {**call, "name": MARK}


def _leaves_out(messages: list[dict[str, Any]], options: Mapping[str, Any], tokenizer: Any) -> bool:
    """Whether the template writes a conversation without its mark. One that it refuses with the mark is not judged."""
    try:
        return MARK not in tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:
        if not _is_of_a_template(error):
            raise
        return False


def _is_of_a_template(error: Exception) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return isinstance(error, TemplateError) or any(frame.f_code.co_filename == _TEMPLATE for frame, _ in frames)
