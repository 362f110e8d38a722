"""Pictures of the report, as SVG.

An SVG is 360 units wide, so that its text is still of 11 pixels on a phone, and its colours are CSS variables with a default
(`var(--c0f766e, #0f766e)`), so that a page can give others to a dark background.
"""

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from caftune.checkpoints.quality_card import PANELS, draw_panel

_LABEL = 26  # characters of a name
_INK, _PALE = "#1f2937", "#9aa3af"
_STYLES: dict[str, tuple[str, Any, str]] = {  # colour, dashes, marker
    "base": ("#858c99", "-", "x"),
    "ntp": ("#4b5563", "-", "o"),
    "caft": ("#0f766e", (0, (6, 1.5)), "D"),
    "caft_frozen": ("#a16207", (0, (3, 1, 1.2, 1)), "d"),
    "beta0": ("#2563eb", (0, (1.2, 1.8)), "s"),
    "random_heads": ("#c2410c", (0, (4, 1.5, 1.2, 1.5)), "^"),
    "shuffled_horizons": ("#7c3aed", (0, (8, 2, 1, 2, 1, 2)), "v"),
    "no_pretraining": ("#be185d", (0, (2.5, 2)), "P"),
}
_MOST_POINTS = 250  # of one line, spread evenly over the steps

Points = Sequence[tuple[float, float]]
Lines = Mapping[str, Sequence[Points]]  # by name and seed: (step, value)


class Bar(NamedTuple):
    """A mean, half of its 95% interval where it has one, and the single values, drawn as dots where it has none."""

    mean: float
    half: float | None = None
    values: Sequence[float] = ()


class Difference(NamedTuple):
    """A line of a forest plot."""

    label: str
    difference: float
    low: float
    high: float


