"""What a task is: rows of a data set turned into prompts, and completions turned into numbers.

A task is one file with one `Task` in it; `score` takes a completion, whoever wrote it. Rows are as their data sets publish
them; where a data set names its columns otherwise, `columns` says so.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caftune.errors import CaftuneError


def means(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each measure over the completions that have it.

    >>> means([{"exact": 1.0, "similarity": 0.5}, {"exact": 0.0}])
    {'exact': 0.5, 'similarity': 0.5}
    """
    names = dict.fromkeys(name for score in scores for name in score)
    found = {name: [score[name] for score in scores if name in score] for name in names}
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


@dataclass(frozen=True)
class Example:
    """One question."""

    id: str  # of its row
    prompt: str  # a text to be continued (in a conversation: what the user says)
    reference: Any  # what `score` compares with, JSON
    answer: str = ""  # a perfect one as the data set gives it, or empty; never shown to a model, not used for scores


@dataclass(frozen=True)
class Task:
    """A task of evaluation."""

    name: str  # as in `eval.tasks`
    primary: str  # the measure that is shown where one number is wanted
    # One row of the data set and its number -> an example. Raises CaftuneError if a column is missing.
    read: Callable[[Mapping[str, Any], int], Example]
    # (example, completion) -> measures of this completion; shares are between 0 and 1. An empty or senseless completion has
    # the lowest score, and never fails.
    score: Callable[[Example, str], dict[str, float]]
    max_new_tokens: int  # room that an answer needs
    columns: tuple[str, ...]  # that `read` looks for, optional ones included
    # The measures of all completions -> those of the whole. By default the mean of each, over the completions that have it (F1
    # over a data set, for example, is not a mean of F1s).
    combine: Callable[[Sequence[Mapping[str, float]]], dict[str, float]] = means
    stop: tuple[str, ...] = ()  # an answer is cut where one of these texts begins
    lower_is_better: frozenset[str] = frozenset()  # measures
    past: tuple[str, ...] = ()  # an answer with one of these texts is complete, not cut off; the text itself is kept

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A few rows of our own in the data set's format, for trying the task without its data."""
        lines = (Path(__file__).with_name("rows") / f"{self.name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def answers_file(task: str) -> str:
    """The name of the file with a task's scored answers: the task's own, without what a name of a file should not hold.

    >>> answers_file("gsm8k"), answers_file("lm_eval:arc/easy")
    ('gsm8k.jsonl', 'lm_eval-arc-easy.jsonl')
    """
    return re.sub(r"[^\w.-]", "-", task) + ".jsonl"


def unix_lines(text: str) -> str:
    r"""The text with \n for \r\n and \r."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def column(row: Mapping[str, Any], number: int, *names: str) -> Any:
    """The first of these columns that a row has.

    Raises:
        CaftuneError: it has none of them.
    """
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise CaftuneError(
        f"Row {number} (from 0) must have a column {' or '.join(names)}, got {', '.join(row)}. Fix the file, or name the "
        "column in eval.columns."
    )


def text(row: Mapping[str, Any], number: int, *names: str) -> str:
    """The first of these columns that a row has, which must hold a text.

    Raises:
        CaftuneError: it has none of them, or it is not a text.
    """
    found = column(row, number, *names)
    if not isinstance(found, str):
        raise CaftuneError(
            f"Row {number} (from 0): {' or '.join(names)} must be a text, got {type(found).__name__}. Write it as one text."
        )
    return found


def filled_text(row: Mapping[str, Any], number: int, *names: str) -> str:
    """The first of these columns that a row has, which must hold a text with more than white space.

    Raises:
        CaftuneError: it has none of them, or it is not such a text.
    """
    found = text(row, number, *names)
    if not found.strip():
        raise CaftuneError(
            f"Row {number} (from 0): {' or '.join(names)} must not be empty, got {found!r}. Remove the row."
        )
    return found


def identity(row: Mapping[str, Any], number: int, name: str) -> str:
    """What the row has in the column `name`, or else its number."""
    own = row.get(name)
    return str(number if own is None else own)


def until_stop(completion: str, stop: Sequence[str]) -> str:
    r"""The completion up to where the first of the stop texts begins.

    >>> until_stop("a + b\n\nQ: next", ["\n\nQ:"])
    'a + b'
    """
    ends = [completion.find(text) for text in stop]
    return completion[: min((end for end in ends if end >= 0), default=len(completion))]
