"""Small files, read and written whole: a reader finds the old contents or the new ones, never a part."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from caftune.errors import CaftuneError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`, which replaces `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # another process may be writing the same file
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def refuse_filled_folder(folder: Path) -> None:
    """Raise CaftuneError where a folder to be written is a file, or holds files."""
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise CaftuneError(
            f"{folder} must be an empty or a new folder, got a file or a folder with files. Name another."
        )


def write_text(path: Path, text: str) -> None:
    """Write a file of text in UTF-8."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a file of JSON, indented."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write a file of one JSON value per line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def appended_lines(path: Path) -> Iterator[str]:
    """The lines of a file that is only appended to. A last line that a kill cut off is removed from the file.

    A whole JSON value without its line break stays: the kill cut off the line break alone, which is written. The file is
    changed after its last line was taken, so a reader that refuses a line leaves it as it is.
    """
    if not path.is_file():
        return
    *lines, tail = path.read_text(encoding="utf-8").split("\n")
    if is_json(tail):
        lines.append(tail)
    yield from lines
    if tail:
        write_text(path, "".join(f"{line}\n" for line in lines))


def is_json(text: str | bytes) -> bool:
    """Whether a text is one whole JSON value."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is no file.

    Raises:
        CaftuneError: the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise CaftuneError(f"{path} must be JSON, got something else ({error}). Make it again.") from error


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