def forest(rows: Sequence[Difference], *, unit: str, is_lower_better: bool) -> str:
    """Differences to a baseline as points on their 95% intervals, with a line at zero; SVG."""
    with _drawing(1.25 + 0.36 * len(rows)) as (figure, axes):
        for place, row in enumerate(rows):
            colour, _, marker = _style(row.label)
            axes.plot([row.low, row.high], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
            axes.plot([row.difference], [place], marker=marker, color=colour, markersize=8)
        axes.axvline(0, color=_INK, linewidth=1.2)
        reach = (
            1.08 * max((abs(end) for row in rows for end in (row.low, row.high) if math.isfinite(end)), default=0)
            or 1.0
        )
        axes.set(xlim=(-reach, reach), ylim=(len(rows) - 0.5, -0.5), xlabel=unit)
        axes.set_yticks(range(len(rows)), [_label(row.label) for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="x", color=_PALE, alpha=0.4)
        axes.spines["left"].set_visible(False)
        left, right = ("← better", "worse →") if is_lower_better else ("← worse", "better →")
        axes.annotate(left, (0, 1), xycoords="axes fraction", ha="left", va="bottom")
        axes.annotate(right, (1, 1), xycoords="axes fraction", ha="right", va="bottom")
        return _svg(figure)


def curves(lines: Lines, *, unit: str) -> str:
    """Values over optimizer steps, SVG: each name's mean over its seeds, and the seeds as thin lines where there are several.

    A mean is drawn at steps that all seeds have; the axis of weights starts at 0.
    """
    with _drawing(3.1) as (figure, axes):
        for number, (name, seeds) in enumerate(lines.items()):
            colour, dashes, marker = _style(name, number)
            mean = _mean(seeds)
            for points in seeds if len(seeds) > 1 else ():
                axes.plot(*_columns(points), color=colour, linewidth=0.6, alpha=0.35)
            style: dict[str, Any] = {"color": colour, "linestyle": dashes, "label": _label(name)}
            axes.plot(*_columns(mean), linewidth=2, marker=marker if len(mean) < 2 else None, **style)
        axes.set(xlabel="optimizer step", ylabel=unit, xlim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if unit == "weight":
            axes.set_ylim(bottom=0)
        axes.grid(color=_PALE, alpha=0.35)
        _legend(figure, axes)
        return _svg(figure)


def bars(values: Mapping[str, Mapping[str, Bar]], *, unit: str, is_horizontal: bool = False) -> str:
    """Bars in groups, from zero: `values` by arm and group; SVG. Horizontal ones leave room for many groups with long names."""
    groups = list(dict.fromkeys(group for arm in values.values() for group in arm))
    thick = 0.82 / max(len(values), 1)
    height = max(2.2, 1.1 + len(groups) * (0.11 * len(values) + 0.12)) if is_horizontal else 2.9
    with _drawing(height) as (figure, axes):
        draw, error = (axes.barh, "xerr") if is_horizontal else (axes.bar, "yerr")
        for number, (arm, by_group) in enumerate(values.items()):
            colour, _, _ = _style(arm)
            places = [groups.index(group) + (number - (len(values) - 1) / 2) * thick for group in by_group]
            means = [bar.mean for bar in by_group.values()]
            style: dict[str, Any] = {"facecolor": (colour, 0.3), "edgecolor": colour, "linewidth": 1}
            draw(places, means, 0.92 * thick, label=_label(arm), **style)
            halves: dict[str, Any] = {error: [bar.half or 0.0 for bar in by_group.values()]}
            ends = (means, places) if is_horizontal else (places, means)
            axes.errorbar(*ends, **halves, color=_INK, linewidth=1.1, linestyle="none")
            for place, bar in zip(places, by_group.values(), strict=True):
                across = [place] * len(bar.values)
                dots = (bar.values, across) if is_horizontal else (across, bar.values)
                axes.plot(*dots, marker="o", markersize=1.8, color=_INK, linestyle="none")
        _name_groups(axes, groups, unit, is_horizontal=is_horizontal)
        _legend(figure, axes)
        return _svg(figure)


def _name_groups(axes: Axes, groups: Sequence[str], unit: str, *, is_horizontal: bool) -> None:
    names = [_label(group) for group in groups]
    _, end = axes.get_xlim() if is_horizontal else axes.get_ylim()
    reach = (0, min(end, 103) if unit == "%" else end)  # an interval of two seeds can reach far beyond 100%
    if is_horizontal:
        axes.set(xlabel=unit, xlim=reach, ylim=(len(groups) - 0.4, -0.6))
        axes.set_yticks(range(len(groups)), names)
    else:
        axes.set(ylabel=unit, ylim=reach)
        axes.set_xticks(range(len(groups)), [name.replace(" (", "\n(") for name in names])
    axes.tick_params(axis="y" if is_horizontal else "x", length=0)
    axes.grid(axis="x" if is_horizontal else "y", color=_PALE, alpha=0.4)


def quality_pictures(quality: Mapping[str, Any]) -> dict[str, str]:
    """The panels of a quality report of heads, title: SVG."""
    found = {}
    for title in PANELS:
        with _drawing(3.0) as (figure, axes):
            draw_panel(axes, title, quality)
            axes.grid(color=_PALE, alpha=0.35)
            _legend(figure, axes, columns=1)
            found[title] = _svg(figure)
    return found


def _style(name: str, number: int = 0) -> tuple[str, Any, str]:
    """That of an arm; of anything else (a horizon, a pair of arms) the style of its number, or that of its first word."""
    others = list(_STYLES.values())[1:]
    return _STYLES.get(name.partition(" ")[0]) or others[number % len(others)]


def _label(text: str) -> str:
    """A name in a picture: one short line of characters that XML can hold."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _LABEL else f"{line[: _LABEL - 9]}…{line[-8:]}"  # its end may hold a number


def _columns(points: Points) -> tuple[list[float], list[float]]:
    stride = -(-len(points) // _MOST_POINTS) or 1
    kept = [*points[:-1:stride], *points[-1:]]
    return [step for step, _ in kept], [value for _, value in kept]


def _mean(seeds: Sequence[Points]) -> Points:
    tables = [dict(points) for points in seeds]
    common = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    return [(step, sum(table[step] for table in tables) / len(tables)) for step in common]


def _legend(figure: Figure, axes: Axes, columns: int | None = None) -> None:
    """Above the picture, in one line where it fits, else in lines of three; read by line, not by column."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    columns = columns or (len(labels) if sum(len(label) + 7 for label in labels) < 57 else 3)
    order = [place for column in range(columns) for place in range(column, len(labels), columns)]
    figure.legend(
        [handles[place] for place in order],
        [labels[place] for place in order],
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        fontsize=10,
        columnspacing=1.1,
    )


@contextmanager
def _drawing(height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure of 5 x `height` inches for `_svg`. Text stays text, `$` means nothing, and equal values give equal SVG."""
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "caftune",
        "text.parse_math": False,
        "font.size": 11,
    }
    settings |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK)
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has its own fonts
        figure = Figure(figsize=(5, height), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_facecolor("none")
        figure.patch.set_visible(False)
        yield figure, axes


def _svg(figure: Figure) -> str:
    """The `<svg>` alone: without declarations, rules for the whole page, a fixed size, fonts, or digits that none can see."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = file.getvalue()
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg, count=1)
    return re.sub(r"<[^>]+>\s*", lambda tag: _tidied(tag[0]), svg)


def _tidied(tag: str) -> str:
    tag = re.sub(r"(\.\d\d)\d+", r"\1", " ".join(tag.split())).replace("xlink:href=", "href=")
    tag = re.sub(r"font-family: [^;]*; ", "", tag)
    return re.sub(r"((?:fill|stroke): ?)#([0-9a-f]{6})", r"\1var(--c\2, #\2)", tag)
