"""Tasks of lm-evaluation-harness (the package lm_eval), named `lm_eval:NAME` in eval.tasks.

Rows, prompts, few-shot examples, settings and metrics are the harness's own, so scores are those of the command `lm_eval`. The
examples and their scores are kept as those of every other task:

    output/eval/lm_eval.jsonl     the model's responses by request, appended as they come: a stopped evaluation resumes

A metric is named as the harness names it, with its filter where that has a name (`exact_match,strict-match`). The scores of an
example are the metrics whose mean is the task's value; others (an F1, a perplexity) are numbers of a whole run only.

Source: EleutherAI/lm-evaluation-harness 0.4.13, `evaluate`. Its `simple_evaluate` collects facts of the machine for half a
minute at each call, so what else it does (seeds, default shots) is done here.
"""

import difflib
import hashlib
import json
import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from caftune.checkpoints.provenance import package_version
from caftune.errors import CaftuneError, first_line
from caftune.files import appended_lines
from caftune.pipeline.schema import EvalSection

PREFIX = "lm_eval:"
_AT_A_TIME = 8  # requests at most: the harness holds logits of every position of each, twice


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness with its rows."""

    name: str  # with the prefix
    task: Any  # lm_eval.api.task.Task
    # Of Python and NumPy after loading, which may shuffle choices; the evaluation continues from there.
    random_state: tuple[Any, Any] | None = None
    files_sha256: str | None = None  # of a task given by file or folder: that folder's YAML and Python files

    @property
    def is_generated(self) -> bool:
        """Whether the model writes text, which may be sampled; otherwise likelihoods are asked for."""
        return self.task.get_config("output_type") == "generate_until"


def read_harness_tasks(section: EvalSection) -> dict[str, HarnessTask]:
    """The tasks of the harness in `eval.tasks`, with their rows.

    Raises:
        CaftuneError: lm_eval is not installed; no such task; one that cannot be loaded; one that caftune does not evaluate.
    """
    names = [name for name in section.tasks if name.startswith(PREFIX)]
    if names and section.backend != "transformers":
        raise CaftuneError(f"eval.backend must be transformers for {names[0]}, got {section.backend}. Change it.")
    return {name: _read(name, section.data.get(name)) for name in names}


def _read(name: str, source: str | None) -> HarnessTask:
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as absent:
        raise CaftuneError(
            f"lm_eval must be installed for {name}, got an import error ({absent}). Run pip install 'caftune[lm-eval]'."
        ) from absent
    if source is not None and not Path(source).exists():
        raise CaftuneError(
            f"eval.data.{name} must be a file or folder with tasks of lm_eval (YAML), got {source}, which does not exist. "
            "Check the path."
        )
    try:
        with _random_numbers():
            task = _loaded(name, source)
            state = random.getstate(), np.random.get_state()
    except CaftuneError:
        raise
    except Exception as error:  # a task is anybody's YAML and Python, its rows are a file's or the hub's
        raise CaftuneError(
            f"{name} must be a task that lm_eval can load, got {type(error).__name__}: {first_line(error)}. Check the "
            "connection, or the files of the task."
        ) from error
    _refuse_unfit(name, task)
    return HarnessTask(name, task, state, None if source is None else _sha256_of_files(Path(source)))


def _sha256_of_files(source: Path) -> str:
    """Of the YAML and Python files of a folder, or of the folder of a file."""
    files = source.rglob("*") if source.is_dir() else source.parent.glob("*")
    found = sorted(file for file in files if file.suffix in (".yaml", ".yml", ".py"))
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in found)).hexdigest()


@contextmanager
def _random_numbers(state: tuple[Any, Any] | None = None) -> Iterator[None]:
    """Within the block random numbers are those of the harness's command, from its seeds or from `state` on."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        if state is not None:
            _set_random_state(state)
        try:
            yield
        finally:
            _set_random_state(before)


def _set_random_state(state: tuple[Any, Any]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])


