"""One way to name data: a local .jsonl, .json or .csv file (also .gz), .parquet, or a hub id `owner/name[/config][:split]`.

Rows come out in one of three forms that SFTTrainer knows: `messages`, `prompt` and `completion`, or `text`.
Alpaca (instruction, input, output) and ShareGPT (conversations) rows are turned into the first two.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Json, LargeList, List, Value, load_dataset

from caftune.errors import CaftuneError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+){1,2}(:[\w.:\[\]%-]+)?")
# Columns that go along with messages, and what stands for them in rows without.
_EXTRAS: dict[str, Any] = {"tools": None, "chat_template_kwargs": {}}
_LONGEST_CELL = 2**31 - 1  # of a CSV, in characters: what a C long holds everywhere
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_KINDS = ".jsonl, .json, .csv (these also with .gz) or .parquet"
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_NAMES = (
    *("prompt", "completion", "messages", "conversations", "text", "tools", "chat_template_kwargs", "system"),
    *("instruction", "input", "output", "response"),
)
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def load_rows(
    source: str,
    columns: Mapping[str, str] | None = None,
    *,
    limit: int | None = None,
    chat: bool = False,
    texts_too: bool = False,
) -> Dataset:
    """Read a data source and bring its rows into one form.

    Args:
        source: a file or a hub id.
        columns: our name -> the source's name, for example {"prompt": "question", "completion": "answer"}. What goes along
            with messages or an instruction comes under its own name where it is not named.
        limit: use the first so many rows.
        chat: turn alpaca rows into a conversation (for a base with a chat template) instead of plain text.
        texts_too: prompts and completions that are text, too.

    Raises:
        CaftuneError: no such file, a malformed line (with its number), no rows, or columns of no known form.
    """
    rows = read_rows(source)
    rows = rows[:limit] if limit is not None else rows
    if columns:
        unknown = next((name for name in columns if name not in _NAMES), None)
        if unknown is not None:
            near = get_close_matches(unknown, _NAMES, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(_NAMES)}."
            raise CaftuneError(f"data.columns.{unknown} is not one of caftune's names. {hint}")
        missing = [name for name in columns.values() if name not in rows[0]]
        if missing:
            raise CaftuneError(
                f"{source} has no column {missing[0]!r}; its columns are {', '.join(rows[0])}. Mend data.columns."
            )
        along = [*_EXTRAS, "system", *(["input", "context", "history"] if "instruction" in columns else [])]
        unnamed = [name for name in along if name not in columns.values()]
        rows = [
            {name: row[name] for name in unnamed if name in row}
            | {ours: row.get(name) for ours, name in columns.items()}
            for row in rows
        ]
    formed = [_in_form(row, number, source, chat=chat) for number, row in enumerate(rows)]
    return _dataset([_as_conversation(row) for row in formed] if texts_too else formed, source)


def _as_conversation(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose prompt and completion are text, as a question and its answer; any other as it is."""
    if not isinstance(row.get("prompt"), str) or "completion" not in row:
        return row
    said = {"prompt": ("user", row["prompt"]), "completion": ("assistant", row["completion"])}
    return row | {name: [{"role": role, "content": text}] for name, (role, text) in said.items()}


