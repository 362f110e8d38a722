"""Evaluation of a model on tasks: ask it, score the answers, put them down one by one.

    output/eval/MODEL/TASK.jsonl      one line per example and run: prompt, completion (what is scored), measures. MODEL is
                                      `base`, `model` for the run's own, and for any other its last name and a short hash of
                                      its whole name
    output/eval/cache.jsonl           the answers, by what was asked: a stopped evaluation goes on, a second one asks nothing

Every number can be computed again from TASK.jsonl, without the model.
"""

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

from caftune.checkpoints.fingerprint import model_fingerprint
from caftune.data.forms import read_rows, refuse_unnamed_split
from caftune.data.prompts import Conversation, is_chat, report_second_bos
from caftune.errors import CaftuneError
from caftune.evals.proteins import PROTEINS, sequence_of
from caftune.evals.statistics import interval, load_scipy
from caftune.evals.task import Example, Task, text, until_stop
from caftune.evals.tasks import TASKS
from caftune.evals.thought import split_thought
from caftune.files import write_lines
from caftune.generation.answers import AnswerCache, generate_labels
from caftune.generation.backends import Sampling
from caftune.pipeline.folder import record, with_commit
from caftune.pipeline.recipe import Recipe
from caftune.pipeline.stage_config import (
    answer_backend,
    context_length,
    free_memory,
    load_tokenizer,
    stop_tokens,
    who_answers,
)
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


def evaluate(recipe: Recipe) -> list[Result]:
    """Evaluate `eval.model` on `eval.tasks`.

    Raises:
        CaftuneError: no such task, no data for it, or settings that cannot work together.
        CaftuneError: rows without what the task needs, or a package or permission that is missing.
    """
    recipe = with_commit(recipe)
    name, tasks = _model_of(recipe), read_tasks(recipe)
    evaluated = _EvaluatedModel(recipe, name)
    recipe = with_form(recipe, evaluated.tokenizer)
    try:
        return [_evaluate(recipe, evaluated, task, examples) for task, examples in tasks]
    finally:
        evaluated.free()


class _EvaluatedModel:
    """The evaluated model, for all tasks: tokenizer, context, answers and weights are loaded once, when first needed."""

    def __init__(self, recipe: Recipe, name: str) -> None:
        self._recipe, self.name = recipe, name
        self.loaded: dict[str, Any] = {}  # the model itself

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self._recipe, self.name)

    @functools.cached_property
    def context(self) -> int:
        """The context in tokens; sys.maxsize where the configuration names none."""
        return context_length(self._recipe, self.name) or sys.maxsize

    @functools.cached_property
    def _answers(self) -> AnswerCache:
        recipe, name = self._recipe, self.name
        revision = recipe.model.revision if name == recipe.model.name else None
        fingerprint = model_fingerprint(name, revision) + who_answers(recipe.eval)
        file = Path(recipe.output, "eval", "cache.jsonl")
        return AnswerCache(file, Sampling(), seed=recipe.seed, fingerprint=fingerprint)

    def answers(self, sampling: Sampling, seed: int) -> AnswerCache:
        """Its cached answers: weights are hashed and the file is read once for all tasks and runs."""
        return self._answers.drawn(sampling, seed=seed)

    def free(self) -> None:
        """Free the memory that the model takes."""
        self.loaded.clear()
        free_memory()


def with_form(recipe: Recipe, tokenizer: Any) -> Recipe:
    """The recipe with `eval.chat` decided: the form that data.train has, and that the model therefore knows.

    Raises:
        CaftuneError: a conversation without a chat template, or a data.train that cannot be read.
    """
    chat, has_template = recipe.eval.chat, bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise CaftuneError(
            f"eval.chat must not be true for {tokenizer.name_or_path}, which has no chat template. Remove it."
        )
    if chat is None:
        chat = has_template and not _is_trained_on_text(recipe)
    return recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"chat": chat})})


def _is_trained_on_text(recipe: Recipe) -> bool:
    """Whether a model with a chat template is trained on plain text all the same."""
    if recipe.data.train is None:
        return False
    try:
        return not is_chat(read_task_rows(recipe.data, recipe.data.train, limit=1, chat=True))
    except CaftuneError as error:
        raise CaftuneError(
            f"eval.chat must be given where data.train cannot be read ({error}). Add it: true for a model that is trained in "
            "conversations, false for one that is trained on plain text."
        ) from error


def read_tasks(recipe: Recipe) -> list[tuple[Task, list[Example]]]:
    """The tasks of `eval` and their examples, after all checks that need no model. Raises what `evaluate` does."""
    section = recipe.eval
    if not section.tasks:
        raise CaftuneError(f"eval.tasks must name tasks, got none. Known: {', '.join(TASKS)}.")
    unknown = next((task for task in section.tasks if task not in TASKS), None)
    if unknown is not None:
        raise CaftuneError(f"eval.tasks must hold names of tasks, got {unknown!r}. Known: {', '.join(TASKS)}.")
    if section.runs > 1 and section.temperature == 0:
        raise CaftuneError("eval.runs must be 1 with eval.temperature 0: greedy answers are all the same.")
    if section.structures is not None:
        if PROTEINS.name not in section.tasks:
            raise CaftuneError(
                f"eval.structures needs the task {PROTEINS.name} in eval.tasks. Add it, or remove structures."
            )
        check_structures(section.structures)
    load_scipy()
    return [(TASKS[task], _examples(recipe, TASKS[task])) for task in dict.fromkeys(section.tasks)]


