"""Labels: the base model's own answers as a JSONL file, and as rows that heads are pretrained on.

Labels hold token ids besides the text, so that stage 1 trains on exactly the tokens the model chose: its end-of-text token is
included, and an answer cut off by `max_new_tokens` gets none.
Source: arXiv 2506.07833, head pretraining on pseudo-labels written by the model itself.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from datasets import Dataset

from caftune.core.objective import IGNORED
from caftune.errors import CaftuneError
from caftune.files import write_lines


@dataclass(frozen=True)
class Label:
    """One answer: the `turn`-th of its row.

    `finish`: "stop" if the model ended it, "length" if `max_new_tokens` did. `exact`: the tokens are the model's own choice,
    not a spelling of the text that a server gave.
    """

    row: int
    turn: int
    prompt: str
    completion: str
    finish: Literal["stop", "length"]
    exact: bool
    prompt_ids: list[int]
    completion_ids: list[int]


def write_labels(labels: Sequence[Label], path: Path) -> None:
    """Write labels in their order, one JSON line each."""
    write_lines(path, map(asdict, labels))


def read_labels(path: Path) -> list[Label]:
    """The labels of a file."""
    labels = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            labels.append(Label(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise CaftuneError(f"{path}, line {number}: not a label ({error}). Run `caftune label` again.") from error
    return labels


def label_dataset(labels: Sequence[Label], *, keep_truncated: bool = False) -> Dataset:
    """Columns `row`, `input_ids` and `labels`: only the tokens of answers are trained on.

    Empty answers are left out, and those that were cut off unless `keep_truncated`.

    Raises:
        CaftuneError: no answer remains.
    """
    kept = [label for label in labels if label.completion_ids and (keep_truncated or label.finish == "stop")]
    if not kept:
        raise CaftuneError(
            f"None of {len(labels)} answers was finished within labels.max_new_tokens, and answers that are cut off are not "
            "trained on. Raise labels.max_new_tokens, or set labels.keep_truncated=true."
        )
    return Dataset.from_list(
        [
            {
                "row": label.row,
                "input_ids": label.prompt_ids + label.completion_ids,
                "labels": [IGNORED] * len(label.prompt_ids) + label.completion_ids,
            }
            for label in kept
        ]
    )