def _loaded(name: str, source: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    if source is not None and Path(source).is_file():
        return _only_task(name, source, TaskManager(include_defaults=False).load([source])["tasks"])
    known = _published() if source is None else TaskManager(include_path=source, include_defaults=False)
    _refuse_unknown(name, known, source)
    short = name.removeprefix(PREFIX)
    return known.load([short])["tasks"][short]


@cache
def _published() -> Any:
    """The tasks that come with the harness: 15,000 files, read once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _only_task(name: str, source: str, tasks: Mapping[str, Any]) -> Any:
    short = name.removeprefix(PREFIX)
    if [*tasks] != [short]:
        raise CaftuneError(
            f"eval.data.{name} must be a file with the task {short}, got {source} with {', '.join(tasks) or 'none'}. Name it "
            f"in eval.tasks as {PREFIX}NAME."
        )
    return tasks[short]


def _refuse_unknown(name: str, known: Any, source: str | None) -> None:
    """Raise CaftuneError for a name that is no task: a group's, or nobody's."""
    short = name.removeprefix(PREFIX)
    if short in known.all_subtasks:
        return
    if short in known.all_tasks:
        entry = known.task_index[short]
        members = sorted(entry.tags) if short in known.all_tags else [_member(item) for item in entry.cfg["task"]]
        more = f" and {len(members) - 5} more" if len(members) > 5 else ""
        raise CaftuneError(
            f"eval.tasks must hold single tasks, got {name}, a group of {', '.join(members[:5])}{more}. Name those you want, "
            f"each with {PREFIX}."
        )
    near = difflib.get_close_matches(short, known.all_subtasks, n=5)
    hint = f"Near: {', '.join(near)}." if near else f"It has {', '.join(known.all_subtasks[:5]) or 'none'}."
    place = source or f"lm_eval {package_version('lm_eval')}"
    raise CaftuneError(f"eval.tasks must hold names of tasks, got {name}, which is no task of {place}. {hint}")


def _member(item: Any) -> str:
    """The name of a group's member, which is given by its name or with changes."""
    return item if isinstance(item, str) else str(item.get("task") or item.get("group"))


def _refuse_unfit(name: str, task: Any) -> None:
    """Raise CaftuneError for a task that runs code, shows pictures, or does not say what is better."""
    if getattr(task, "UNSAFE_CODE", False):
        raise CaftuneError(
            f"{name} runs the model's code outside of a sandbox, which caftune does not. Use the tasks humaneval and mbpp."
        )
    if getattr(task, "MULTIMODAL", False):
        raise CaftuneError(f"{name} must be a task on text, got one with pictures or sounds. Remove it.")
    if _primary(task, task.aggregation()) is None:
        raise CaftuneError(
            f"{name} must say whether higher is better for one of its metrics ({', '.join(task.aggregation())}). Add "
            "higher_is_better to its metric_list."
        )


def _primary(task: Any, metrics: Sequence[str] | Mapping[str, Any]) -> str | None:
    """The first metric of the task's list that is among `metrics`, and of which it is known what is better."""
    better = task.higher_is_better()
    return next((metric for metric in task.aggregation() if metric in metrics and better.get(metric) is not None), None)


class KeptResponses:
    """The model as the harness uses it. Responses are kept in a file; the model is loaded for those that are missing.

    Args:
        file: the kept responses.
        fingerprint: of the model; another model's responses are not used.
        tokenizer: for chat templates.
        opened: the harness's own model (HFLM).
    """

    rank, world_size, tokenizer_name = 0, 1, "caftune"  # of one process; the harness's cache of requests is not used

    def __init__(self, file: Path, fingerprint: str, tokenizer: Any, opened: Callable[[], Any]) -> None:
        self._file, self._fingerprint, self._opened = file, fingerprint, opened
        self.tokenizer, self.chat_template_args, self.seed = tokenizer, {}, 0  # type: ignore[var-annotated]
        rows = map(json.loads, appended_lines(file))
        self._kept: dict[str, Any] = {row["key"]: _as_given(row["response"]) for row in rows}

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """The text of each request: a prompt and the settings of generation."""
        return self._respond("generate_until", requests)

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """The log-likelihood of each continuation of a prompt, and whether it is the greedy one."""
        return self._respond("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[Any]:
        """The log-likelihood of each text."""
        return self._respond("loglikelihood_rolling", requests)

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation, without loading the model."""
        from lm_eval.models.huggingface import HFLM

        return HFLM.apply_chat_template(self, messages, add_generation_prompt)

    def _respond(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        seen: Counter[str] = Counter()
        keys = []
        for request in requests:
            key = self._key(kind, request.args, 0)
            if _is_sampled(kind, request.args):  # a repeated request is another draw
                seen[key] += 1
                key = self._key(kind, request.args, seen[key])
            keys.append(key)
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._kept}
        if missing:
            model = self._opened()
            model.set_cache_hook(self)
            torch.manual_seed(self.seed)
            responses = getattr(model, kind)([*missing.values()])
            for key, response in zip(missing, responses, strict=True):
                self._keep(key, response)
        return [self._kept[key] for key in keys]

    def add_partial(self, kind: str, args: Sequence[Any], response: Any) -> None:
        """Keep a response as soon as the harness's model has it. Samples of one seed are kept together or not at all."""
        if not _is_sampled(kind, args):
            self._keep(self._key(kind, args, 0), response)

    def _key(self, kind: str, args: Sequence[Any], draw: int) -> str:
        drawn = [self.seed, draw] if _is_sampled(kind, args) else []
        what = json.dumps([self._fingerprint, kind, args, drawn], sort_keys=True)
        return hashlib.sha256(what.encode()).hexdigest()[:32]

    def _keep(self, key: str, response: Any) -> None:
        if key not in self._kept:
            self._kept[key] = response
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "response": response}) + "\n")


