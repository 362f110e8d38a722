"""Rows of files and hub data sets, read one at a time and only as far as needed.

A source is a local .jsonl, .json or .csv file (also .gz), a .parquet file, or a hub id
`owner/name[@revision][/config][:split]`. `datasets` reads the hub only: its readers of files guess a type for each column (a
date becomes a timestamp, 1 next to 1.5 becomes 1.0, a key of one message is given to all), name no line in errors, and write
a copy of every file into the user's home.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, LargeList, List, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import constants, dataset_info
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import repo_folder_name

from caftune.data.table import patch_datasets_json
from caftune.errors import CaftuneError, not_utf8

_HUB_ID = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<configuration>[\w.-]+))?(:(?P<split>[\w.:\[\]%+-]+))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LONGEST_CELL = 2**31 - 1  # of a CSV, in characters: what a C long holds everywhere
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_KINDS = ".jsonl, .json, .csv (these also with .gz) or .parquet"
_BATCH = 1000  # rows taken from Arrow at a time
_HEAD = 1024  # bytes of a file that are looked at before it is read as text
_ONE_A_LINE = "One object per line? Name it .jsonl."
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class MalformedJson(Exception):
    """A malformed JSON text: the reason, and its line."""

    def __init__(self, reason: str, line: int = 1) -> None:
        super().__init__(reason)
        self.line = line


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        MalformedJson: it is not JSON, is nested too deeply for Python, holds an integer too long for it, an object with
            a key twice (all but the last would be lost), or half of a surrogate pair, which is not a character.
    """
    try:
        found = _decoded(text)
        if "\\u" in text and _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise MalformedJson(error.msg, error.lineno) from error
    except RecursionError as error:
        raise MalformedJson("nested too deeply") from error
    except UnicodeEncodeError as error:
        raise MalformedJson(rf"\u{ord(error.object[error.start]):04x} is half of a surrogate pair") from error
    except ValueError as error:  # Python's limit on the digits of an integer
        raise MalformedJson(str(error).partition(";")[0]) from error
    return found


