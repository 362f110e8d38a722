"""Self-generated responses: the base model answers prompts, and its answers are what the heads are pretrained on.

Every answer is kept in a cache, a JSONL file that is only appended to, under a key of what was asked: prompt, sampling, seed
and model. A stopped run goes on where it was, a second run asks nothing, and a changed recipe asks only what is new to it.
Labels hold token ids beside the text, so that stage 1 trains on exactly the tokens the model chose, its own end-of-text
included, and an answer cut off by `max_new_tokens` gets no false end.
Source: METHOD "head pretraining" of arXiv 2506.07833 (pseudo-labels written by the model itself).
"""

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from caftune.core.objective import IGNORED
from caftune.data.boundary import plain_text
from caftune.data.prompts import Conversation, Prompt, answer_tokens, decoded
from caftune.errors import CaftuneError
from caftune.generation.backends import Answer, Backend, Failure, Sampling
from caftune.generation.progress import AnswersProgress, answers_progress


@dataclass(frozen=True)
class Label:
    """One answer: the `turn`-th of its row. `finish` is "stop" where the model ended it, "length" where `max_new_tokens` did.

    `exact`: the tokens are the model's own choice, not a spelling of the text that a server gave.
    """

    row: int
    turn: int
    prompt: str
    completion: str
    finish: Literal["stop", "length"]
    exact: bool
    prompt_ids: list[int]
    completion_ids: list[int]


@dataclass(frozen=True)
class Labelling:
    """What came of asking: the labels in the order of rows and turns, and what is missing."""

    labels: list[Label]
    failures: dict[int, str]  # row -> why it has no answer
    asked: int  # answers that were not in the cache
    dropped_turns: int  # later turns of conversations, without room in the context or after an answer that was cut off


class AnswerCache:
    """Answers on disk.

    An answer drawn with one `max_new_tokens` serves a smaller one too, cut; greedy ones that ended by themselves serve any
    larger one. (Of sampled ones, keeping those that ended would favour short answers.)
    """

    def __init__(self, path: Path, sampling: Sampling, *, seed: int, fingerprint: str) -> None:
        self.path, self._fingerprint = path, fingerprint
        self._draw(sampling, seed)
        self._kept: dict[str, tuple[Answer, int]] = {}
        if path.is_file():
            self._read()

    def drawn(self, sampling: Sampling, *, seed: int) -> "AnswerCache":
        """The same cache for other sampling settings, without reading the file again."""
        other = copy.copy(self)  # `_kept` is shared, so both see new answers
        other._draw(sampling, seed)
        return other

    def _draw(self, sampling: Sampling, seed: int) -> None:
        self._sampling = sampling
        drawn = (sampling.temperature, sampling.top_p, sampling.top_k, seed) if sampling.temperature else (0,)
        self._what = json.dumps([self._fingerprint, *drawn])

    def keys(self, prompts: Sequence[Prompt]) -> list[str]:
        """A key for each prompt. Where one is asked several times, each time is a draw of its own."""
        seen: Counter[str] = Counter()
        keys = []
        for prompt in prompts:
            asked = json.dumps(prompt.ids)
            keys.append(hashlib.sha256(f"{self._what} {seen[asked]} {asked}".encode()).hexdigest()[:32])
            seen[asked] += self._sampling.temperature > 0  # greedy answers are all the same
        return keys

    def find(self, key: str) -> Answer | None:
        """The answer under a key, as `max_new_tokens` of now would have it; None where it has to be asked."""
        found, budget = self._kept.get(key, (None, 0))
        allowed = self._sampling.max_new_tokens
        if found is None:
            return None
        if len(found.ids) > allowed:
            return Answer(found.ids[:allowed], "length", found.exact)
        is_final = budget >= allowed or (found.finish == "stop" and not self._sampling.temperature)
        return found if is_final else None

    def add(self, key: str, answer: Answer) -> None:
        """Keep an answer, on disk at once."""
        budget = self._sampling.max_new_tokens
        self._kept[key] = (answer, budget)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "max_new_tokens": budget, **asdict(answer)}) + "\n")

    def _read(self) -> None:
        *lines, tail = self.path.read_text(encoding="utf-8").split("\n")
        if tail and not _is_json(tail):  # a kill left it unfinished
            with self.path.open("r+b") as file:
                file.truncate(self.path.stat().st_size - len(tail.encode()))
            tail = ""
        for number, line in enumerate([*lines, tail] if tail else lines, start=1):
            try:
                row = json.loads(line)
                key, budget = row.pop("key"), int(row.pop("max_new_tokens"))
                self._kept[key] = (Answer(**row), budget)
            except (ValueError, TypeError, KeyError) as error:
                raise CaftuneError(
                    f"{self.path}, line {number}: not an answer ({error}). Remove the line and run again."
                ) from error
        if tail:  # cut off between the answer and its end of line: the next one must not follow on the same
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n")


