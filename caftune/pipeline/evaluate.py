"""Evaluation of a model on tasks: it answers their prompts, the answers are scored, and both are written to files.

    output/eval/MODEL/TASK.jsonl      one line per example and run: prompt, completion (what is scored), measures. MODEL is
                                      `base`, `model` for the run's own, and for any other its last name and a short hash of
                                      its whole name
    output/eval/cache.jsonl           the answers by prompt and sampling: a stopped evaluation resumes, a second one queries
                                      nothing

Every number can be computed again from TASK.jsonl, without the model. Tasks of lm-evaluation-harness: see lm_eval_tasks.py.
"""

import difflib
import functools
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from caftune.data.forms import NoFinishedRowError, read_rows, refuse_unnamed_split
from caftune.data.prompts import Conversation, fix_dates, is_chat, report_second_bos
from caftune.errors import CaftuneError
from caftune.evals.proteins import PROTEINS, sequence_of
from caftune.evals.statistics import interval, load_scipy
from caftune.evals.task import Example, Task, answers_file, text, until_stop
from caftune.evals.tasks import TASKS
from caftune.evals.thought import split_thought
from caftune.files import write_lines
from caftune.generation.answers import AnswerCache, generate_labels
from caftune.generation.backends import Sampling
from caftune.generation.labels import Label
from caftune.pipeline.base_model import BaseModel, answer_backend, free_memory, who_answers
from caftune.pipeline.folder import RunFolder
from caftune.pipeline.lm_eval_tasks import (
    PREFIX,
    HarnessTask,
    KeptResponses,
    evaluate_harness,
    harness_model,
    read_harness_tasks,
)
from caftune.pipeline.run import Run
from caftune.pipeline.schema import DataSection, EvalSection, Recipe
from caftune.pipeline.stage_rows import read_task_rows
from caftune.pipeline.structures import check_structures, compare_structures


@dataclass(frozen=True)
class Result:
    """A task's measures for one model: of each run, in the order of their seeds."""

    task: str
    model: str
    examples: int
    runs: int
    measures: dict[str, list[float]]
    unfinished: int  # answers, of all runs, that max_new_tokens cut off
    chat: bool  # prompts were given in a conversation
    in_thought: int = 0  # answers of all runs that end within a thought; only the text before the thought is scored
    harness: dict[str, Any] | None = None  # of a task of lm-evaluation-harness: what a comparison needs to know of it


def evaluate_model(recipe: Recipe) -> list[Result]:
    """Evaluate `eval.model` on `eval.tasks`.

    Raises:
        CaftuneError: no such task, no data for it, or settings that cannot work together.
        CaftuneError: rows without what the task needs, or a package or permission that is missing.
    """
    run = Run.open(recipe)
    section, base, seed = run.recipe.eval, run.base, run.recipe.seed
    name, tasks = _model_of(section, base, run.folder), read_tasks(section)
    model = base.other(name, "eval.model" if name == section.model else "The model")
    label = label_of(name, base.name, run.folder, server=section.server.model if section.backend == "server" else None)
    evaluated = _EvaluatedModel(model, section, run.recipe.data, run.folder.path / "eval" / "cache.jsonl")
    results = []
    try:
        for task, examples in tasks:
            seeds = range(seed, seed + section.runs)
            if isinstance(task, HarnessTask):
                seeds = seeds if task.is_generated else seeds[:1]  # likelihoods are the same in all runs
                lines, result = evaluated.answer_harness(task, label, seeds)
            else:
                lines = evaluated.answer_all(task, examples, seeds)
                if task is PROTEINS and section.structures is not None:
                    evaluated.free()  # the folding model needs its memory
                    lines = with_structures(lines, section.structures)
                result = summarise(task, label, lines)
            write_lines(run.folder.path / "eval" / label / answers_file(task.name), lines)
            run.folder.record({"stage": f"eval {label} {task.name}", **asdict(result)})
            results.append(result)
    finally:
        evaluated.free()
    return results