def _decoded(text: str) -> Any:
    """`_DECODER.decode` in half the time: it is called only where there is white space around the value."""
    try:
        found, end = _DECODER.raw_decode(text)
    except json.JSONDecodeError:  # it begins with white space, or is malformed
        return _DECODER.decode(text)
    return found if text[end:] in ("", "\n") else _DECODER.decode(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise MalformedJson(f"the key {twice!r} occurs twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


@dataclass(frozen=True)
class HubSource:
    """A data set on the hub."""

    repository: str
    revision: str | None = None
    configuration: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        parts = (("", self.repository), ("@", self.revision), ("/", self.configuration), (":", self.split))
        return "".join(f"{mark}{part}" for mark, part in parts if part is not None)

    @property
    def commit(self) -> str | None:
        """The revision where it is a commit, else None."""
        return self.revision if self.revision and _COMMIT.fullmatch(self.revision) else None


def hub_source(source: str) -> HubSource | None:
    """The data set on the hub that `source` names; None where it is a file or can only be a file's name."""
    is_path = source.startswith((".", "/")) or source.endswith((*_SUFFIXES, ".gz"))
    match = None if is_path or Path(source).exists() else _HUB_ID.fullmatch(source)
    return HubSource(**match.groupdict()) if match else None


def data_commit(source: HubSource) -> str | None:
    """The current commit of a data set, or the latest in the local cache; None where neither is known."""
    try:
        return dataset_info(source.repository, revision=source.revision).sha
    except (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__):  # reading the rows raises the error
        folder = repo_folder_name(repo_id=source.repository, repo_type="dataset")
        with suppress(OSError):
            return Path(constants.HF_HUB_CACHE, folder, "refs", source.revision or "main").read_text().strip()
        return None


def raw_rows(source: str, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a file or hub id, unchanged; the first `limit` of them where that is given.

    Raises:
        CaftuneError: no such file, a file that is damaged or not in UTF-8, a malformed line (with its number), or no rows.
    """
    if limit is not None and limit < 1:
        raise CaftuneError(f"limit must be at least 1, got {limit}. None means all rows.")
    is_empty = True
    for row in islice(_all_rows(source), limit):
        is_empty = False
        yield row
    if is_empty:
        raise CaftuneError(f"{source} is empty. Give at least one row.")


def _all_rows(source: str) -> Iterator[dict[str, Any]]:
    path = Path(source)
    if path.is_dir():
        raise CaftuneError(f"{source} must be a file or a hub id, got a folder. Name a file in it: {_KINDS}.")
    if path.is_file():
        return _file_rows(path)
    found = hub_source(source)
    if found is None:
        raise CaftuneError(f"{source} must be an existing file or a hub id (owner/name), got neither. Check the name.")
    return _hub_rows(found)


def _file_rows(path: Path) -> Iterator[dict[str, Any]]:
    suffix = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    readers = {".jsonl": _read_lines, ".json": _read_list, ".csv": _read_csv, ".parquet": _read_parquet}
    kind = suffix if suffix == ".parquet.gz" else suffix.removesuffix(".gz")
    if kind not in readers:
        raise CaftuneError(f"{path} must end in {_KINDS}, got {suffix!r}. Convert or rename it.")
    try:
        yield from readers[kind](path)
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error
    except (EOFError, gzip.BadGzipFile, zlib.error, pa.ArrowInvalid) as error:
        raise CaftuneError(f"{path} is damaged or cut off ({error}). Copy it again.") from error


@contextmanager
def _open(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        if b"\0" in file.peek(_HEAD)[:_HEAD]:  # type: ignore[union-attr]
            raise CaftuneError(
                f"{path} must be text in UTF-8, got NUL bytes, as UTF-16 has. Convert it, with "
                "`iconv -f UTF-16 -t UTF-8` for example."
            )
        # utf-8-sig: as UTF-8, and a byte order mark at the start, which Windows editors write, is left out
        yield io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)  # type: ignore[type-var]


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except MalformedJson as error:
                raise CaftuneError(
                    f"{path}, line {number}: malformed JSON ({error}). Fix or remove the line."
                ) from error
            if not isinstance(row, dict):
                raise CaftuneError(
                    f"{path}, line {number}: must be a JSON object, got {type(row).__name__}. Fix or remove the line."
                )
            yield row


def _read_list(path: Path) -> Iterator[dict[str, Any]]:
    with _open(path) as file:
        try:
            rows = parse_json(file.read())
        except MalformedJson as error:
            remedy = _ONE_A_LINE if str(error) == "Extra data" else "Fix the file."
            raise CaftuneError(f"{path}, line {error.line}: malformed JSON ({error}). {remedy}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CaftuneError(f"{path} must hold a JSON list of objects. {_ONE_A_LINE}")
    yield from rows


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    usual = csv.field_size_limit(_LONGEST_CELL)
    try:
        with _open(path, newline="") as file:  # keeps line ends within cells as they are
            reader: Any = csv.DictReader(file, strict=True)
            names = reader.fieldnames or ()
            twice = next((name for number, name in enumerate(names) if name and name in names[:number]), None)
            if twice is not None:
                raise CaftuneError(
                    f"{path} must have columns of different names, got {twice!r} twice. Rename or remove one."
                )
            for number, row in enumerate(reader):
                if any(surplus := row.pop(None, [])):
                    raise CaftuneError(
                        f"{path}, row {number} (from 0) must have {len(row)} cells, as the first line has, got {surplus} "
                        "beyond them. Put texts with commas in quotes."
                    )
                yield row
    except csv.Error as error:
        raise CaftuneError(
            f"{path} is malformed CSV ({error}). Close every quote, and double those within quotes."
        ) from error
    finally:
        csv.field_size_limit(usual)


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_BATCH):
            yield from _from_arrow(
                Dataset(pa.Table.from_batches([batch]).replace_schema_metadata(file.schema_arrow.metadata))
            )


def _hub_rows(source: HubSource) -> Iterator[dict[str, Any]]:
    configuration = () if source.configuration is None else (source.configuration,)
    more = {} if source.revision is None else {"revision": source.revision}
    try:
        table: Any = load_dataset(source.repository, *configuration, split=source.split or "train", **more)
    except (OSError, ValueError, DatasetsError) as error:
        raise CaftuneError(
            f"{source} must be a file or a data set on the hub, got neither ({error}). A hub id is "
            "owner/name[/config][:split], or owner/name@revision with the rest."
        ) from error
    _refuse_other_commit(source, table)
    for start in range(0, len(table), _BATCH):
        yield from _from_arrow(table.select(range(start, min(start + _BATCH, len(table)))))


def _refuse_other_commit(source: HubSource, table: Any) -> None:
    """Without the hub, `datasets` loads the newest rows in the cache, at any commit."""
    folders = [Path(file["filename"]).parts for file in table.cache_files]
    if source.commit and not all(source.commit in parts for parts in folders):
        raise CaftuneError(
            f"{replace(source, revision=None)} must be in the local cache at commit {source.commit} when the hub is not "
            "reachable, got another commit only. Run the command where the hub can be reached."
        )


def _from_arrow(table: Dataset) -> list[dict[str, Any]]:
    """The rows of a Dataset. Arrow gives a nested value every key that any row has; those without a value are left out."""
    patch_datasets_json()
    return [
        {name: _with_own_keys(value, table.features[name]) for name, value in row.items()} for row in table.to_list()
    ]


def _with_own_keys(value: Any, feature: Any) -> Any:
    if isinstance(feature, dict) and value is not None:
        return {key: _with_own_keys(item, feature[key]) for key, item in value.items() if item is not None}
    if isinstance(feature, List | LargeList) and value is not None:
        return [_with_own_keys(item, feature.feature) for item in value]
    return value  # also Json, which keeps its own keys
