"""What a comparison found, as compare/comparison.json holds it, and how its values are written.

Verdict, console, Markdown and page all write values and intervals by `Measure`. Reading a comparison needs no torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter

from caftune.errors import CaftuneError
from caftune.evals.statistics import LEVEL, interval
from caftune.files import read_json

FORMAT = 1
BASE: Final = "base"
BASELINE, TREATMENT = "ntp", "caft"
# The arms, as a report explains them; `heads`: how those of the recipe are trained.
ARMS = {
    "base": "the model before fine-tuning",
    "ntp": "plain next-token fine-tuning, the baseline",
    "caft": "concept-aware fine-tuning with pretrained heads, {heads}",
    "caft_frozen": "CAFT with frozen heads, which cost less",
    "beta0": "CAFT's code with weight 0, which must equal ntp",
    "random_heads": "CAFT with heads of shuffled weights, which have lost what they learnt",
    "shuffled_horizons": "CAFT with each head in the place of the next one",
    "no_pretraining": "CAFT with heads that were not pretrained, trained along",
}
HELD_OUT, CONCEPTS = "held-out text", "concepts"  # measures that belong to no task

Known = list[float | None]  # one value a seed; None: not measured


@dataclass(frozen=True)
class EvaluatedTask:
    """A task, its primary measure, and the measures of which lower is better."""

    name: str
    primary: str
    examples: int
    lower_is_better: list[str]


@dataclass(frozen=True)
class Measured:
    """One measure of one arm: a value a seed, their mean, and half of its 95% interval (None with one seed)."""

    task: str
    measure: str
    arm: str
    values: list[float]
    mean: float
    half: float | None

    @classmethod
    def of(cls, task: str, measure: str, arm: str, values: Sequence[float]) -> "Measured":
        """From the values alone, which are finite."""
        mean, half = interval(values) if len(values) > 1 else (values[0], None)
        return cls(task, measure, arm, list(values), mean, half)


@dataclass(frozen=True)
class Difference:
    """Mean of `arm` minus mean of `baseline`, with its 95% interval.

    `p_holm` is corrected for the number of measures of this pair of arms; the deciding measure is named in advance, so its
    p-value stands uncorrected. `minimum_detectable` and `effect_size` are None where the spread of the runs is unknown.
    """

    task: str
    measure: str
    arm: str
    baseline: str
    difference: float
    low: float
    high: float
    p_value: float
    effect_size: float | None
    minimum_detectable: float | None
    over: str  # "runs", or "runs and examples"
    p_holm: float

    @property
    def is_apart(self) -> bool:
        """Whether interval and test agree that the arms differ; where they disagree, p is very near the level."""
        return self.p_value <= LEVEL and not self.low <= 0 <= self.high


@dataclass(frozen=True)
class LeftOut:
    """A value that is not a finite number; its arm has no mean and no test in that measure."""

    arm: str
    run: str  # ARM/SEED
    task: str
    measure: str
    value: str


@dataclass(frozen=True)
class Costs:
    """What the trainings of one arm cost."""

    tokens: Known = field(default_factory=list)
    flops: Known = field(default_factory=list)
    seconds: Known = field(default_factory=list)
    peak_memory_bytes: Known = field(default_factory=list)
    memory_before_bytes: Known = field(default_factory=list)  # allocated before the model was loaded

    def per_token(self, name: str) -> Known:
        """One of them over the tokens of its training."""
        pairs = zip(getattr(self, name), self.tokens, strict=False)
        return [value / tokens if value is not None and tokens else None for value, tokens in pairs]


@dataclass(frozen=True)
class Checks:
    """What must hold if the comparison is fair.

    `start`: the largest relative difference, over arms and seeds, between an arm's L_1 at the first step and the baseline's:
    near 0 where both had the same weights and rows. `beta0`: how many of `answers` of arm beta0 differ from the baseline's.
    """

    start: float | None = None
    devices: int = 1
    beta0: int | None = None
    answers: int | None = None


@dataclass(frozen=True)
class ConceptGroup:
    """Concepts of one name or number of tokens: mean probability and share of exact predictions, one value a seed."""

    count: int
    probability: list[float]
    exact: list[float]


@dataclass(frozen=True)
class ArmConcepts:
    """The same for all concepts of an arm, and by group."""

    probability: list[float]
    exact: list[float]
    by_tokens: dict[str, ConceptGroup]
    by_name: dict[str, ConceptGroup]


@dataclass(frozen=True)
class StudiedConcepts:
    """How well each arm predicts whole concepts of the kind `compare.concepts.kind`."""

    kind: str
    arms: dict[str, ArmConcepts]


@dataclass(frozen=True)
class MarkedText:
    """A text and the ranges of characters [start, end) of its concepts."""

    text: str
    concepts: list[tuple[int, int]]


@dataclass(frozen=True)
class ScoredText(MarkedText):
    """An answer with its score in the task's primary measure."""

    score: float