def _dataset(rows: list[dict[str, Any]], source: str) -> Dataset:
    """Rows as a Dataset, every value as it was: nested ones as JSON, so that no key is added to a message or a tool."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    # The columns, and whether each holds messages or text.
    forms = [{name: isinstance(row[name], list) for name in row if name not in _EXTRAS} for row in rows]
    odd = next((number for number, form in enumerate(forms) if form != forms[0]), None)
    if odd is not None:
        raise CaftuneError(
            f"{source}, row {odd} (from 0) is of another form than the rows before it. Mend or remove the row."
        )
    filled = [{name: row.get(name, _EXTRAS.get(name)) for name in names} for row in rows]
    nested = {name for name in names if any(isinstance(row[name], list | dict) for row in filled)}
    features = Features({name: Json() if name in nested else Value("string") for name in names})
    return Dataset.from_list(filled, features=features)


def read_rows(source: str) -> list[dict[str, Any]]:
    """The rows of a file or hub id, as they are.

    Raises:
        CaftuneError: no such file, a malformed line (with its number), or no rows.
    """
    rows = _read(source)
    if not rows:
        raise CaftuneError(f"{source} is empty. Give at least one row.")
    return rows


def _read(source: str) -> list[dict[str, Any]]:
    path = Path(source)
    if path.is_dir():
        raise CaftuneError(f"{source} is a folder. Name a file in it: {_KINDS}.")
    if not path.is_file():
        return _read_hub(source)
    try:
        return _read_file(path)
    except UnicodeDecodeError as error:
        raise CaftuneError(
            f"{source} must be text in UTF-8, and is not ({error}). Convert it, with iconv for example."
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CaftuneError(f"{source} is damaged or cut off ({error}). Copy it again.") from error


def _read_file(path: Path) -> list[dict[str, Any]]:
    suffix = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    kind = suffix.removesuffix(".gz")
    if kind == ".jsonl":
        return _read_lines(path)
    if kind == ".json":
        return _read_list(path)
    if kind == ".csv":
        return _read_csv(path)
    if suffix == ".parquet":
        return _from_arrow(Dataset.from_parquet(str(path), keep_in_memory=True))
    raise CaftuneError(f"{path} must end in {_KINDS}, got {suffix!r}.")


def _read_hub(source: str) -> list[dict[str, Any]]:
    if not _is_hub_id(source):
        raise CaftuneError(f"{source} must be an existing file or a hub id (owner/name), and there is no such file.")
    place, _, split = source.partition(":")
    owner, name, *configuration = place.split("/")
    try:
        return _from_arrow(load_dataset(f"{owner}/{name}", *configuration, split=split or "train"))
    except (OSError, ValueError) as error:
        raise CaftuneError(
            f"{source} is no file, and the hub gave no such data set ({error}). A hub id is owner/name[/config][:split]."
        ) from error


def _is_hub_id(source: str) -> bool:
    is_path = source.startswith((".", "/")) or source.endswith((*_SUFFIXES, ".gz"))
    return not is_path and _HUB_ID.fullmatch(source) is not None


def refuse_unnamed_split(source: str, place: str) -> None:
    """Refuse a hub id that would stand for the rows that models are trained on, where they are to be evaluated.

    Raises:
        CaftuneError: no split is named, which is `train` then.
    """
    if not Path(source).exists() and _is_hub_id(source) and ":" not in source:
        raise CaftuneError(
            f"{place} must be a file that exists or name a split on the hub, got {source}, which would mean its split `train`. "
            f"Write {source}:test, for example."
        )


def _from_arrow(table: Any) -> list[dict[str, Any]]:
    """The rows of a Dataset. Arrow gives a nested value every key that any row has; those without a value are left out."""
    return [
        {name: _with_own_keys(value, table.features[name]) for name, value in row.items()} for row in table.to_list()
    ]


def _with_own_keys(value: Any, feature: Any) -> Any:
    if isinstance(feature, dict) and value is not None:
        return {key: _with_own_keys(item, feature[key]) for key, item in value.items() if item is not None}
    if isinstance(feature, List | LargeList) and value is not None:
        return [_with_own_keys(item, feature.feature) for item in value]
    return value  # Json among them, which has the keys it was written with


def _open(path: Path) -> Any:
    # utf-8-sig: as UTF-8, and a byte order mark at the start, which Windows editors write, is left out
    return gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else path.open(encoding="utf-8-sig")


def _read_csv(path: Path) -> list[dict[str, Any]]:
    usual = csv.field_size_limit(_LONGEST_CELL)
    try:
        with _open(path) as file:
            rows: list[dict[Any, Any]] = list(csv.DictReader(file, strict=True))
    except csv.Error as error:
        raise CaftuneError(
            f"{path} is malformed CSV ({error}). Close every quote, and double those within quotes."
        ) from error
    finally:
        csv.field_size_limit(usual)
    for number, row in enumerate(rows):
        surplus = row.pop(None, [])
        if any(surplus):
            raise CaftuneError(
                f"{path}, row {number} (from 0) must have {len(row)} cells, as the first line has, got {surplus} beyond them. "
                "Put texts with commas in quotes."
            )
    return rows


def _read_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise CaftuneError(
                    f"{path}, line {number}: malformed JSON ({error.msg}). Mend or remove the line."
                ) from error
            if not isinstance(row, dict):
                raise CaftuneError(f"{path}, line {number}: must be a JSON object, got {type(row).__name__}.")
            rows.append(row)
    return rows


def _read_list(path: Path) -> list[dict[str, Any]]:
    with _open(path) as file:
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise CaftuneError(f"{path}, line {error.lineno}: malformed JSON ({error.msg}). Mend the file.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CaftuneError(f"{path} must hold a JSON list of objects. One object per line? Name it .jsonl.")
    return rows


def _in_form(row: dict[str, Any], number: int, source: str, *, chat: bool) -> dict[str, Any]:
    return _with_system(_formed(row, number, source, chat=chat), row.get("system"), number, source)


def _parsed(value: Any, name: str, number: int, source: str) -> Any:
    """What stands as JSON in a text: Arrow has no other way to keep schemas of tools."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise CaftuneError(
            f"{source}, row {number} (from 0): {name} must be JSON, got {value!r}. Mend the row."
        ) from error


