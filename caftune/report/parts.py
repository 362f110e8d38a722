"""What a report is made of: sections with sentences, tables, pictures and examples; measures, and numbers as they are shown."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from caftune.compare.verdict import HELD_OUT
from caftune.report import plots

Run = dict[str, Any]  # in the shape of comparison.json
ARMS = {
    "base": "the model before fine-tuning",
    "ntp": "plain next-token fine-tuning, the baseline",
    "caft": "concept-aware fine-tuning with pretrained heads",
    "beta0": "CAFT's code with weight 0, which must equal ntp",
    "random_heads": "CAFT with heads of shuffled weights, which know nothing",
    "shuffled_horizons": "CAFT with each head in the place of the next one",
    "no_pretraining": "CAFT with heads that were not pretrained",
}
_GROUP = re.compile(r"(\w+)_(precision|recall|f1)")


class Cell(NamedTuple):
    """A cell of a table; `tag` is "better" or "worse" where it differs from the baseline."""

    text: str
    tag: str = ""


class Table(NamedTuple):
    """A table and a sentence on how to read it. The first cell of a row names the row."""

    title: str
    how: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    is_folded: bool = False


class Picture(NamedTuple):
    """An SVG, a sentence on how to read it, and its contents in words."""

    title: str
    how: str
    words: str
    svg: str


class Part(NamedTuple):
    """A stretch of a text: in how many concepts it lies, and whether one of them begins or ends with it."""

    text: str
    depth: int
    begins: bool
    ends: bool


class Answer(NamedTuple):
    """What was written, by whom, and what came of it: `mark` is "right", "wrong" or empty."""

    name: str
    parts: Sequence[Part]
    mark: str
    score: str


class Example(NamedTuple):
    """A prompt and what the reference and the arms answer."""

    title: str
    prompt: str
    answers: Sequence[Answer]


@dataclass
class Section:
    """A part of the page."""

    title: str
    text: list[str] = field(default_factory=list)
    terms: dict[str, str] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    code: str = ""

    def is_empty(self) -> bool:
        """Whether there is nothing under the title."""
        return not (self.text or self.pictures or self.tables or self.examples or self.code)


@dataclass(frozen=True)
class Measure:
    """One measure of one task: its row of `measures` by arm."""

    task: str
    name: str
    rows: Mapping[str, Mapping[str, Any]]
    is_primary: bool
    is_lower_better: bool

    @property
    def is_share(self) -> bool:
        """Whether it is shown in percent: all its values are between 0 and 1, and it is no loss and no count of faults."""
        return not self.is_lower_better and all(
            0 <= value <= 1 for row in self.rows.values() for value in row["values"]
        )

    @property
    def factor(self) -> int:
        """From the value to what is shown."""
        return 100 if self.is_share else 1

    @property
    def unit(self) -> str:
        """Of a difference."""
        return "percentage points" if self.is_share else "nats" if self.task == HELD_OUT else self.name

    @property
    def heading(self) -> str:
        """Its name with the signs that a table explains."""
        unit = ", %" if self.is_share else ", nats" if self.task == HELD_OUT else ""
        return f"{'★ ' * self.is_primary}{self.name}{unit}{' ↓' * self.is_lower_better}"

    def bar(self, arm: str) -> plots.Bar:
        """The mean of an arm and half of its interval, as they are drawn."""
        row = self.rows[arm]
        return plots.Bar(self.factor * row["mean"], None if row["half"] is None else self.factor * row["half"])

    def shown(self, arm: str) -> str:
        """`22.4 ± 1.2`, or a dash where the arm has no such measure."""
        if arm not in self.rows:
            return "–"
        halves = [row["half"] for row in self.rows.values() if row["half"]]
        sizes, digits = (
            (halves, 2) if halves else ([row["mean"] for row in self.rows.values()], 3 + (not self.is_share))
        )
        places = places_for(self.factor * max(map(abs, sizes), default=0), digits)
        mean, half, _ = self.bar(arm)
        return number(mean, places) + (f" ± {number(half, places)}" if half is not None else "")


def number(value: float, places: int, *, sign: bool = False) -> str:
    """A number with a true minus sign."""
    shown = round(value, places) + 0.0  # no minus zero
    return f"{shown:{'+' if sign else ''},.{places}f}".replace("-", "−")


def places_for(size: float, digits: int) -> int:
    """Decimal places that show this many digits of a number of this size: 1 to 4."""
    return min(max(digits - 1 - math.floor(math.log10(size)), 1), 4) if size > 0 else 1


def scaled(value: float) -> str:
    """`1.23 × 10¹⁵`; below a million in full."""
    if abs(value) < 1e6:
        return f"{value:,.0f}"
    power = math.floor(math.log10(abs(value)))
    return f"{value / 10**power:.2f} × 10{str(power).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def p_value(value: float) -> str:
    """Two digits."""
    return "<\N{NO-BREAK SPACE}0.001" if value < 0.001 else f"{value:.2g}"


def measures_of(run: Run) -> list[Measure]:
    """The measures in the order of the run, each task's primary one first."""
    primary = {(task["name"], task["primary"]) for task in run["tasks"]} or {(HELD_OUT, "loss")}
    lower = {(task["name"], name) for task in run["tasks"] for name in task["lower_is_better"]} | {(HELD_OUT, "loss")}
    rows: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in run["measures"]:
        rows.setdefault((row["task"], row["measure"]), {})[row["arm"]] = row
    found = [Measure(*key, arms, key in primary, key in lower) for key, arms in rows.items()]
    return sorted(found, key=lambda measure: not measure.is_primary)


def group_names(run: Run) -> dict[str, tuple[str, str]]:
    """Measures that belong together, as (group, measure): precision, recall and F1 of one thing, and RDKit's fragments."""
    names = {row["measure"] for row in run["measures"]}
    found = {name: (match[1], match[2]) for name in names if (match := _GROUP.fullmatch(name))}
    whole = {group for group, kind in found.values() if kind == "recall"}
    fragments = {name: ("fragments", name) for name in names if name.startswith("fragments_")}
    return {name: pair for name, pair in found.items() if pair[0] in whole} | fragments


def marked(item: Mapping[str, Any]) -> list[Part]:
    """A text cut where concepts, given as ranges of characters [start, end), begin and end. They may overlap."""
    text, ranges = item["text"], item["concepts"]
    cuts = sorted({0, len(text), *(cut for place in ranges for cut in place if 0 < cut < len(text))})
    parts = []
    for start, end in pairwise(cuts):
        depth = sum(first <= start and end <= last for first, last in ranges)
        begins, ends = any(first == start for first, _ in ranges), any(last == end for _, last in ranges)
        parts.append(Part(text[start:end], depth, depth > 0 and begins, depth > 0 and ends))
    return parts


def in_words(value: Any) -> str:
    """`key value, key value`, without what is not known."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {in_words(part)}" for key, part in value.items() if part is not None)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def without_servers(command: str) -> str:
    """A page is passed on, and the address of a server may hold a key."""
    return " ".join(word for word in command.split(" ") if ".server." not in word)


def without_addresses(recipe: Any) -> Any:
    """The same of a recipe."""
    if not isinstance(recipe, Mapping):
        return recipe
    return {key: "left out" if key == "url" else without_addresses(value) for key, value in recipe.items()}