@dataclass(frozen=True)
class ComparedExample:
    """One example of a task with the arms' answers."""

    task: str
    id: str
    prompt: str
    reference: MarkedText
    answers: dict[str, ScoredText]


@dataclass(frozen=True)
class Comparison:
    """Arms over the seeds that all of them have finished; also a single training, as a comparison of one arm."""

    title: str
    arms: list[str]
    seeds: list[int]
    verdict: str
    remarks: list[str] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)  # ARM/SEED
    unused_seeds: list[int] = field(default_factory=list)  # of finished runs that compare.seeds leaves out
    tasks: list[EvaluatedTask] = field(default_factory=list)
    measures: list[Measured] = field(default_factory=list)  # the first task's primary measure first
    left_out: list[LeftOut] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)  # "comparisons" in the file
    costs: dict[str, Costs] = field(default_factory=dict)
    plans: dict[str, dict[str, Known]] = field(default_factory=dict)  # what `caftune plan` says of the runs
    device: str = "an unknown device"
    logs: dict[str, list[list[dict[str, Any]]]] = field(default_factory=dict)  # by arm and seed: Trainer's log
    concepts: StudiedConcepts | None = None
    examples: list[ComparedExample] = field(default_factory=list)
    checks: Checks = Checks()
    quality: dict[str, Any] | None = None  # of the heads
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Comparison":
        """From what `to_json` gives; keys that older versions did not write have their defaults."""
        return TypeAdapter(cls).validate_python({**values, "differences": values["comparisons"]})

    def to_json(self) -> dict[str, Any]:
        """The contents of comparison.json."""
        values = asdict(self)
        values["comparisons"] = values.pop("differences")
        return {"format": FORMAT, **values}

    @classmethod
    def read(cls, path: Path) -> "Comparison":
        """From a comparison.json.

        Raises:
            CaftuneError: the file is not JSON, or was written by a version with another format.
        """
        found = read_json(path)
        if found.get("format") != FORMAT:
            raise CaftuneError(
                f"{path} must be of format {FORMAT}, got {found.get('format')}. Run `caftune compare` again."
            )
        return cls.from_json(found)

    @property
    def treatment(self) -> str:
        """The arm of the verdict: caft, or the first arm next to the baseline where there is no caft."""
        return TREATMENT if TREATMENT in self.arms else next(arm for arm in self.arms if arm != BASELINE)

    @cached_property
    def by_measure(self) -> list["Measure"]:
        """The measures over all arms, each task's primary one first."""
        keys = dict.fromkeys((row.task, row.measure) for row in self.measures)
        return sorted((self.measure(*key) for key in keys), key=lambda measure: not measure.is_primary)

    @property
    def deciding(self) -> "Measure":
        """The measure of the verdict: the first task's primary one, or the held-out loss where there is no task."""
        return self.measure(self.tasks[0].name, self.tasks[0].primary) if self.tasks else self.measure(HELD_OUT, "loss")

    def measure(self, task: str, name: str) -> "Measure":
        """One measure over all arms that have it."""
        loss = {(HELD_OUT, "loss")}
        primary = {(found.name, found.primary) for found in self.tasks} or loss
        lower = {(found.name, measure) for found in self.tasks for measure in found.lower_is_better} | loss
        arms = {row.arm: row for row in self.measures if (row.task, row.measure) == (task, name)}
        differences = [row for row in self.differences if (row.task, row.measure) == (task, name)]
        return Measure(task, name, arms, differences, (task, name) in primary, (task, name) in lower)