class _EvaluatedModel:
    """The evaluated model, for all tasks: tokenizer, cached answers and weights are loaded once."""

    def __init__(self, model: BaseModel, section: EvalSection, data: DataSection, file: Path) -> None:
        self._model, self._section, self._file = model, section, file
        self._tokenizer = model.tokenizer()
        self._chat = asks_in_conversation(section, data, self._tokenizer)
        self._loaded: dict[str, Any] = {}  # the model itself

    @functools.cached_property
    def _cache(self) -> AnswerCache:
        """Its cached answers: weights are hashed and the file is read once for all tasks and runs."""
        fingerprint = self._model.fingerprint + who_answers(self._section)
        return AnswerCache(self._file, Sampling(), seed=0, fingerprint=fingerprint)

    def free(self) -> None:
        """Free the memory that the model takes."""
        self._loaded.clear()
        free_memory()

    @functools.cached_property
    def _responses(self) -> KeptResponses:
        """Its responses to the harness, read once for all tasks and runs."""
        file, tokenizer = self._file.with_name("lm_eval.jsonl"), self._model.tokenizer()
        fix_dates(tokenizer)

        def opened() -> Any:
            if "model" not in self._loaded:
                free_memory()
                self._loaded["model"] = self._model.load()
            return harness_model(self._loaded["model"], tokenizer, self._section.batch_size)

        return KeptResponses(file, self._model.fingerprint, tokenizer, opened)

    def answer_harness(
        self, task: HarnessTask, label: str, seeds: Sequence[int]
    ) -> tuple[list[dict[str, Any]], Result]:
        """The lines of TASK.jsonl, and the result, of a task of the harness."""
        lines, measures, about = evaluate_harness(task, self._responses, self._section, chat=self._chat, seeds=seeds)
        count = len(lines) // len(seeds)
        return lines, Result(task.name, label, count, len(seeds), measures, 0, self._chat, harness=about)

    def answer_all(self, task: Task, examples: Sequence[Example], seeds: Sequence[int]) -> list[dict[str, Any]]:
        """The lines of TASK.jsonl: the scored answer to every example in every run, of which each has a seed."""
        section, tokenizer, model = self._section, self._tokenizer, self._model
        sampling = Sampling(
            section.max_new_tokens or task.max_new_tokens, section.temperature, section.top_p, section.top_k
        )
        talks = dict(enumerate(_conversation_of(example, chat=self._chat) for example in examples))
        prompts = {number: talk.prompt(0, [], tokenizer) for number, talk in talks.items()}
        room = (model.context or sys.maxsize) - sampling.max_new_tokens - (section.backend == "server")
        long = [number for number, prompt in prompts.items() if len(prompt.ids) > room]
        if long:
            raise CaftuneError(
                f"{len(long)} of {len(talks)} prompts of {task.name} (the first is {examples[long[0]].id}) leave no room for "
                f"{sampling.max_new_tokens} tokens in the model's context. Lower eval.max_new_tokens, or use a model with a "
                "longer context."
            )
        opened = functools.cache(lambda: answer_backend(model, section, tokenizer, sampling, self._loaded))
        report_second_bos([talk.text for talk in talks.values()], tokenizer, f"eval.data.{task.name}")
        lines: list[dict[str, Any]] = []
        for run, seed in enumerate(seeds):
            cache = self._cache.drawn(sampling, seed=seed)
            found = generate_labels(talks, tokenizer, cache, opened, room=room, ends=model.stop_tokens(tokenizer))
            _refuse_failures(task, examples, found.failures)
            for label in found.labels:
                example = examples[label.row]
                scored = _scored(task, example, label, prompts[label.row].gap, tokenizer.decode(label.prompt_ids))
                lines.append({"run": run, "seed": seed, **asdict(example), **scored, "chat": self._chat})
        return lines


def _scored(task: Task, example: Example, label: Label, gap: str, read: str) -> dict[str, Any]:
    """What TASK.jsonl holds of one answer.

    Args:
        gap: white space that the example's prompt ends with, and the model was left to write.
        read: what the model read, with special tokens, which may open a thought.
    """
    said, in_thought = split_thought(label.completion.removeprefix(gap), read, example.prompt)
    completion = until_stop(said, task.stop)
    went_past = completion != said or any(text in said for text in task.past)
    finish = "stop" if went_past else label.finish
    scores = task.score(example, completion)
    return {"completion": completion, "scores": scores, "finish": finish, "in_thought": in_thought}


