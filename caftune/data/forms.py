"""Rows of any source in one of three forms that SFTTrainer knows: `messages`, `prompt` and `completion`, or `text`.

Alpaca (instruction, input, output), ShareGPT (conversations) and the reference implementation's rows (conversation, status)
are converted to the first two. Contents become text, and arguments of tool calls objects, as chat templates expect them.
None, "" and [] are missing values; 0 and false are not.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Json, Value

from caftune.data import table
from caftune.data.readers import MalformedJson, hub_source, parse_json, raw_rows
from caftune.errors import CaftuneError

_logger = logging.getLogger(__name__)
# Columns that accompany messages, and their values in rows without them.
_EXTRAS: dict[str, Any] = {"tools": None, "chat_template_kwargs": {}}
# Arguments of apply_chat_template that are no variables of a template, and that caftune gives itself.
_RESERVED = {
    *("conversation", "tokenize", "add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
}
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_NAMES = (
    *("prompt", "completion", "messages", "conversations", "text", "tools", "chat_template_kwargs", "system"),
    *("instruction", "input", "output", "response", "conversation", "status"),
)
_MEDIA = {"image", "images", "image_url", "video", "videos", "video_url", "audio", "audios", "input_audio"}
# The forms of plain text: the columns of each, in order.
_TEXTS: tuple[dict[str, None], ...] = ({"prompt": None, "completion": None}, {"prompt": None}, {"text": None})
_PLAIN, _TEXT = {tuple(form) for form in _TEXTS}, {str}
# Columns of the forms that come before the reference's where a row has both.
_BEFORE_REFERENCE = {"messages", "conversations", "instruction", *(name for form in _TEXTS for name in form)}


class NoFinishedRowError(CaftuneError):
    """All rows are failed generations of the reference's form."""


_SPEAKERS = {"human": "user", "gpt": "assistant"}  # roles by other names
_SHAREGPT_ROLES = {
    **{**_SPEAKERS, "user": "user", "assistant": "assistant", "system": "system"},
    **{"observation": "tool", "tool": "tool", "function_call": "assistant"},
}


def load_rows(
    source: str,
    columns: Mapping[str, str] | None = None,
    *,
    limit: int | None = None,
    chat: bool = False,
    texts_too: bool = False,
    place: str = "data.columns",
) -> Dataset:
    """Read a data source and bring its rows into one form.

    Args:
        source: a file or a hub id.
        columns: our name -> the source's name, for example {"prompt": "question", "completion": "answer"}. Columns that
            accompany messages or an instruction keep their own name where they are not listed.
        limit: number of rows to read, from the first; the rest of the file is not read.
        chat: turn alpaca rows into a conversation (for a base with a chat template) instead of plain text.
        texts_too: turn prompts and completions that are text into a conversation, too.
        place: where the recipe has `columns`, for errors.

    Raises:
        CaftuneError: no such file, a malformed line (with its number), no rows, or columns of no known form.
        NoFinishedRowError: see `_finished`.
    """
    rows = raw_rows(source, limit)
    if columns:
        first = next(rows)
        _check_columns(columns, first, source, place)
        rows = (_named(row, columns) for row in chain([first], rows))
    formed = (
        row if _is_plain(row) else _in_form(row, f"{source}, row {number} (from 0)", chat=chat, columns=place)
        for number, row in _finished(rows, source)
    )
    return _dataset((_as_conversation(row) for row in formed) if texts_too else formed, source)