def generate_labels(
    rows: Mapping[int, Conversation],
    tokenizer: Any,
    cache: AnswerCache,
    open_backend: Callable[[], Backend],
    *,
    room: int,
    ends: Sequence[int] = (),
) -> Labelling:
    """Let the model answer every turn of every row, one turn of all rows after another.

    Args:
        open_backend: called once, where there is something to ask.
        room: tokens that a prompt may have; later turns of a conversation that has outgrown them are dropped.
        ends: tokens that stop generation, besides the tokenizer's EOS; they are not part of an answer's text.
    """
    labels: dict[tuple[int, int], Label] = {}
    failures: dict[int, str] = {}
    opened: list[Backend] = []
    asked = dropped = 0
    alive = {row: conversation for row, conversation in rows.items() if conversation.turns}
    for turn in range(max((len(conversation.turns) for conversation in alive.values()), default=0)):
        prompts = {
            row: conversation.prompt(turn, [labels[row, before].completion for before in range(turn)], tokenizer)
            for row, conversation in alive.items()
        }
        fitting = {row: prompt for row, prompt in prompts.items() if len(prompt.ids) <= room}
        keys = dict(zip(fitting, cache.keys(list(fitting.values())), strict=True))
        todo = {keys[row]: prompt for row, prompt in fitting.items() if cache.find(keys[row]) is None}
        if todo and not opened:
            opened.append(open_backend())
        asked += len(todo)
        name = "labels" if turn == 0 else f"labels, turn {turn + 1}"
        total = len(set(keys.values()))
        with answers_progress(total, total - len(todo), name) as progress:
            failed = _generate(todo, cache, opened[0], progress) if todo else {}
        failures |= {row: failed[key] for row, key in keys.items() if key in failed}
        for row, prompt in fitting.items():
            answer = cache.find(keys[row])
            if answer is not None:
                labels[row, turn] = _label(row, turn, prompt, answer, tokenizer, ends)
        goes_on = {row: c for row, c in alive.items() if len(c.turns) > turn + 1 and row not in failures}
        alive = {row: c for row, c in goes_on.items() if (row, turn) in labels and labels[row, turn].finish == "stop"}
        dropped += sum(len(c.turns) - turn - 1 for row, c in goes_on.items() if row not in alive)
        dropped += sum(row not in fitting for row in prompts)
    return Labelling([labels[place] for place in sorted(labels)], failures, asked, dropped)


def _generate(
    todo: Mapping[str, Prompt], cache: AnswerCache, backend: Backend, progress: AnswersProgress
) -> dict[str, str]:
    """Ask, keeping answers as they come. Returns the keys without one, and why."""
    failed = {}
    keys = list(todo)
    # A key is of the prompt, the recipe's seed and the number of the draw: an answer asked for again gets the same seed.
    for index, result in backend(list(todo.values()), [int(key[:7], 16) for key in keys]):
        if isinstance(result, Failure):
            failed[keys[index]] = result.reason
            progress.failed()
        else:
            cache.add(keys[index], result)
            progress.answered(len(result.ids))
    return failed


def _label(row: int, turn: int, prompt: Prompt, answer: Answer, tokenizer: Any, ends: Sequence[int]) -> Label:
    prompt_text, said = decoded(prompt.ids, answer.ids, tokenizer, ends)
    if prompt.messages is not None:  # an answer begins anew there
        said = plain_text(answer_tokens(answer.ids, tokenizer, ends), tokenizer)
    return Label(
        row=row,
        turn=turn,
        prompt=prompt_text,
        completion=said,
        finish=answer.finish,
        exact=answer.exact,
        prompt_ids=prompt.ids,
        completion_ids=answer.ids,
    )


def write_labels(labels: Sequence[Label], path: Path) -> None:
    """Write labels in their order, one JSON line each: the whole file or the one before, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(asdict(label), ensure_ascii=False) + "\n" for label in labels), "utf-8")
    partial.replace(path)


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
    """`row`, `input_ids` and `labels` of answers: only the model's own tokens are trained on.

    Answers that were cut off are left out unless `keep_truncated`, and so are empty ones.

    Raises:
        CaftuneError: no answer is left.
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


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
