r"""The task `exact_match`: anybody's own prompts and completions. An answer is right if it is the completion to the letter.

Rows: those that a model is trained on, with the columns `prompt` and `completion`, both texts, and `id` where there is one. A
prompt is given as it is. White space at both ends of answer and completion does not count; within, it does, and so do case
and marks. Invisible differences do not count either: line ends (\r\n is \n), a byte order mark, and Unicode composition
(NFC: é is one character or two).
A thought that the completion begins with is taken off, as it is from the answers.

The least that can be said of an answer: one that means the same in other words is wrong. Where a task of its own fits the data,
it says more.
"""

import unicodedata
from collections.abc import Mapping
from typing import Any

from caftune.errors import CaftuneError
from caftune.evals.task import Example, Task, means, text, unix_lines
from caftune.evals.thought import without_thought


def read(row: Mapping[str, Any], number: int) -> Example:
    """A row as an example, under its own `id` or else its number; the reference is its completion.

    Raises:
        CaftuneError: a column is missing or holds something else than a text (a conversation, for example), or the completion
            is empty, so that saying nothing would be right.
    """
    prompt, completion = text(row, number, "prompt"), text(row, number, "completion").strip()
    reference = without_thought(completion, prompt).strip()
    if not reference:
        found = "a thought alone" if completion else "white space"
        raise CaftuneError(f"Row {number} (from 0): completion must not be empty, got {found}. Remove the row.")
    own = row.get("id")
    return Example(str(number if own is None else own), prompt, reference, completion)


def score(example: Example, completion: str) -> dict[str, float]:
    """`exact_match`: 1 for the reference to the letter, white space at both ends and its bytes aside."""
    return {"exact_match": float(_seen(completion) == _seen(example.reference))}


def _seen(text: str) -> str:
    text = unix_lines(text).strip("\ufeff").strip()
    return unicodedata.normalize("NFC", text)


EXACT_MATCH = Task(
    name="exact_match",
    primary="exact_match",
    read=read,
    score=score,
    combine=means,
    max_new_tokens=512,
    rows=(
        {"prompt": "The months in order: January, February,", "completion": " March"},
        {"prompt": "The word 'kayak' backwards: ", "completion": "kayak"},
        {"id": "sum", "prompt": "7 + 8 =", "completion": " 15"},
    ),
)