def read_rows(source: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of a file or hub id; the first `limit` of them where that is given.

    They are unchanged, except for the reference's: one question and its answer are added as `prompt` and `completion`.

    Raises:
        CaftuneError: no such file, a malformed line (with its number), or no rows.
        NoFinishedRowError: see `_finished`.
    """
    return [_with_question(row) for _, row in _finished(raw_rows(source, limit), source)]


def _finished(rows: Iterator[dict[str, Any]], source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows and their numbers, without the reference's failed generations, which are counted and logged at the end.

    Raises:
        NoFinishedRowError: all rows are failed generations.
    """
    total, failed, first = 0, 0, ""
    for number, row in enumerate(rows):
        total += 1
        if not _is_failed(row):
            yield number, row
            continue
        what = f"status {_short(row.get('status'))}" if _is_given(row["conversation"]) else "no conversation"
        first = first or f"the first is row {number}, from 0, with {what}"
        failed += 1
    if failed == total:
        raise NoFinishedRowError(
            f"{source} must have a row with status OK and a conversation, got {total} failed generations ({first}). "
            "Generate them again, read more rows, or name another file."
        )
    if failed:
        _logger.warning(f"{failed} of {total} rows of {source} are failed generations and are left out ({first}).")


def _is_reference(row: Mapping[str, Any]) -> bool:
    """Whether a row has the form of the reference implementation's data."""
    return "conversation" in row and _BEFORE_REFERENCE.isdisjoint(row)


def _is_failed(row: Mapping[str, Any]) -> bool:
    """Whether a row of the reference's form has another status than OK, or no conversation (the reference skips these)."""
    if not _is_reference(row):
        return False
    status = row.get("status")
    return (_is_given(status) and status != "OK") or not _is_given(row["conversation"])


def _with_question(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the reference's form with its question and answer as text; any other row unchanged."""
    turns = row["conversation"] if _is_reference(row) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return row
    roles = [_SPEAKERS.get(str(turn.get("role")), turn.get("role")) for turn in turns]
    if roles != ["user", "assistant"]:
        return row
    return row | {"prompt": turns[0].get("content"), "completion": turns[1].get("content")}


def _check_columns(columns: Mapping[str, str], row: Mapping[str, Any], source: str, place: str) -> None:
    unknown = next((name for name in columns if name not in _NAMES), None)
    if unknown is not None:
        near = get_close_matches(unknown, _NAMES, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(_NAMES)}."
        raise CaftuneError(f"{place}.{unknown} is not one of caftune's names. {hint}")
    missing = [name for name in columns.values() if name not in row]
    if missing:
        raise CaftuneError(f"{source} has no column {missing[0]!r}; its columns are {', '.join(row)}. Fix {place}.")


def _named(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row with its columns renamed, and the optional columns (tools, system, ...) that are not renamed."""
    of_instruction = ["history", *([] if "input" in columns else ["input", "context"])]
    of_conversation = ["status"] if "conversation" in columns else []
    along = [*_EXTRAS, "system", *(of_instruction if "instruction" in columns else []), *of_conversation]
    unnamed = [name for name in along if name not in columns.values()]
    return {name: row[name] for name in unnamed if name in row} | {
        ours: row.get(name) for ours, name in columns.items()
    }


def refuse_unnamed_split(source: str, place: str) -> None:
    """Raise CaftuneError for a hub id without a split, which would mean `train`, where rows to evaluate on are expected."""
    found = None if Path(source).exists() else hub_source(source)
    if found is not None and found.split is None:
        raise CaftuneError(
            f"{place} must be a file that exists or name a split on the hub, got {source}, which would mean its split `train`. "
            f"Write {source}:test, for example."
        )


def _as_conversation(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a text prompt and completion as a user's and an assistant's message; any other row unchanged."""
    if not isinstance(row.get("prompt"), str) or "completion" not in row:
        return row
    turns = {"prompt": ("user", row["prompt"]), "completion": ("assistant", row["completion"])}
    return row | {name: [{"role": role, "content": text}] for name, (role, text) in turns.items()}


def _dataset(rows: Iterator[dict[str, Any]], source: str) -> Dataset:
    """Rows as a Dataset with unchanged values: nested ones as JSON, so that no key is added to a message or a tool."""
    first = next(rows)
    form = _form(first)
    names, is_plain = tuple(form), _is_plain(first)

    def alike() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(chain([first], rows)):
            is_alike = is_plain and tuple(row) == names and list not in map(type, row.values())
            if not is_alike and _form(row) != form:
                raise CaftuneError(
                    f"{source}, row {number} (from 0) must have the columns and types of the rows before it, and has others. "
                    "Fix or remove the row."
                )
            yield row

    features = Features({name: Json() if is_list else Value("string") for name, is_list in form.items()})
    return table.dataset(alike(), features, optional=_EXTRAS)


def _is_plain(row: Mapping[str, Any]) -> bool:
    """Whether a row is plain text in a known form: then checks are skipped, which take four times as long."""
    return tuple(row) in _PLAIN and {*map(type, row.values())} == _TEXT


def _form(row: Mapping[str, Any]) -> dict[str, bool]:
    """The columns of a row, and whether each holds messages or text."""
    return {name: isinstance(value, list) for name, value in row.items() if name not in _EXTRAS}


class _BadRow(Exception):
    """The fault of a row: "must ..." about the row itself, else about a part of it."""


def _must_be(what: str, expected: str, value: Any, remedy: str = "Fix the row.") -> _BadRow:
    return _BadRow(f"{what} must be {expected}, got {_short(value)}. {remedy}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _in_form(row: dict[str, Any], place: str, *, chat: bool, columns: str) -> dict[str, Any]:
    """A row in one of the three forms. `place` and `columns`: where the row is and where its columns are named, for errors."""
    try:
        return _with_system(_formed(row, chat=chat, columns=columns), row.get("system"))
    except RecursionError as error:
        raise CaftuneError(f"{place} must be nested less deeply. Fix or remove the row.") from error
    except _BadRow as error:
        link = " " if str(error).startswith("must ") else ": "
        raise CaftuneError(f"{place}{link}{error}") from error


def _formed(row: dict[str, Any], *, chat: bool, columns: str) -> dict[str, Any]:
    _refuse_media(row)
    if "instruction" in row and not {"messages", "conversations"} & row.keys():
        return _from_alpaca(row, chat=chat, columns=columns)
    extras = _extras(row)
    if "messages" in row:
        return {"messages": _conversation(row["messages"], "messages"), **extras}
    if "conversations" in row:
        return {"messages": _shared_conversation(row, "conversations"), **extras}
    if _is_reference(row):
        return {"messages": _shared_conversation(row, "conversation"), **extras}
    form = next((form for form in _TEXTS if row.keys() >= form.keys()), None)
    if form is not None:
        return {**_texts({name: row[name] for name in form}), **extras}
    raise _BadRow(
        f"must have the columns of a known form, got {', '.join(row)} (known: messages; prompt and completion; prompt alone, "
        f"to be answered; text; instruction and output; conversations; conversation). Name them in {columns}, such as "
        "{prompt: question}."
    )


def _with_system(row: dict[str, Any], system: Any) -> dict[str, Any]:
    """A row with the system message from its column `system`."""
    if not _is_given(system):
        return row
    if not isinstance(system, str):
        raise _must_be("system", "text", system, "Write it in quotes.")
    name = next((name for name in ("messages", "prompt") if isinstance(row.get(name), list)), None)
    if name is None:
        raise _BadRow(
            "must not have a system message, as the row is plain text. Remove the column, or put it before the prompt."
        )
    has_own = row[name][0]["role"] in ("system", "developer")
    return row if has_own else row | {name: [{"role": "system", "content": system}, *row[name]]}


def _extras(row: Mapping[str, Any]) -> dict[str, Any]:
    """The tools and template options of a row."""
    if row.keys().isdisjoint(_EXTRAS):
        return {}
    found = {name: _parsed(row[name], name) for name in _EXTRAS if row.get(name) not in (None, "")}
    tools, options = found.get("tools", []), found.get("chat_template_kwargs", {})
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _must_be("tools", "a list of JSON schemas", tools)
    if not isinstance(options, dict):
        raise _must_be("chat_template_kwargs", "an object", options)
    reserved = next((name for name in options if name in _RESERVED), None)
    if reserved is not None:
        raise _BadRow(f"chat_template_kwargs must hold variables of the chat template, got {reserved}. Remove it.")
    _refuse_non_json(found)
    return found


def _texts(values: dict[str, Any]) -> dict[str, Any]:
    """Columns that are all text, or all messages."""
    if all(isinstance(value, str) for value in values.values()):
        return values
    for name, value in values.items():
        _refuse_non_text(value, name, or_messages=name != "text")
    found = {name: _conversation(value, name) if isinstance(value, list) else value for name, value in values.items()}
    if len({type(value) for value in values.values()}) > 1:
        raise _BadRow(f"{' and '.join(values)} must both be text or both messages. Fix the row.")
    return found


# What is refused in any form.


def _is_given(value: Any) -> bool:
    """Whether an optional value is given: 0 and false count as given."""
    return value is not None and value not in ("", [], {})


def _parsed(value: Any, name: str) -> Any:
    """The value of a JSON text: tools of different schemas can only be kept as text in Arrow."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except MalformedJson as error:
        raise _BadRow(f"{name} must be JSON, got {_short(value)} ({error}). Write it with json.dumps.") from error


def _refuse_non_json(value: Any, name: str = "") -> None:
    """Refuse NaN, dates and bytes within messages and tools: a template would write their Python representation."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        what = f"must hold values that JSON can represent, got another ({error})"
        raise _BadRow(f"{name} {what}. Write it as text, or null for none.".lstrip()) from error


def _refuse_media(row: Mapping[str, Any], name: str = "") -> None:
    if _MEDIA.isdisjoint(row):
        return
    media = [key for key in row if key in _MEDIA and _is_given(row[key])]
    if media:
        raise _BadRow(f"{name} must be text only, got {media[0]}. Remove the row, or the column.".lstrip())


def _refuse_non_text(value: Any, name: str, *, or_messages: bool = False) -> None:
    if value is None:
        raise _BadRow(f"{name} must be given, got none. Fix or remove the row.")
    if isinstance(value, str) or (or_messages and isinstance(value, list) and _are_messages(value)):
        return
    is_nested = isinstance(value, list | dict)
    remedy = "Write it as one text (one row for each of several answers)." if is_nested else "Write it in quotes."
    raise _must_be(name, "text", value, remedy)


def _are_messages(value: list[Any]) -> bool:
    """Whether a list holds messages, malformed ones included, and not texts or parts of a content."""
    return not value or any(isinstance(item, dict) and {"role", "content"} & item.keys() for item in value)


# Messages. `name`: the column they are in.


def _conversation(turns: Any, name: str) -> list[dict[str, Any]]:
    """The messages in the form that all chat templates take: contents are text, arguments of tool calls objects."""
    turns = _parsed(turns, name)
    if not isinstance(turns, list) or not turns:
        raise _must_be(name, "a list of messages", turns, "Fix or remove the row.")
    found = [_turn(turn, name) for turn in turns]
    if not all(isinstance(value, str) for turn in found for value in turn.values()):
        _refuse_non_json(found)
    return found


def _turn(turn: Any, name: str) -> dict[str, Any]:
    role = turn.get("role") if isinstance(turn, dict) else None
    role = _SPEAKERS.get(role, role) if isinstance(role, str) else role
    if role not in _ROLES:
        raise _must_be(f"a role in {name}", f"one of {', '.join(_ROLES)}", role)
    given = {key: value for key, value in turn.items() if key == "content" or value not in (None, [])}
    found = {**given, "role": role}  # templates take a `tool_calls` that is null or [] for a call
    if "content" in turn:
        found["content"] = _content(turn["content"], name)
    if "tool_calls" in found:
        found["tool_calls"] = _calls(found["tool_calls"], name)
    if isinstance(found.get("function_call"), dict):  # OpenAI's form before there were tool_calls
        found["function_call"] = _with_arguments(found["function_call"], name)
    others = [value for key, value in found.items() if key not in ("role", "name", "content")]
    if found.get("content") is None and not (role == "assistant" and any(map(_is_given, others))):
        raise _must_be(f"content in {name}", "text", turn.get("content"), "Fix or remove the row.")
    return found


def _content(content: Any, name: str) -> str | None:
    """A content as text. Text parts are joined with nothing between them, as the templates of models with media do."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _must_be(f"content in {name}", "text", content, "Fix or remove the row.")
    kinds = [part.get("type", "text") for part in content if isinstance(part, dict)]
    if set(kinds) - {"text"}:
        raise _must_be(f"parts of a content in {name}", "of type text", kinds, "Remove the row.")
    return "".join(_part(part, name) for part in content) if content else None


def _part(part: Any, name: str) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    what = f"a part of a content in {name}"
    if not isinstance(text, str):
        raise _must_be(what, "text", part, 'Write it as {"type": "text", "text": "..."}.')
    if isinstance(part, dict):
        _refuse_media(part, what)
    return text


def _calls(calls: Any, name: str) -> list[dict[str, Any]]:
    calls = _parsed(calls, "tool_calls")
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise _must_be(f"tool_calls in {name}", "a list of calls", calls)
    return [
        {**call, "function": _with_arguments(call["function"], name)}
        if isinstance(call.get("function"), dict)
        else _with_arguments(call, name)
        for call in calls
    ]


def _with_arguments(function: dict[str, Any], name: str) -> dict[str, Any]:
    """A call with its arguments as an object, parsed where they were JSON in a text: templates write the JSON themselves."""
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return function
    if not arguments.strip():  # what servers give for a function without parameters
        return {**function, "arguments": {}}
    if not arguments.lstrip().startswith("{"):
        return function  # no object: the text is the argument
    return {**function, "arguments": _parsed(arguments, f"arguments of a call in {name}")}


# ShareGPT, the reference and alpaca.


def _shared_conversation(row: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The messages of a column of ShareGPT's or the reference's."""
    turns = _parsed(row[name], name)
    return _conversation([_from_sharegpt(turn, name) for turn in turns] if isinstance(turns, list) else turns, name)


def _from_sharegpt(turn: Any, name: str) -> Any:
    """A turn as a message. TRL's converter renames keys only: it keeps the roles human and gpt, and calls as text."""
    if not isinstance(turn, dict) or "role" in turn:
        return turn  # ChatML under ShareGPT's name
    speaker, value = turn.get("from", ""), turn.get("value")
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = f"one of {', '.join(_SHAREGPT_ROLES)}"
        raise _must_be(f"a speaker in {name}", known, turn.get("from"), "Rename it.")
    if speaker != "function_call":
        return {"role": role, "content": value}
    calls = _parsed(value, f"a function_call in {name}")
    calls = calls if isinstance(calls, list) and calls else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise _must_be(f"a function_call in {name}", "an object with name and arguments, or a list of them", value)
    return {"role": role, "content": None, "tool_calls": [{"type": "function", "function": call} for call in calls]}


def _from_alpaca(row: Mapping[str, Any], *, chat: bool, columns: str) -> dict[str, Any]:
    instruction = row["instruction"]
    answer = row["output"] if row.get("output") is not None else row.get("response")  # as Dolly calls it
    if _is_given(row.get("history")):
        raise _BadRow("must not have a history, which alpaca rows cannot keep. Write its turns as messages.")
    _refuse_non_text(instruction, "instruction")
    _refuse_non_text(answer, "output")
    more = _input(row, columns)
    prompt = instruction if more is None else f"{instruction}\n\n{more}"
    if chat:
        return _as_conversation({"prompt": prompt, "completion": answer})
    return {"prompt": f"{prompt}\n\n", "completion": answer}


def _input(row: Mapping[str, Any], columns: str) -> str | None:
    """The input of an instruction as text (numbers and booleans as in JSON); None where there is none."""
    given = [(name, row[name]) for name in ("input", "context") if _is_given(row.get(name))]
    if len(given) > 1:
        raise _BadRow(f"must have an input or a context, got both. Name one in {columns}, as {{input: context}}.")
    if not given:
        return None
    ((name, value),) = given
    if isinstance(value, str):
        return value
    if not isinstance(value, bool | int | float):
        raise _must_be(name, "text", value, "Write it as one text.")
    _refuse_non_json(value, name)
    return json.dumps(value)