def asks_in_conversation(section: EvalSection, data: DataSection, tokenizer: Any) -> bool:
    """Whether prompts are given in a conversation: by default the form that data.train has and the model therefore knows.

    Raises:
        CaftuneError: a conversation without a chat template, or a data.train that cannot be read.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if section.chat and not has_template:
        raise CaftuneError(
            f"eval.chat must not be true for {tokenizer.name_or_path}, which has no chat template. Remove it."
        )
    return section.chat if section.chat is not None else has_template and not _is_trained_on_text(data)


def _is_trained_on_text(data: DataSection) -> bool:
    """Whether a model with a chat template is trained on plain text all the same."""
    if data.train is None:
        return False
    try:
        return not is_chat(read_task_rows(data, data.train, limit=1, chat=True))
    except NoFinishedRowError:  # the first row is a failed generation, so the others are conversations
        return False
    except CaftuneError as error:
        raise CaftuneError(
            f"eval.chat must be set if data.train cannot be read ({error}). Set true for a model trained in conversations, "
            "false for one trained on plain text."
        ) from error


def read_tasks(section: EvalSection) -> list[tuple[Task | HarnessTask, list[Example]]]:
    """The tasks of `eval` and their examples, after all checks that need no model. Raises what `evaluate_model` does.

    Examples of the harness are in its tasks.
    """
    known = f"Known: {', '.join(TASKS)}, and {PREFIX}NAME for those of lm-evaluation-harness."
    if not section.tasks:
        raise CaftuneError(f"eval.tasks must name tasks, got none. {known}")
    unknown = next((task for task in section.tasks if task not in TASKS and not task.startswith(PREFIX)), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, [*TASKS, PREFIX + unknown.rpartition(":")[2]], n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise CaftuneError(f"eval.tasks must hold names of tasks, got {unknown!r}. {hint}{known}")
    if section.runs > 1 and section.temperature == 0:
        raise CaftuneError("eval.runs must be 1 with eval.temperature 0: greedy answers are all the same.")
    if section.structures is not None:
        if PROTEINS.name not in section.tasks:
            raise CaftuneError(
                f"eval.structures needs the task {PROTEINS.name} in eval.tasks. Add it, or remove structures."
            )
        check_structures(section.structures)
    _refuse_unknown_columns(section.columns)
    load_scipy()
    found: dict[str, tuple[Task | HarnessTask, list[Example]]] = {}
    found |= {task: (TASKS[task], _examples(section, TASKS[task])) for task in section.tasks if task in TASKS}
    found |= {name: (task, []) for name, task in read_harness_tasks(section).items()}
    return [found[name] for name in dict.fromkeys(section.tasks)]


def _refuse_unknown_columns(columns: Mapping[str, str]) -> None:
    """Refuse a name that no task looks for: the column would be ignored, and a task's own prompt used, for example."""
    known = sorted({"prompt", *(name for task in TASKS.values() for name in task.columns)})
    unknown = next((name for name in columns if name not in known), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."
        raise CaftuneError(f"eval.columns.{unknown} is no column of a task. {hint}")


def _model_of(section: EvalSection, base: BaseModel, folder: RunFolder) -> str:
    """The folder or hub id of eval.model."""
    if section.model is not None:
        return base.name if section.model == "base" else section.model
    if (folder.model / "adapter_config.json").is_file():
        raise CaftuneError(
            f"{folder.model} must hold a whole model, got an adapter alone. Run `caftune export` with "
            "model.lora.merge=true."
        )
    if not (folder.model / "config.json").is_file():
        raise CaftuneError(
            f"{folder.model} is missing. Run `caftune train` first, or name a model in eval.model (`base`, a folder or a hub "
            "id)."
        )
    return str(folder.model)


def label_of(name: str, base_name: str, folder: RunFolder, *, server: str | None = None) -> str:
    """What the model is called in output/eval/ and in results: `base`, `model` (the run's own), or its last name and a hash.

    Args:
        server: the name under which a server has the model, which need not be the model here; results then use that name.
    """
    if server is None and name == base_name:
        return "base"
    path = Path(name).resolve()
    if server is None and path == folder.model.resolve():
        return "model"
    whole = str(path) if path.exists() else name
    last = Path(server or name).name
    return f"{last}-{hashlib.sha256(json.dumps([whole, server]).encode()).hexdigest()[:6]}"


def _examples(section: EvalSection, task: Task) -> list[Example]:
    source = section.data.get(task.name)
    if source is None:
        raise CaftuneError(
            f"eval.data.{task.name} must name a file or hub id with the rows of {task.name}, got nothing. Add it to the recipe."
        )
    refuse_unnamed_split(source, f"eval.data.{task.name}")
    rows = read_rows(source, section.limit)
    missing = [
        theirs
        for ours, theirs in section.columns.items()
        if ours in ("prompt", *task.columns) and not any(theirs in row for row in rows)
    ]
    if missing:
        raise CaftuneError(
            f"{source}: no row has the column {missing[0]!r}. Fix the file, or name another in eval.columns."
        )
    named = [{**row, **{ours: row.get(theirs) for ours, theirs in section.columns.items()}} for row in rows]
    try:
        examples = [task.read(row, number) for number, row in enumerate(named)]
        if "prompt" in section.columns:  # as a model was trained on them
            prompts = [text(row, number, "prompt") for number, row in enumerate(named)]
            examples = [replace(example, prompt=prompt) for example, prompt in zip(examples, prompts, strict=True)]
    except CaftuneError as error:
        raise CaftuneError(f"{source}: {error}") from error
    twice = next((name for name, count in Counter(example.id for example in examples).items() if count > 1), None)
    if twice is not None:
        raise CaftuneError(f"{source}: every example must have a different id, got {twice} twice. Fix the file.")
    return examples


def with_structures(lines: Sequence[Mapping[str, Any]], folder_or_hub_id: str) -> list[dict[str, Any]]:
    """The lines of the task `proteins` with the measures of predicted structures among their scores."""
    pairs = [(sequence_of(line["completion"]), line["reference"]) for line in lines]
    measured = compare_structures(pairs, folder_or_hub_id)
    return [{**line, "scores": {**line["scores"], **m}} for line, m in zip(lines, measured, strict=True)]


def _conversation_of(example: Example, *, chat: bool) -> Conversation:
    if chat:
        return Conversation(messages=[{"role": "user", "content": example.prompt}], place=example.id)
    return Conversation(text=example.prompt)


def _refuse_failures(task: Task, examples: Sequence[Example], failures: Mapping[int, str]) -> None:
    if failures:
        row, reason = next(iter(sorted(failures.items())))
        raise CaftuneError(
            f"{len(failures)} examples of {task.name} have no answer (the first is {examples[row].id}: {reason}). The others "
            "are kept; run the command again."
        )


def summarise(task: Task, model: str, lines: Sequence[Mapping[str, Any]]) -> Result:
    """A task's measures from the lines of its file."""
    runs = sorted({line["run"] for line in lines})
    combined = [task.combine([line["scores"] for line in lines if line["run"] == run]) for run in runs]
    names = dict.fromkeys(name for measures in combined for name in measures)
    return Result(
        task=task.name,
        model=model,
        examples=len({line["id"] for line in lines}),
        runs=len(runs),
        measures={name: [measures[name] for measures in combined if name in measures] for name in names},
        unfinished=sum(line["finish"] == "length" for line in lines),
        chat=all(line["chat"] for line in lines),
        in_thought=sum(line.get("in_thought", False) for line in lines),
    )


def print_results(console: Console, results: Sequence[Result]) -> None:
    """A table for each task: its measures, of several runs with 95% intervals."""
    for result in results:
        what = f"{result.examples} examples, {result.runs} run{'s' * (result.runs > 1)}"
        table = Table(title=f"{result.task}: {result.model} ({what})")
        table.add_column("measure")
        table.add_column("value", justify="right")
        for name, values in result.measures.items():
            table.add_row(name, in_words(values))
        console.print(table)
        console.print(
            f"Prompts were given {'in a conversation' if result.chat else 'as plain text'} (eval.chat).",
            highlight=False,
        )
        if result.unfinished:
            console.print(f"{result.unfinished} answers were cut off by eval.max_new_tokens.", highlight=False)
        if result.in_thought:
            console.print(
                f"{result.in_thought} answers end within a thought, which is not scored. Raise eval.max_new_tokens; "
                "where a chat template opens thoughts and the model was trained without them, change the template.",
                highlight=False,
            )


def in_words(values: Sequence[float]) -> str:
    """A measure of several runs: mean and 95% interval; of one, the number."""
    if len(values) < 2:
        return f"{values[0]:.4f}"
    mean, half = interval(values)
    return f"{mean:.4f} ± {half:.4f}"