def _with_system(row: dict[str, Any], system: Any, number: int, source: str) -> dict[str, Any]:
    """A row with the system message that stands in a column of its own."""
    if not system:
        return row
    name = next((name for name in ("messages", "prompt") if isinstance(row.get(name), list)), None)
    if name is None:
        raise CaftuneError(
            f"{source}, row {number} (from 0) has a system message, and the row is plain text. Remove the column, or put it "
            "before the prompt."
        )
    has_own = row[name][0]["role"] in ("system", "developer")
    return row if has_own else row | {name: [{"role": "system", "content": system}, *row[name]]}


def _formed(row: dict[str, Any], number: int, source: str, *, chat: bool) -> dict[str, Any]:
    _refuse_media(row, number, source)
    if "instruction" in row and not {"messages", "conversations"} & row.keys():
        return _from_alpaca(row, number, source, chat=chat)
    extras = {name: _parsed(row[name], name, number, source) for name in _EXTRAS if row.get(name)}
    if "messages" in row:
        return {"messages": _conversation(row["messages"], "messages", number, source), **extras}
    if "conversations" in row:
        turns = [_message(turn, number, source) for turn in row["conversations"] or []]
        return {"messages": _conversation(turns, "conversations", number, source), **extras}
    for form in (("prompt", "completion"), ("prompt",), ("text",)):
        if set(form) <= set(row):
            _refuse_no_texts({name: row[name] for name in form}, number, source)
            return {name: row[name] for name in form} | extras
    raise CaftuneError(
        f"{source}, row {number} (from 0) has the columns {', '.join(row)}, of no form caftune knows (messages; prompt and "
        "completion; text; instruction and output; conversations). Name them in data.columns, such as "
        "{prompt: question, completion: answer}."
    )


def _refuse_media(row: Mapping[str, Any], number: int, source: str) -> None:
    media = [name for name in _MEDIA if row.get(name)]
    if media:
        raise CaftuneError(
            f"{source}, row {number} (from 0) has {media[0]}, and caftune trains on text alone. Remove the row, or the column."
        )


def _refuse_no_texts(values: Mapping[str, Any], number: int, source: str) -> None:
    for name, value in values.items():
        _refuse_no_text(value, name, number, source)
        if isinstance(value, list):
            _conversation(value, name, number, source)
    if len({type(value) for value in values.values()}) > 1:
        raise CaftuneError(
            f"{source}, row {number} (from 0): {' and '.join(values)} must both be text or both messages. Mend the row."
        )


def _refuse_no_text(value: Any, name: str, number: int, source: str) -> None:
    if value is None:
        raise CaftuneError(f"{source}, row {number} (from 0): {name} is missing. Mend or remove the row.")
    if not isinstance(value, str | list):
        raise CaftuneError(f"{source}, row {number} (from 0): {name} must be text, got {value!r}. Write it in quotes.")


def _conversation(turns: Any, name: str, number: int, source: str) -> list[Any]:
    """`turns` as they are, where every one can be written by a chat template."""
    place = f"{source}, row {number} (from 0)"
    if not isinstance(turns, list) or not turns:
        raise CaftuneError(f"{place}: {name} must be a list of messages, got {turns!r}. Mend or remove the row.")
    for turn in turns:
        role = turn.get("role") if isinstance(turn, dict) else None
        if role not in _ROLES:
            raise CaftuneError(
                f"{place}: a role in {name} must be one of {', '.join(_ROLES)}, got {role!r}. Mend the row."
            )
        content = turn.get("content")
        said = [value for key, value in turn.items() if key != "role" and value is not None]
        if not said or not isinstance(content, str | list | None):
            raise CaftuneError(f"{place}: content in {name} must be text, got {content!r}. Mend or remove the row.")
        kinds = [part.get("type") for part in content if isinstance(part, dict)] if isinstance(content, list) else []
        if set(kinds) - {"text"}:
            raise CaftuneError(
                f"{place}: {name} has a part of type {kinds}, and caftune trains on text alone. Remove the row."
            )
    return turns


def _message(turn: Any, number: int, source: str) -> Any:
    if not isinstance(turn, dict) or "role" in turn:
        return turn  # ChatML under ShareGPT's name
    role = _SHAREGPT_ROLES.get(turn.get("from", ""))
    if role is None:
        raise CaftuneError(f"{source}, row {number} (from 0): unknown speaker {turn.get('from')!r} in conversations.")
    return {"role": role, "content": turn.get("value")}


def _from_alpaca(row: Mapping[str, Any], number: int, source: str, *, chat: bool) -> dict[str, Any]:
    answer, more = row.get("output", row.get("response")), row.get("input") or row.get("context")  # as Dolly calls it
    if row.get("history"):
        raise CaftuneError(
            f"{source}, row {number} (from 0) has a history, which would be left out. Write its turns as messages."
        )
    _refuse_no_text(row["instruction"], "instruction", number, source)
    _refuse_no_text(answer, "output", number, source)
    prompt = row["instruction"] + (f"\n\n{more}" if more else "")
    if chat:
        return _as_conversation({"prompt": prompt, "completion": answer})
    return {"prompt": f"{prompt}\n\n", "completion": answer}