def _is_sampled(kind: str, args: Sequence[Any]) -> bool:
    """As the harness decides it (normalize_gen_kwargs)."""
    if kind != "generate_until":
        return False
    sampled, temperature = args[1].get("do_sample"), float(args[1].get("temperature") or 0)
    return temperature > 0 if sampled is None else bool(sampled)


def _as_given(response: Any) -> Any:
    """A response as the harness's model gives it: JSON has no tuples."""
    return tuple(response) if isinstance(response, list) else response


def harness_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """The harness's HFLM of a loaded model."""
    from lm_eval.models.huggingface import HFLM

    log = logging.getLogger("lm_eval.models.huggingface")
    level = log.level
    log.setLevel(logging.ERROR)  # two warnings that a model which is given loaded cannot be loaded in another way
    try:
        size = min(batch_size, _AT_A_TIME)
        return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=size)
    finally:
        log.setLevel(level)


def evaluate_harness(
    task: HarnessTask, model: KeptResponses, section: EvalSection, *, chat: bool, seeds: Sequence[int]
) -> tuple[list[dict[str, Any]], dict[str, list[float]], dict[str, Any]]:
    """Evaluate a model on a task of the harness, once for each seed.

    Few-shot examples are those of the harness's own command: its default seeds choose them. A seed here is that of sampling.

    Returns:
        The lines of TASK.jsonl, the measures of each run, and what is needed to compare them.
    """
    found = []
    for seed in seeds:
        model.seed = seed
        with _random_numbers(task.random_state):
            results = _evaluated(task.task, model, section, chat=chat)
        short = task.name.removeprefix(PREFIX)
        found.append((measures_of(results["results"][short]), results["samples"][short]))
    lines = [
        {"run": run, "seed": seed, **line, "chat": chat}
        for run, (seed, (measures, samples)) in enumerate(zip(seeds, found, strict=True))
        for line in lines_of(samples, measures)
    ]
    by_run = [measures for measures, _ in found]
    measures = {name: [each[name] for each in by_run] for name in by_run[0]}
    return lines, measures, _about(task, measures, found[0][1])