@dataclass(frozen=True)
class Measure:
    """One measure of one task over all arms, and how its values and differences are written."""

    task: str
    name: str
    arms: Mapping[str, Measured]
    differences: Sequence[Difference]
    is_primary: bool
    is_lower_better: bool

    @property
    def is_share(self) -> bool:
        """Whether it is shown in percent: all values are between 0 and 1, and it is not a loss or a count of faults."""
        return not self.is_lower_better and all(0 <= value <= 1 for row in self.arms.values() for value in row.values)

    @property
    def factor(self) -> int:
        """From the value to what is shown."""
        return 100 if self.is_share else 1

    def scaled(self, arm: str) -> tuple[float, float | None]:
        """Mean and half of the interval, as they are shown."""
        mean, half = self.arms[arm].mean, self.arms[arm].half
        return self.factor * mean, None if half is None else self.factor * half

    @property
    def unit(self) -> str:
        """Of a difference; empty for a plain number."""
        return "percentage points" if self.is_share else "nats" if self.task == HELD_OUT else ""

    @property
    def label(self) -> str:
        """`exact_match on molecules`."""
        return self.name if self.name == self.task else f"{self.name} on {self.task}"

    @property
    def heading(self) -> str:
        """Its name with the signs that a table explains."""
        unit = ", %" if self.is_share else ", nats" if self.task == HELD_OUT else ""
        return f"{'★ ' * self.is_primary}{self.name}{unit}{' ↓' * self.is_lower_better}"

    def mean(self, arm: str) -> str:
        """`22.4 ± 1.2`, or a dash where the arm has no such measure."""
        if arm not in self.arms:
            return "–"
        halves = [row.half for row in self.arms.values() if row.half]
        sizes, digits = (halves, 2) if halves else ([row.mean for row in self.arms.values()], 3 + (not self.is_share))
        places = places_for(self.factor * max(map(abs, sizes), default=0), digits)
        mean, half = self.scaled(arm)
        return number(mean, places) + ("" if half is None else f" ± {number(half, places)}")

    def value(self, arm: str) -> str:
        """The mean in a sentence: `22.4%`."""
        unit = "%" if self.is_share else f" {self.unit}".rstrip()
        return f"{self.mean(arm)}{unit}"

    def size(self, row: Difference, value: float) -> str:
        """A size in the precision of a difference: `2.1`."""
        return number(self.factor * value, self._places(row))

    def difference(self, row: Difference) -> str:
        """In a table: `+1.2 [−0.3, +2.7]`."""
        middle, low, high = self._difference(row)
        return f"{middle} [{low},\N{NO-BREAK SPACE}{high}]"

    def difference_in_words(self, row: Difference) -> str:
        """In a sentence: `+1.2 percentage points (95% interval −0.3 to +2.7)`."""
        middle, low, high = self._difference(row)
        return f"{middle} {self.unit}".rstrip() + f" (95% interval {low} to {high})"

    def _difference(self, row: Difference) -> list[str]:
        places = self._places(row)
        return [number(self.factor * value, places, sign=True) for value in (row.difference, row.low, row.high)]

    def _places(self, row: Difference) -> int:
        return places_for(self.factor * (row.high - row.low) / 2, 2)


def number(value: float, places: int, *, sign: bool = False) -> str:
    """A number with a true minus sign."""
    shown = round(value, places) + 0.0  # no minus zero
    return f"{shown:{'+' if sign else ''},.{places}f}".replace("-", "−")


def places_for(size: float, digits: int) -> int:
    """Decimal places that show this many digits of a number of this size: 1 to 4."""
    return min(max(digits - 1 - math.floor(math.log10(size)), 1), 4) if size > 0 else 1


def main_loss(entry: Mapping[str, Any]) -> float | None:
    """L_1 of a line of a training's log, the same quantity in every arm; None where it has none."""
    # logs older than `main_loss` have h1_loss alone, a mean over other weights
    return entry.get("main_loss", entry.get("h1_loss", entry.get("loss")))
