r"""The task `exact_match`: your own prompts and completions. An answer is right if it equals the completion to the letter.

Rows: columns `prompt` and `completion`, both texts, and `id` if present. These do not count: white space at both ends, line
ends (\r\n is \n), a byte order mark, Unicode composition (NFC: é is one character or two), and a thought that begins the
completion. An answer that means the same in other words is wrong.
"""

import unicodedata
from collections.abc import Mapping
from typing import Any

from caftune.errors import CaftuneError
from caftune.evals.task import Example, Task, identity, text, unix_lines
from caftune.evals.thought import without_thought


def read(row: Mapping[str, Any], number: int) -> Example:
    """A row as an example, with its `id` or else its number; the reference is its completion.

    Raises:
        CaftuneError: a column is missing or not a text, or the completion is empty, so that saying nothing would be right.
    """
    prompt, completion = text(row, number, "prompt"), text(row, number, "completion").strip()
    reference = without_thought(completion, prompt).strip()
    if not reference:
        found = "a thought alone" if completion else "white space"
        raise CaftuneError(f"Row {number} (from 0): completion must not be empty, got {found}. Remove the row.")
    return Example(identity(row, number, "id"), prompt, reference, completion)


def score(example: Example, completion: str) -> dict[str, float]:
    """`exact_match`: 1 for the reference to the letter."""
    return {"exact_match": float(_normalized(completion) == _normalized(example.reference))}


def _normalized(text: str) -> str:
    return unicodedata.normalize("NFC", unix_lines(text).strip("\ufeff").strip())


EXACT_MATCH = Task(
    name="exact_match",
    primary="exact_match",
    read=read,
    score=score,
    max_new_tokens=512,
    columns=("prompt", "completion", "id"),
)
