"""What the base model is asked: texts to continue, and conversations whose assistant turns it writes."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from datasets import Dataset

from caftune.errors import CaftuneError
from caftune.template_errors import BYTE_ORDER_MARK, named_with_its_row

_NAMED_ROWS = 5
# The day on which everything is asked, where a chat template writes today's date: a question must be the same tomorrow. It is
# the day that Llama 3's own templates fall back on.
_TODAY = date(2024, 7, 26)
_ASKS_THE_DAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


@dataclass(frozen=True)
class Prompt:
    """One thing to be continued: its token ids, and what they were made from (for servers that tokenize themselves)."""

    ids: list[int]
    text: str | None = None  # of a plain text
    messages: list[dict[str, Any]] | None = None  # of a conversation, up to where the assistant speaks
    options: Mapping[str, Any] = field(default_factory=dict)  # of the chat template: tools, and the row's own arguments


@dataclass(frozen=True)
class Conversation:
    """One row: a text, or messages in which the model writes the assistant's turns anew, one after another.

    An assistant turn that calls tools stays as it is, for what the tools returned stands behind it; so does one before the
    user has said anything.
    """

    text: str = ""
    messages: list[dict[str, Any]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    place: str = "A conversation"  # the row that it is of, for errors

    @property
    def turns(self) -> list[int]:
        """Where the model speaks: message indices, ending with the end of the messages where nobody has answered yet."""
        if self.messages is None:
            return [0]
        asked = next((i for i, message in enumerate(self.messages) if message["role"] == "user"), len(self.messages))
        spoken = [
            i
            for i, message in enumerate(self.messages)
            if i > asked and message["role"] == "assistant" and not _calls_tools(message)
        ]
        is_open = not self.messages or self.messages[-1]["role"] != "assistant"
        return [*spoken, len(self.messages)] if is_open else spoken

    def prompt(self, turn: int, answers: Sequence[str], tokenizer: Any) -> Prompt:
        """What stands before the `turn`-th answer (from 0), with the model's own `answers` in the turns before."""
        if self.messages is None:
            return Prompt(_encode_text(self.text, tokenizer), text=self.text)
        asked = list(self.messages[: self.turns[turn]])
        for place, answer in zip(self.turns[:turn], answers, strict=True):
            asked[place] = {"role": "assistant", "content": answer}
        with named_with_its_row(self.place):
            ids = as_written(asked, self.options, tokenizer, add_generation_prompt=True, return_dict=True)["input_ids"]
        return Prompt(ids, messages=asked, options=self.options)


def as_written(messages: list[dict[str, Any]], options: Mapping[str, Any], tokenizer: Any, **how: Any) -> Any:
    """What `tokenizer.apply_chat_template` makes of messages, at any time: today is a fixed day, unless `options` give one.

    transformers 5.23 hands no function of ours to a template, so its calls of `strftime_now` are replaced by what they write.
    """
    template = tokenizer.get_chat_template(options.get("chat_template"), options.get("tools"))
    marked = template.removeprefix(BYTE_ORDER_MARK)
    dated = _ASKS_THE_DAY.sub(lambda call: json.dumps(_TODAY.strftime(call[2])), marked)
    return tokenizer.apply_chat_template(messages, **{**options, "chat_template": dated}, **how)


def conversations(
    rows: Dataset, tokenizer: Any, *, system: str | None = None, source: str = "The prompts"
) -> list[Conversation]:
    """The rows as conversations. `text` rows and empty prompts start from BOS alone.

    Args:
        system: a system message for conversations that have none.
        source: the file or hub id that the rows are of, for errors.

    Raises:
        CaftuneError: messages, or a system message, for a tokenizer without a chat template.
    """
    if not is_chat(rows):
        if system is not None:
            raise CaftuneError("labels.system needs prompts that are messages, and these are text. Remove it.")
        return [Conversation(text=row.get("prompt") or "") for row in rows]
    refuse_messages_without_template(tokenizer)
    return [_from_messages(row, system, f"{source}, row {number} (from 0)") for number, row in enumerate(rows)]


def is_chat(rows: Dataset) -> bool:
    """Whether the rows hold messages, alone or as prompt and completion."""
    return "messages" in rows.column_names or ("prompt" in rows.column_names and not isinstance(rows[0]["prompt"], str))


def decoded(prompt: Sequence[int], answer: Sequence[int], tokenizer: Any) -> tuple[str, str]:
    """The texts of a prompt and of the answer behind it: read alone, some decoders (Llama 2's) drop its first space."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *answer], skip_special_tokens=True)
    if whole.startswith(before):
        return before, whole.removeprefix(before)
    return before, tokenizer.decode(answer, skip_special_tokens=True)


def refuse_messages_without_template(tokenizer: Any) -> None:
    """Raise CaftuneError where `tokenizer` cannot render messages."""
    if not getattr(tokenizer, "chat_template", None):
        raise CaftuneError(
            f"The data has messages, and {tokenizer.name_or_path} has no chat template to write them with. Use a chat "
            "model, give the tokenizer a chat_template, or use prompt and completion columns."
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


def _from_messages(row: Mapping[str, Any], system: str | None, place: str) -> Conversation:
    messages = list(row.get("messages") or row["prompt"])
    if system is not None and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": system})
    options = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}
    return Conversation(messages=messages, options=options, place=place)


def _calls_tools(message: Mapping[str, Any]) -> bool:
    return bool(message.get("tool_calls"))


def _encode_text(prompt: str, tokenizer: Any) -> list[int]:
    ids = tokenizer(prompt)["input_ids"]
    while ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
        ids = ids[:-1]  # some tokenizers close every text with EOS; a prompt to be continued is not closed
    if ids:
        return ids
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [start]
