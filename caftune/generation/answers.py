"""A model's answers to prompts and conversations, from a cache or from a backend.

The cache is a JSONL file that is only appended to. An answer's key depends on the prompt, the sampling settings, the seed and
the model, so a stopped run resumes, and a changed recipe queries the model only for what is new.
"""

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache as call_once
from pathlib import Path
from typing import Any

from caftune.data.boundary import plain_text
from caftune.data.prompts import Conversation, Prompt, answer_tokens, decoded
from caftune.errors import CaftuneError
from caftune.files import appended_lines
from caftune.generation.backends import Answer, Backend, Failure, Sampling
from caftune.generation.labels import Label
from caftune.generation.progress import AnswersProgress, answers_progress


@dataclass(frozen=True)
class Labelling:
    """Answers in the order of rows and turns, and failures."""

    labels: list[Label]
    failures: dict[int, str]  # row -> why it has no answer
    queried: int  # answers that were not in the cache
    dropped_turns: int  # later turns of conversations: without room in the context, or after an answer that was cut off


class AnswerCache:
    """Answers on disk.

    An answer drawn with one `max_new_tokens` is cut for a smaller one. A greedy answer that ended by itself also serves a
    larger one; a sampled one does not, since keeping only those that ended would favour short answers.
    """

    def __init__(self, path: Path, sampling: Sampling, *, seed: int, fingerprint: str) -> None:
        self.path, self._fingerprint = path, fingerprint
        self._set_sampling(sampling, seed)
        self._kept: dict[str, tuple[Answer, int]] = {}
        if path.is_file():
            self._read()

    def drawn(self, sampling: Sampling, *, seed: int) -> "AnswerCache":
        """The same cache for other sampling settings, without reading the file again."""
        other = copy.copy(self)  # `_kept` is shared, so both see new answers
        other._set_sampling(sampling, seed)
        return other

    def _set_sampling(self, sampling: Sampling, seed: int) -> None:
        self._sampling = sampling
        drawn = (sampling.temperature, sampling.top_p, sampling.top_k, seed) if sampling.temperature else (0,)
        self._what = json.dumps([self._fingerprint, *drawn])

    def keys(self, prompts: Sequence[Prompt]) -> list[str]:
        """A key for each prompt. A prompt that occurs several times has several keys if answers are sampled."""
        seen: Counter[str] = Counter()
        keys = []
        for prompt in prompts:
            ids = json.dumps(prompt.ids)
            keys.append(hashlib.sha256(f"{self._what} {seen[ids]} {ids}".encode()).hexdigest()[:32])
            seen[ids] += self._sampling.temperature > 0
        return keys

    def find(self, key: str) -> Answer | None:
        """The answer under a key, cut to the current `max_new_tokens`; None if the model must be queried."""
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
        for number, line in enumerate(appended_lines(self.path), start=1):
            try:
                row = json.loads(line)
                key, budget = row.pop("key"), int(row.pop("max_new_tokens"))
                self._kept[key] = (Answer(**row), budget)
            except (ValueError, TypeError, KeyError) as error:
                raise CaftuneError(
                    f"{self.path}, line {number}: not an answer ({error}). Remove the line and run again."
                ) from error


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
        open_backend: called once, and only if an answer is not in the cache.
        room: tokens that a prompt may have; later turns of a conversation that exceeds them are dropped.
        ends: tokens that stop generation, besides the tokenizer's EOS; they are not part of an answer's text.
    """
    backend = call_once(open_backend)
    labels: dict[tuple[int, int], Label] = {}
    failures: dict[int, str] = {}
    queried = dropped = 0
    alive = {row: conversation for row, conversation in rows.items() if conversation.turns}
    for turn in range(max((len(conversation.turns) for conversation in alive.values()), default=0)):
        prompts = {
            row: conversation.prompt(turn, [labels[row, before].completion for before in range(turn)], tokenizer)
            for row, conversation in alive.items()
        }
        fitting = {row: prompt for row, prompt in prompts.items() if len(prompt.ids) <= room}
        keys = dict(zip(fitting, cache.keys(list(fitting.values())), strict=True))
        todo = {keys[row]: prompt for row, prompt in fitting.items() if cache.find(keys[row]) is None}
        queried += len(todo)
        total, name = len(set(keys.values())), "labels" if turn == 0 else f"labels, turn {turn + 1}"
        answering = backend() if todo else None  # loading a model has its own progress bars
        with answers_progress(total, total - len(todo), name) as progress:
            failed = _query(todo, cache, answering, progress) if answering else {}
        failures |= {row: failed[key] for row, key in keys.items() if key in failed}
        for row, prompt in fitting.items():
            answer = cache.find(keys[row])
            if answer is not None:
                labels[row, turn] = _label(row, turn, prompt, answer, tokenizer, ends)
        # A conversation continues after an answer that the model has ended.
        goes_on = {row: c for row, c in alive.items() if len(c.turns) > turn + 1 and row not in failures}
        alive = {row: c for row, c in goes_on.items() if (row, turn) in labels and labels[row, turn].finish == "stop"}
        dropped += sum(len(c.turns) - turn - 1 for row, c in goes_on.items() if row not in alive)
        dropped += sum(row not in fitting for row in prompts)
    return Labelling([labels[place] for place in sorted(labels)], failures, queried, dropped)


def _query(
    todo: Mapping[str, Prompt], cache: AnswerCache, backend: Backend, progress: AnswersProgress
) -> dict[str, str]:
    """Add the backend's answers to the cache as they come. Returns the keys without an answer, and why."""
    failed = {}
    keys = list(todo)
    # The seed is derived from the key, so a repeated query of the same prompt has the same seed.
    for index, result in backend(list(todo.values()), [int(key[:7], 16) for key in keys]):
        if isinstance(result, Failure):
            failed[keys[index]] = result.reason
            progress.failed()
        else:
            cache.add(keys[index], result)
            progress.answered(len(result.ids))
    return failed


def _label(row: int, turn: int, prompt: Prompt, answer: Answer, tokenizer: Any, ends: Sequence[int]) -> Label:
    text, completion = decoded(prompt.ids, answer.ids, tokenizer, ends)
    if prompt.messages is not None:  # the answer is a message, decoded without the text before it
        completion = plain_text(answer_tokens(answer.ids, tokenizer, ends), tokenizer)
    return Label(row, turn, text, completion, answer.finish, answer.exact, prompt.ids, answer.ids)
