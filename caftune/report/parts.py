"""What a report is made of: sections with sentences, tables, pictures and examples, as plain values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from caftune.compare.summary import MarkedText


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
    """A stretch of a text: the number of concepts it belongs to, and whether one of them begins or ends with it."""

    text: str
    depth: int
    begins: bool
    ends: bool


class Answer(NamedTuple):
    """An answer, its author, and how it was judged: `mark` is "right", "wrong" or empty, `score` then says more."""

    name: str
    parts: Sequence[Part]
    mark: str = ""
    score: str = ""


class Example(NamedTuple):
    """A prompt with the reference and the answers of the arms."""

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


def marked(item: MarkedText) -> list[Part]:
    """A text, cut where its concepts begin and end. They may overlap."""
    text, ranges = item.text, item.concepts
    cuts = sorted({0, len(text), *(cut for place in ranges for cut in place if 0 < cut < len(text))})
    parts = []
    for start, end in pairwise(cuts):
        depth = sum(first <= start and end <= last for first, last in ranges)
        begins, ends = any(first == start for first, _ in ranges), any(last == end for _, last in ranges)
        parts.append(Part(text[start:end], depth, depth > 0 and begins, depth > 0 and ends))
    return parts


def scaled(value: float) -> str:
    """`1.23 × 10¹⁵`; below a million in full."""
    if abs(value) < 1e6:
        return f"{value:,.0f}"
    power = math.floor(math.log10(abs(value)))
    return f"{value / 10**power:.2f} × 10{str(power).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