def _evaluated(task: Any, model: KeptResponses, section: EvalSection, *, chat: bool) -> dict[str, Any]:
    """The results of the harness's `evaluate`, after what its command does before."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate

    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    settings = _settings(section)
    if settings and task.get_config("output_type") == "generate_until":
        task.set_config("generation_kwargs", settings, update=True)
    name = task.task_name
    return evaluate(
        lm=model,
        task_dict={"tasks": {name: task}, "groups": {}},
        limit=section.limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )


def _settings(section: EvalSection) -> dict[str, Any]:
    """The recipe's settings of generation, which replace the task's; greedy decoding (the default) leaves it the choice."""
    length = {"max_gen_toks": section.max_new_tokens} if section.max_new_tokens else {}
    if not section.temperature:
        return length
    sampled = {"do_sample": True, "temperature": section.temperature, "top_p": section.top_p, "top_k": section.top_k}
    return {**length, **sampled}


def measures_of(results: Mapping[str, Any]) -> dict[str, float]:
    """The metrics among a task's results, without those of the filter `none` having it in their name.

    >>> measures_of({"name": "arc", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": "N/A", "exact_match,strict": 1.0})
    {'acc': 0.5, 'exact_match,strict': 1.0}
    """
    numbers = {key: float(value) for key, value in results.items() if "," in key and _is_number(value)}
    return {key.removesuffix(",none"): value for key, value in numbers.items() if "_stderr," not in key}


def _is_number(value: Any) -> bool:
    return isinstance(value, Real | np.bool_)


def lines_of(samples: Sequence[Mapping[str, Any]], measures: Mapping[str, float]) -> list[dict[str, Any]]:
    """The examples of the harness's log of samples, which has one entry for each example and filter."""
    scores: dict[str, dict[Any, float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            if _is_number(sample[metric]):
                name = f"{metric},{sample['filter']}".removesuffix(",none")
                scores.setdefault(name, {})[sample["doc_id"]] = float(sample[metric])
    kept = {
        name: found
        for name, found in scores.items()
        if name in measures and math.isclose(fmean(found.values()), measures[name], rel_tol=0, abs_tol=1e-9)
    }
    first = {sample["doc_id"]: sample for sample in reversed(samples)}
    return [
        {**_example(sample), "scores": {name: found[doc] for name, found in kept.items() if doc in found}}
        for doc, sample in sorted(first.items())
    ]


def _example(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Prompt, reference and response of an example; of several choices the likeliest is the completion."""
    arguments, responses = sample["arguments"], [each[0] for each in sample["resps"]]
    choices, response = _choices(arguments), responses[0]
    if isinstance(response, str):
        completion = response
    elif len(responses) > 1:
        likely = [pair[0] for pair in responses[: len(choices)]]
        completion = choices[likely.index(max(likely))]
    else:
        likelihood = response[0] if isinstance(response, list | tuple) else response
        completion = f"(log-likelihood {likelihood:.4f})"
    reference = _named(sample["target"], choices if len(responses) > 1 else [])
    return {
        "id": str(sample["doc_id"]),
        "prompt": arguments[0][0],
        "reference": reference,
        "answer": reference if isinstance(reference, str) else "",
        "completion": completion,
        "responses": responses,
        "finish": None,  # the harness does not say whether a text was cut off
        "in_thought": False,
    }


def _choices(arguments: Sequence[Sequence[Any]]) -> list[str]:
    """The texts between which an example chooses: continuations of one prompt, or prompts with one continuation.

    Requests without a prompt, which ask for the likelihood of a choice by itself (acc_mutual_info), come last.
    """
    pairs = [pair for pair in arguments if pair[0]] or arguments
    is_of_prompts = len({pair[0] for pair in pairs}) > 1
    return [("".join(map(str, pair[:2])) if is_of_prompts else str(pair[-1])).strip() for pair in pairs]


def _named(target: Any, choices: Sequence[str]) -> Any:
    """A target as JSON: the text of a choice for its number."""
    if isinstance(target, list | tuple):
        return [_named(each, choices) for each in target]
    if isinstance(target, Integral) and 0 <= int(target) < len(choices):
        return choices[int(target)]
    return target if isinstance(target, str) else json.loads(json.dumps(target, default=str))


def _about(task: HarnessTask, measures: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a comparison and a report need to know of a task, so that they do without the harness.

    Examples are named by their rows, since a model with another chat template is asked in other words.
    """
    metrics = {name.partition(",")[0]: name for name in reversed([*measures])}  # by metric: that of its first filter
    primary = _primary(task.task, metrics)
    if primary is None:
        raise CaftuneError(
            f"{task.name} must give a metric of which it says whether higher is better, got {', '.join(measures)}. Correct "
            "its metric_list."
        )
    better = task.task.higher_is_better()
    examples = sorted({(sample["doc_id"], sample["doc_hash"], sample["target_hash"]) for sample in samples})
    return {
        "primary": metrics[primary],
        "lower_is_better": [name for name in measures if better.get(name.partition(",")[0]) is False],
        "version": task.task.VERSION,
        "num_fewshot": task.task.get_config("num_fewshot"),
        "lm_eval": package_version("lm_eval"),
        "files_sha256": task.files_sha256,
        "examples_sha256": hashlib.sha256(json.dumps(examples).encode()).hexdigest(),
    }
