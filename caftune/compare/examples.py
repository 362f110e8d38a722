"""Examples of a comparison, side by side, with the concepts of each answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from caftune.compare.runs import ComparedRun, ids_of
from caftune.compare.verdict import BASELINE, TREATMENT
from caftune.evals.concepts import find_concepts, offsets_of, read_terms, token_positions
from caftune.evals.task import Task
from caftune.evals.tasks import TASKS
from caftune.pipeline.base_model import BaseModel
from caftune.pipeline.schema import Recipe

_SHOWN = 8


def compared_examples(recipe: Recipe, runs: Mapping[str, Sequence[ComparedRun]]) -> list[dict[str, Any]]:
    """Some examples of the first task with the first seed's answers: where CAFT is better, where it is worse, the rest.

    The seed is the first for which no run diverged; an empty list where there is none.
    """
    name = recipe.eval.tasks[0]
    seeds = [dict(zip(runs, of_seed, strict=True)) for of_seed in zip(*runs.values(), strict=True)]
    whole = [of_seed for of_seed in seeds if all(name in run.answers for run in of_seed.values())]
    if not whole:
        return []
    task, tokenizer = TASKS[name], BaseModel.of(recipe.model).tokenizer()
    first = {arm: {line["id"]: line for line in reversed(run.answers[name])} for arm, run in whole[0].items()}
    shown = TREATMENT if TREATMENT in runs else next(arm for arm in runs if arm != BASELINE)
    sign = -1 if task.primary in task.lower_is_better else 1
    gains = {
        example: sign * (_primary(task, first[shown][example]) - _primary(task, first[BASELINE][example]))
        for example in ids_of(whole[0][BASELINE].answers[name])
    }
    kinds = [
        [example for example, gain in gains.items() if gain > 0],
        [example for example, gain in gains.items() if gain < 0],
        [example for example, gain in gains.items() if gain == 0],
    ]
    chosen = [example for kind in kinds for example in kind[: _SHOWN // 3 + 1]][:_SHOWN]
    return [
        {
            "task": name,
            "id": example,
            "prompt": first[BASELINE][example]["prompt"],
            "reference": _marked(recipe, tokenizer, _reference(first[BASELINE][example])),
            "answers": {
                arm: {
                    **_marked(recipe, tokenizer, lines[example]["completion"]),
                    "score": _primary(task, lines[example]),
                }
                for arm, lines in first.items()
            },
        }
        for example in chosen
    ]


def _primary(task: Task, line: Mapping[str, Any]) -> float:
    return line["scores"].get(task.primary, 0.0)


def _reference(line: Mapping[str, Any]) -> str:
    return line.get("answer") or str(line["reference"])


def _marked(recipe: Recipe, tokenizer: Any, text: str) -> dict[str, Any]:
    """A text and the character ranges of its concepts of several tokens."""
    section = recipe.compare.concepts
    found = find_concepts(text, section.kind, terms_of(recipe))
    decoded, offsets = offsets_of(tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer)
    if decoded == text:  # else (a lost space, a replaced character) tokens have no place in the text
        found = [concept for concept, _ in token_positions(found, offsets)]
    return {"text": text, "concepts": [place for concept in found for place in concept.ranges]}


def terms_of(recipe: Recipe) -> list[str]:
    """The terms of compare.concepts.terms."""
    source = recipe.compare.concepts.terms
    return read_terms(source) if source is not None else []
