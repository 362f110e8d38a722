"""The error class for what a user can fix, and the operating system's errors in the same form."""

import errno
import os
import re
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_WRONG_PATH = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP}
_OF_RUST = re.compile(r"\(os error (\d+)\)")  # how safetensors writes an error of the system
_OF_TORCH = re.compile(r"PytorchStreamWriter failed writing file|inline_container\.cc.*unexpected pos|iostream error")


class CaftuneError(ValueError):
    """A value, file, model or server that cannot be used. The message names the place, the value and the remedy.

    The command line shows it as one sentence. Every other exception is a fault of the program or of a library, and keeps its
    traceback.
    """


def not_utf8(path: str | Path, error: UnicodeDecodeError) -> CaftuneError:
    """The error for a text file that is not in UTF-8."""
    return CaftuneError(f"{path} must be text in UTF-8, got other bytes ({error}). Convert it, with iconv for example.")


def first_line(error: Exception) -> str:
    """The first line of an error's message, else the name of its class, to be part of a sentence."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")


def system_error(error: Exception) -> str | None:
    """A full disk, a permission or a wrong path, in one sentence with its remedy; None for every other error."""
    number = error.errno if isinstance(error, OSError) else _number_in(error)
    path = getattr(error, "filename", None)
    if number in _FULL:
        place = "The disk" if path is None else f"The disk of {path}"
        return (
            f"{place} is full ({os.strerror(number)}). Free some space, or use another output; then run the same command "
            "again: finished files are kept."
        )
    if number in _DENIED and path is not None:
        return f"{path} must be accessible, got: {os.strerror(number)}. Change its permissions, or use another path."
    if number in _WRONG_PATH and path is not None:
        return f"{path} cannot be used ({os.strerror(number)}). Name another path."
    return None


def _number_in(error: Exception) -> int | None:
    """The errno in the message of a library's error: safetensors, and torch when it writes a file."""
    if type(error).__name__ == "SafetensorError":
        found = _OF_RUST.search(str(error))
        return int(found[1]) if found else None
    return errno.ENOSPC if isinstance(error, RuntimeError) and _OF_TORCH.search(str(error)) else None
