"""Examples of a comparison: the arms' answers next to each other, with the concepts of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from caftune.compare.runs import ComparedRun, ids_of
from caftune.compare.summary import BASELINE, TREATMENT, ComparedExample, EvaluatedTask, MarkedText, ScoredText
from caftune.evals.concepts import density, find_concepts, offsets_of, token_positions

_SHOWN = 8


@dataclass(frozen=True)
class ConceptMarker:
    """Finds the concepts of a kind that a tokenizer cuts into several tokens."""

    tokenizer: Any
    kind: str
    terms: Sequence[str]

    def density(self, text: str) -> float:
        """As `caftune.evals.concepts.density`."""
        return density(text, self.kind, self.tokenizer, self.terms)

    def mark(self, text: str) -> MarkedText:
        """The text with the character ranges of its concepts."""
        found = find_concepts(text, self.kind, self.terms)
        decoded, offsets = offsets_of(self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer)
        if decoded == text:  # else (a lost space, a replaced character) the tokens have no position in the text
            found = [concept for concept, _ in token_positions(found, offsets)]
        return MarkedText(text, [place for concept in found for place in concept.ranges])


def compared_examples(
    task: EvaluatedTask, runs: Mapping[str, Sequence[ComparedRun]], marker: ConceptMarker
) -> list[ComparedExample]:
    """Some examples of a task: where CAFT is better than the baseline, where it is worse, and where they are equal.

    The answers are those of the first seed that diverged in no arm; an empty list where there is none, and for a task whose
    primary measure is not one of single answers.
    """
    name = task.name
    seeds = [dict(zip(runs, of_seed, strict=True)) for of_seed in zip(*runs.values(), strict=True)]
    whole = next((of_seed for of_seed in seeds if all(name in run.answers for run in of_seed.values())), None)
    if whole is None or not any(task.primary in line["scores"] for run in whole.values() for line in run.answers[name]):
        return []
    lines = {arm: {line["id"]: line for line in reversed(run.answers[name])} for arm, run in whole.items()}
    scores = {
        arm: {example: line["scores"].get(task.primary, 0.0) for example, line in of_arm.items()}
        for arm, of_arm in lines.items()
    }
    shown = TREATMENT if TREATMENT in runs else next(arm for arm in runs if arm != BASELINE)
    sign = -1 if task.primary in task.lower_is_better else 1
    order = ids_of(whole[BASELINE].answers[name])
    gains = {example: sign * (scores[shown][example] - scores[BASELINE][example]) for example in order}
    return [
        ComparedExample(
            task=name,
            id=example,
            prompt=lines[BASELINE][example]["prompt"],
            reference=marker.mark(_reference(lines[BASELINE][example])),
            answers={
                arm: ScoredText(**vars(marker.mark(of_arm[example]["completion"])), score=scores[arm][example])
                for arm, of_arm in lines.items()
            },
        )
        for example in _chosen(gains)
    ]


def _chosen(gains: Mapping[str, float]) -> list[str]:
    """Up to three examples that are better, three that are worse, and then equal ones, in their order."""
    better = [example for example, gain in gains.items() if gain > 0]
    worse = [example for example, gain in gains.items() if gain < 0]
    equal = [example for example, gain in gains.items() if gain == 0]
    most = _SHOWN // 3 + 1
    return [*better[:most], *worse[:most], *equal[:most]][:_SHOWN]


def _reference(line: Mapping[str, Any]) -> str:
    return line.get("answer") or str(line["reference"])