def _model_of(recipe: Recipe) -> str:
    """The folder or hub id of eval.model."""
    if recipe.eval.model == "base":
        return recipe.model.name
    if recipe.eval.model is not None:
        return recipe.eval.model
    model = _own_model(recipe)
    if (model / "adapter_config.json").is_file():
        raise CaftuneError(
            f"{model} must hold a whole model, and holds an adapter alone. Run `caftune export` with model.lora.merge=true."
        )
    if not (model / "config.json").is_file():
        raise CaftuneError(
            f"{model} is missing. Run `caftune train` first, or name a model in eval.model (`base`, a folder or a hub id)."
        )
    return str(model)


def _own_model(recipe: Recipe) -> Path:
    return Path(recipe.output, "model")


def label_of(recipe: Recipe, name: str) -> str:
    """What the model is called in output/eval/ and in results: `base`, `model` (the run's own), or its last name and a hash.

    A model that a server has under a name of its own (eval.server.model) is called by that, for it need not be the model here.
    """
    served = recipe.eval.server.model if recipe.eval.backend == "server" else None
    if served is None and name == recipe.model.name:
        return "base"
    path = Path(name).resolve()
    if served is None and path == _own_model(recipe).resolve():
        return "model"
    whole = str(path) if path.exists() else name
    last = Path(served or name).name
    return f"{last}-{hashlib.sha256(json.dumps([whole, served]).encode()).hexdigest()[:6]}"


def _examples(recipe: Recipe, task: Task) -> list[Example]:
    source = recipe.eval.data.get(task.name)
    if source is None:
        raise CaftuneError(
            f"eval.data.{task.name} must name a file or hub id with the rows of {task.name}, got nothing. Add it to the recipe."
        )
    refuse_unnamed_split(source, f"eval.data.{task.name}")
    rows = read_rows(source, recipe.eval.limit)
    named = [{**row, **{ours: row.get(theirs) for ours, theirs in recipe.eval.columns.items()}} for row in rows]
    try:
        examples = [task.read(row, number) for number, row in enumerate(named)]
        if "prompt" in recipe.eval.columns:  # as a model was trained on them
            asked = [text(row, number, "prompt") for number, row in enumerate(named)]
            examples = [replace(example, prompt=prompt) for example, prompt in zip(examples, asked, strict=True)]
    except CaftuneError as error:
        raise CaftuneError(f"{source}: {error}") from error
    twice = next((name for name, count in Counter(example.id for example in examples).items() if count > 1), None)
    if twice is not None:
        raise CaftuneError(f"{source}: every example must have a different id, got {twice} twice. Fix the file.")
    return examples


def _evaluate(recipe: Recipe, evaluated: _EvaluatedModel, task: Task, examples: Sequence[Example]) -> Result:
    lines = _answer_all(recipe, evaluated, task, examples)
    if task is PROTEINS and recipe.eval.structures is not None:
        evaluated.free()  # its memory is needed by the folding model
        lines = with_structures(lines, recipe.eval.structures)
    label = label_of(recipe, evaluated.name)
    write_lines(Path(recipe.output, "eval", label, f"{task.name}.jsonl"), lines)
    result = summarise(task, label, lines)
    record(recipe, {"stage": f"eval {label} {task.name}", **asdict(result)})
    return result


def _answer_all(
    recipe: Recipe, evaluated: _EvaluatedModel, task: Task, examples: Sequence[Example]
) -> list[dict[str, Any]]:
    """The lines of TASK.jsonl: the scored answer to every example in every run."""
    section, tokenizer, name = recipe.eval, evaluated.tokenizer, evaluated.name
    talks = dict(enumerate(_conversation_of(example, chat=bool(section.chat)) for example in examples))
    sampling = Sampling(
        section.max_new_tokens or task.max_new_tokens, section.temperature, section.top_p, section.top_k
    )
    prompts = {number: talk.prompt(0, [], tokenizer) for number, talk in talks.items()}
    room = evaluated.context - sampling.max_new_tokens - (section.backend == "server")
    long = [number for number, prompt in prompts.items() if len(prompt.ids) > room]
    if long:
        raise CaftuneError(
            f"{len(long)} of {len(talks)} prompts of {task.name} (the first is {examples[long[0]].id}) leave no room for "
            f"{sampling.max_new_tokens} tokens in the model's context. Lower eval.max_new_tokens, or use a model with more."
        )
    opened = functools.cache(
        lambda: answer_backend(recipe, section, tokenizer, sampling, name=name, loaded=evaluated.loaded)
    )
    ends = stop_tokens(recipe, tokenizer, name)
    report_second_bos([talk.text for talk in talks.values()], tokenizer, f"eval.data.{task.name}")
    lines: list[dict[str, Any]] = []
    for run, seed in enumerate(range(recipe.seed, recipe.seed + section.runs)):
        found = generate_labels(talks, tokenizer, evaluated.answers(sampling, seed), opened, room=room, ends=ends)
        _refuse_failures(task, examples, found.failures)
        for label in found.labels:
            example, gap = examples[label.row], prompts[label.row].gap
            read = tokenizer.decode(label.prompt_ids)  # with special tokens, which may open a thought
            # The gap is part of the example's prompt.
            said, in_thought = split_thought(label.completion.removeprefix(gap), read, example.prompt)
            completion = until_stop(said, task.stop)
            went_past = completion != said or any(text in said for text in task.past)
            finish = "stop" if went_past else label.finish
            measured = {"scores": task.score(example, completion), "finish": finish, "in_thought": in_thought}
            line = {"run": run, "seed": seed, **asdict(example), "completion": completion, **measured}
            lines.append({**line, "chat": section.chat})
    return lines


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
        console.print(f"Asked {'in a conversation' if result.chat else 'as plain text'} (eval.chat).", highlight=False)
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
