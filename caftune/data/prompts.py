"""Prompts for the base model: texts to continue, and conversations whose assistant turns it writes."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from caftune.data.boundary import adds_bos, has_second_bos, plain_text, split_prompt
from caftune.data.template_errors import BYTE_ORDER_MARK, MARK, name_row_in_errors, raise_for_lost_message
from caftune.errors import CaftuneError

_NAMED_ROWS = 5
# The date that chat templates write as today's, so that prompts are the same every day: the default of Llama 3's templates.
_FIXED_DATE = date(2024, 7, 26)
_DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


@dataclass(frozen=True)
class Prompt:
    """A prompt's token ids, and the text or messages they were made from (for servers that tokenize prompts themselves)."""

    ids: list[int]
    text: str | None = None  # of a plain text, without a BOS that the tokenizer adds
    messages: list[dict[str, Any]] | None = None  # of a conversation, up to the assistant's turn
    options: Mapping[str, Any] = field(default_factory=dict)  # of the chat template: tools, and the row's own arguments
    gap: str = ""  # white space at the end of the given text, which begins the answer: see boundary.py


@dataclass(frozen=True)
class Conversation:
    """One row: a text, or messages in which the model rewrites the assistant's turns one after another.

    An assistant turn that calls tools is kept, since the tools' results follow it; so is one before the first user message.
    """

    text: str = ""
    messages: list[dict[str, Any]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    place: str = "A conversation"  # its name in errors

    @property
    def turns(self) -> list[int]:
        """The indices of the messages that the model writes; the last is the end of the messages if these have no answer."""
        if self.messages is None:
            return [0]
        roles = [message["role"] for message in self.messages]
        first_user = roles.index("user") if "user" in roles else len(roles)
        written = [
            i
            for i, message in enumerate(self.messages)
            if i > first_user and message["role"] == "assistant" and not _calls_tools(message)
        ]
        return written if roles[-1:] == ["assistant"] else [*written, len(roles)]

    def prompt(self, turn: int, answers: Sequence[str], tokenizer: Any) -> Prompt:
        """The prompt of the `turn`-th answer (from 0), with the model's own `answers` in the turns before."""
        if self.messages is None:
            found = split_prompt(self.text, tokenizer)
            return Prompt(found.ids, text=found.text, gap=found.gap)
        messages = list(self.messages[: self.turns[turn]])
        for place, answer in zip(self.turns[:turn], answers, strict=True):
            messages[place] = {"role": "assistant", "content": answer}
        with name_row_in_errors(self.place):
            rendered = apply_template(messages, self.options, tokenizer, add_generation_prompt=True, return_dict=True)
        return Prompt(rendered["input_ids"], messages=messages, options=self.options)


def apply_template(messages: list[dict[str, Any]], options: Mapping[str, Any], tokenizer: Any, **how: Any) -> Any:
    """`tokenizer.apply_chat_template` with a fixed date for today, unless `options` name a date, and with a generation prompt.

    transformers 5.23 does not let us pass a function to a template, so calls of `strftime_now` are replaced by their result.
    Templates that know no `add_generation_prompt` (many of 2023) get the start of an answer that they write in training.
    """
    template = tokenizer.get_chat_template(options.get("chat_template"), options.get("tools"))
    options = {**options, "chat_template": with_fixed_date(template.removeprefix(BYTE_ORDER_MARK))}
    if how.get("add_generation_prompt") and "add_generation_prompt" not in template:
        text, start = _with_answer_start(messages, options, tokenizer)
        if start:
            return text + start if how.get("tokenize") is False else tokenizer(text + start, add_special_tokens=False)
    return tokenizer.apply_chat_template(messages, **options, **how)


def _with_answer_start(messages: list[dict[str, Any]], options: Mapping[str, Any], tokenizer: Any) -> tuple[str, str]:
    """A rendered conversation, and what the template writes between it and an answer; "" for white space alone."""
    answered = [*messages, {"role": "assistant", "content": MARK}]
    text, whole = (tokenizer.apply_chat_template(talk, tokenize=False, **options) for talk in (messages, answered))
    start, found, _ = whole.removeprefix(text).partition(MARK)
    return text, start if found and whole.startswith(text) and start.strip() else ""


def with_fixed_date(template: str) -> str:
    """The chat template with a fixed date in place of calls of `strftime_now`, in training and in generation."""
    return _DATE_CALL.sub(lambda call: json.dumps(_FIXED_DATE.strftime(call[2])), template)


def fix_dates(tokenizer: Any) -> None:
    """Fix the date in the tokenizer's own chat templates that write today's (Llama 3's)."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        tokenizer.chat_template = {name: with_fixed_date(each) for name, each in own.items()}
    elif own is not None:
        tokenizer.chat_template = with_fixed_date(own)


def conversations(
    rows: Dataset, tokenizer: Any, *, chat: bool | None = None, system: str | None = None, source: str = "The prompts"
) -> list[Conversation]:
    """The rows as conversations. `text` rows and empty prompts start from BOS alone.

    Args:
        chat: whether text prompts become user messages; None: see `is_in_conversation`.
        system: a system message for conversations that have none.
        source: the file or hub id of the rows, for errors.

    Raises:
        CaftuneError: messages, or a system message, for a tokenizer without a chat template; a `chat` that rows cannot have;
            a message that the chat template leaves out.
    """
    if is_chat(rows):
        refuse_messages_without_template(tokenizer)
    if not is_in_conversation(rows, tokenizer, chat):
        if system is not None:
            raise CaftuneError(
                "labels.system must be used with prompts that are messages, got text. Set labels.chat=true, or remove it."
            )
        return [Conversation(text=row.get("prompt") or "") for row in rows]
    found = [_from_row(row, system, f"{source}, row {number} (from 0)") for number, row in enumerate(rows)]
    raise_for_lost_message(((talk.messages or [], talk.options) for talk in found), tokenizer, source)
    return found


def is_chat(rows: Dataset) -> bool:
    """Whether the rows hold messages, alone or as prompt and completion."""
    return "messages" in rows.column_names or ("prompt" in rows.column_names and not isinstance(rows[0]["prompt"], str))


def is_in_conversation(rows: Dataset, tokenizer: Any, chat: bool | None = None, *, option: str = "labels.chat") -> bool:
    """Whether the rows are given to a model as conversations.

    Messages are. Text prompts are if `chat` is true; by default if the tokenizer has a chat template and the prompts are
    not already rendered (they do not begin with a special token).

    Raises:
        CaftuneError: a `chat` that the rows or the tokenizer cannot have, or prompts of which only some were rendered.
    """
    if is_chat(rows):
        if chat is False:
            raise CaftuneError(f"{option} must not be false for prompts that are messages. Remove it.")
        return True
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise CaftuneError(
            f"{option} must not be true for {tokenizer.name_or_path}, which has no chat template. Remove it."
        )
    if "prompt" not in rows.column_names:
        return False
    if chat is not None or not has_template:
        return bool(chat)
    special = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    rendered = [row for row, prompt in enumerate(rows["prompt"]) if prompt.lstrip().startswith(special)]
    if rendered and len(rendered) < len(rows):
        raise CaftuneError(
            f"{option} must be set if only some prompts begin with a special token of the tokenizer, got {len(rendered)} of "
            f"{len(rows)} (the first is row {rendered[0]}, from 0). Set true for user messages, false for text."
        )
    return not rendered


def decoded(prompt: Sequence[int], answer: Sequence[int], tokenizer: Any, ends: Sequence[int] = ()) -> tuple[str, str]:
    """The texts of a prompt and of its answer, decoded together: some decoders (Llama 2's) drop an answer's first space.

    See `answer_tokens` for what is not part of the answer's text. The prompt's text is without the BOS that the tokenizer adds.
    """
    is_empty = len(prompt) == 1 and prompt[0] in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    begin = int(is_empty or (adds_bos(tokenizer) and list(prompt[:1]) == [tokenizer.bos_token_id]))
    written = answer_tokens(answer, tokenizer, ends)
    before, whole = (plain_text(ids, tokenizer) for ids in (prompt[begin:], [*prompt[begin:], *written]))
    return before, whole.removeprefix(before) if whole.startswith(before) else plain_text(written, tokenizer)


def answer_tokens(answer: Sequence[int], tokenizer: Any, ends: Sequence[int] = ()) -> list[int]:
    """The tokens of an answer without `ends`, which stop generation, and without the tokenizer's EOS, padding and BOS."""
    silent = {*ends, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id}
    return [token for token in answer if token not in silent]


def refuse_messages_without_template(tokenizer: Any) -> None:
    """Raise CaftuneError where `tokenizer` cannot render messages."""
    if not getattr(tokenizer, "chat_template", None):
        raise CaftuneError(
            f"{tokenizer.name_or_path} must have a chat template for data with messages, got none. Use a chat "
            "model, give the tokenizer a chat_template, or use prompt and completion columns."
        )


def report_second_bos(texts: Sequence[str], tokenizer: Any, place: str) -> None:
    """Report on stderr the texts that already begin with the BOS that the tokenizer adds; prompts have it once."""
    twice = [row for row, text in enumerate(texts) if has_second_bos(text, tokenizer)]
    if twice:
        tqdm.write(
            f"{len(twice)} of {len(texts)} prompts of {place} (the first is row {twice[0]}, from 0) begin with "
            f"{tokenizer.bos_token}, which the tokenizer adds by itself. It is given once, not twice.",
            file=sys.stderr,
        )


def refuse_long_prompts(prompts: Mapping[int, Prompt], room: int) -> None:
    """Raise CaftuneError where a prompt is longer than the `room` that max_new_tokens leaves in the model's context."""
    long = [row for row, prompt in prompts.items() if len(prompt.ids) > room]
    if long:
        named = ", ".join(map(str, long[:_NAMED_ROWS])) + (", ..." if len(long) > _NAMED_ROWS else "")
        raise CaftuneError(
            f"{len(long)} of {len(prompts)} prompts (rows {named}, from 0) are longer than the {room} tokens that "
            "labels.max_new_tokens leaves in the model's context. Lower it, or set labels.skip_long_prompts=true."
        )


def _calls_tools(message: Mapping[str, Any]) -> bool:
    return bool(message.get("tool_calls") or message.get("function_call"))


def _from_row(row: Mapping[str, Any], system: str | None, place: str) -> Conversation:
    given = row.get("messages") or row["prompt"]
    if not given:  # an empty prompt starts from BOS alone
        return Conversation()
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else list(given)
    if system is not None and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": system})
    options = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}
    return Conversation(messages=messages, options=options, place=place)
