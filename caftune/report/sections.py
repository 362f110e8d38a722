"""The sections of a report, as plain values: sentences, tables, pictures, examples. report.py lays them out."""

import re
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import yaml

from caftune.compare.verdict import BASE, BASELINE, main_loss
from caftune.evals.statistics import LEVEL
from caftune.report import plots
from caftune.report.cost_tables import costs
from caftune.report.parts import (
    ARMS,
    Answer,
    Cell,
    Example,
    Measure,
    Picture,
    Run,
    Section,
    Table,
    group_names,
    in_words,
    marked,
    measures_of,
    number,
    p_value,
    places_for,
    without_addresses,
    without_servers,
)

_HORIZON = re.compile(r"h(\d+)_(loss|weight)")


def sections(run: Run) -> Iterator[Section]:
    """The sections that this run has something for, in their order."""
    for build in (_verdict, _results, _training, _concepts, _examples, costs, _heads, _provenance):
        section = build(run)
        if not section.is_empty():
            yield section


def _arms(run: Run) -> list[str]:
    """The arms, after the base and whatever else was measured."""
    measured = [row["arm"] for row in run["measures"]]
    return list(dict.fromkeys([*[BASE] * (BASE in measured), *run["arms"], *measured]))


def _verdict(run: Run) -> Section:
    arms = {arm: ARMS[arm] for arm in _arms(run) if arm in ARMS}
    section = Section("Verdict", text=list(run["remarks"]), terms=arms if len(run["arms"]) > 1 else {})
    for measure in measures_of(run):
        pairs = _pairs(run, measure)
        if measure.is_primary and pairs:
            section.pictures.append(_forest(measure, pairs))
    return section


def _pairs(run: Run, measure: Measure) -> list[Mapping[str, Any]]:
    return [row for row in run["comparisons"] if (row["task"], row["measure"]) == (measure.task, measure.name)]


def _forest(measure: Measure, pairs: Sequence[Mapping[str, Any]]) -> Picture:
    drawn = [
        plots.Difference(_pair_name(row), *(measure.factor * row[name] for name in ("difference", "low", "high")))
        for row in pairs
    ]
    words = "; ".join(f"{_pair_name(row)} {_interval(measure, row)}" for row in pairs)
    return Picture(
        f"{measure.name} on {measure.task}: differences",
        f"Each mark is an arm's mean less that of {BASELINE} (or of the arm named after “vs”), its line the 95% interval. A "
        "line that crosses zero means that these runs cannot tell the two apart.",
        f"Differences in {measure.unit}: {words}.",
        plots.forest(drawn, unit=measure.unit, is_lower_better=measure.is_lower_better),
    )


def _pair_name(row: Mapping[str, Any]) -> str:
    return row["arm"] if row["baseline"] == BASELINE else f"{row['arm']} vs {row['baseline']}"


def _interval(measure: Measure, row: Mapping[str, Any]) -> str:
    """`+1.2 [−0.3, +2.7]`."""
    places = places_for(measure.factor * (row["high"] - row["low"]) / 2, 2)
    shown = [number(measure.factor * row[name], places, sign=True) for name in ("difference", "low", "high")]
    return f"{shown[0]} [{shown[1]},\N{NO-BREAK SPACE}{shown[2]}]"


def _results(run: Run) -> Section:
    section = Section("Results")
    if run["missing"]:
        section.text.append(
            f"Not finished: {', '.join(run['missing'])}. These seeds are left out of every arm, so that all arms have the same."
        )
    groups = group_names(run)
    by_task: dict[str, list[Measure]] = {}
    for measure in measures_of(run):
        if measure.name not in groups:
            by_task.setdefault(measure.task, []).append(measure)
    sizes = {task["name"]: f", {task['examples']:,} examples" for task in run["tasks"]}
    for task, measures in by_task.items():
        section.tables.append(_measure_table(run, f"{task}{sizes.get(task, '')}", measures))
    compared = [(measure, row) for measure in measures_of(run) for row in _pairs(run, measure)]
    if compared:
        section.tables.append(_difference_table(compared))
    return section


def _measure_table(run: Run, title: str, measures: Sequence[Measure], *, is_folded: bool = False) -> Table:
    seeds = max(len(row["values"]) for measure in measures for row in measure.rows.values())
    how = (
        f"Mean of {seeds} runs ± half of its 95% interval."
        if seeds > 1
        else "One run each, so chance is not accounted for."
    )
    if run["comparisons"]:
        how += f" ▲ better and ▼ worse than {BASELINE}, by the p-values corrected for the number of measures (Holm)."
    signs = {"★": "is the task's main measure", "↓": "means that less is better"}
    known = [f"{sign} {words}" for sign, words in signs.items() if any(sign in m.heading for m in measures)]
    arms = [arm for arm in _arms(run) if any(arm in measure.rows for measure in measures)]
    rows = [[Cell(arm), *(Cell(m.shown(arm), _tag(run, m, arm)) for m in measures)] for arm in arms]
    how += f" {'; '.join(known)}." if known else ""
    return Table(title, how, ["arm", *(measure.heading for measure in measures)], rows, is_folded)


def _tag(run: Run, measure: Measure, arm: str) -> str:
    for row in _pairs(run, measure):
        if row["arm"] == arm and row["baseline"] == BASELINE and row["p_holm"] <= LEVEL:
            return "better" if (row["difference"] > 0) != measure.is_lower_better else "worse"
    return ""


def _difference_table(compared: Sequence[tuple[Measure, Mapping[str, Any]]]) -> Table:
    head = ["measure", "arm", "less", "difference [95% interval]", "p", "p, Holm", "smallest detectable", "over"]
    rows = []
    for measure, row in compared:
        least = row["minimum_detectable"]
        places = places_for(measure.factor * (row["high"] - row["low"]) / 2, 2)
        cells = [
            *(f"{measure.task}: {measure.heading}", row["arm"], row["baseline"], _interval(measure, row)),
            *(p_value(row["p_value"]), p_value(row["p_holm"])),
            *("–" if least is None else number(measure.factor * least, places), row["over"]),
        ]
        rows.append([Cell(text) for text in cells])
    return Table(
        "All differences, with p-values",
        "p is the chance of a difference at least this large between equal arms; Holm's is corrected for how many measures one "
        "looks at. A true difference of the smallest detectable size would be found four times out of five. Differences of "
        "shares are in percentage points.",
        head,
        rows,
        is_folded=True,
    )


def _training(run: Run) -> Section:
    section = Section("Training")
    losses = {arm: [_main_loss(log) for log in logs] for arm, logs in run["logs"].items()}
    drawn = {arm: seeds for arm, seeds in losses.items() if any(seeds)}
    seeds = " Thick: mean of the seeds; thin: each seed." if any(len(found) > 1 for found in drawn.values()) else ""
    if drawn:
        section.pictures.append(_curves("Next-token loss L₁ in training", f"Lower is better.{seeds}", drawn))
    others = {arm: found for arm, found in drawn.items() if BASELINE in drawn and arm != BASELINE}
    apart = {arm: less for arm, found in others.items() if any(less := _less(found, drawn[BASELINE]))}
    if apart:
        how = f"Below zero the arm predicts its training text better than {BASELINE} at the same step.{seeds}"
        section.pictures.append(_curves(f"L₁ less that of {BASELINE}", how, apart))
    for arm, logs in run["logs"].items():
        by_horizon = _by_horizon(logs, "loss")
        if by_horizon:
            how = f"Loss of the token h places ahead; h = 1 is the model itself, the others are heads.{seeds}"
            section.pictures.append(_curves(f"{arm}: loss by horizon", how, by_horizon))
    weights = {arm: _by_horizon(logs[:1], "weight") for arm, logs in run["logs"].items()}
    shown = next(
        (arm for arm, found in weights.items() if any(y for seeds in found.values() for _, y in seeds[0])), None
    )
    if shown is not None:
        title, how = (
            f"{shown}: weights of the heads' losses",
            "How much each head's loss counts beside L₁: β γ(t) αʰ⁻¹.",
        )
        section.pictures.append(_curves(title, how, weights[shown], unit="weight", zero=True))
    return section


def _curves(
    title: str,
    how: str,
    lines: Mapping[str, Sequence[plots.Points]],
    *,
    unit: str = "nats per token",
    zero: bool = False,
) -> Picture:
    last = {name: fmean(points[-1][1] for points in seeds if points) for name, seeds in lines.items()}
    ends = ", ".join(f"{name} {value:.3g}" for name, value in last.items()).replace("-", "−")
    words = f"At the last step ({unit}): {ends}."
    return Picture(title, how, words, plots.curves(lines, unit=unit, zero=zero))


def _main_loss(log: Sequence[Mapping[str, Any]]) -> plots.Points:
    """L_1 by step."""
    return [(entry["step"], value) for entry in log if (value := main_loss(entry)) is not None]


def _by_horizon(logs: Sequence[Sequence[Mapping[str, Any]]], kind: str) -> dict[str, list[plots.Points]]:
    names = [_HORIZON.fullmatch(key) for log in logs for entry in log for key in entry]
    horizons = sorted({int(name[1]) for name in names if name and name[2] == kind})
    return {
        f"h = {h}": [
            [(entry["step"], entry[f"h{h}_{kind}"]) for entry in log if f"h{h}_{kind}" in entry] for log in logs
        ]
        for h in horizons
    }


def _less(ours: Sequence[plots.Points], theirs: Sequence[plots.Points]) -> list[plots.Points]:
    pairs = [(one, dict(other)) for one, other in zip(ours, theirs, strict=True)]
    return [[(step, value - other[step]) for step, value in one if step in other] for one, other in pairs]


def _concepts(run: Run) -> Section:
    section = Section("Concepts")
    studied = run["concepts"]
    if studied:
        name = "functional group" if studied["kind"] == "smiles" else "name"
        for group, title in (("by_tokens", "by number of tokens"), ("by_name", f"by {name}")):
            for measure in ("probability", "exact"):
                section.pictures += _concept_bars(studied["arms"], group, measure, title)
            section.tables += _concept_table(studied["arms"], group, title)
    groups = group_names(run)
    by_group: dict[str, dict[str, Measure]] = {}
    for found in measures_of(run):
        if found.name in groups:
            by_group.setdefault(f"{found.task}: {groups[found.name][0]}", {})[groups[found.name][1]] = found
    section.pictures += [_measure_bars(title, found) for title, found in by_group.items()]
    if by_group:
        every = [measure for found in by_group.values() for measure in found.values()]
        section.tables.append(_measure_table(run, "Functional groups in the answers", every, is_folded=True))
    return section


def _measure_bars(title: str, measures: Mapping[str, Measure]) -> Picture:
    is_whole = "recall" in measures
    how = "Precision: how many of the groups written were asked for. Recall: how many of those asked for were written."
    how = how if is_whole else "Micro: over all decisions. Macro: the mean over the kinds of fragments."
    how += " The lines on bars are 95% intervals." * any(
        row["half"] for m in measures.values() for row in m.rows.values()
    )
    arms = dict.fromkeys(arm for measure in measures.values() for arm in measure.rows)
    how += f" {_BARS}" * (len(arms) > 1)
    values = {arm: {name: m.bar(arm) for name, m in measures.items() if arm in m.rows} for arm in arms}
    words = "; ".join(f"{arm}: " + ", ".join(f"{name} {m.shown(arm)}" for name, m in measures.items()) for arm in arms)
    return Picture(title, how, f"{words} (%).", plots.bars(values, unit="%"))


def _concept_bars(arms: Mapping[str, Any], group: str, measure: str, title: str) -> list[Picture]:
    values = {arm: _concept_groups(found, group, measure) for arm, found in arms.items() if found[group]}
    if not values:
        return []
    how = f"{_CONCEPT_WORDS[measure]} In brackets: how many concepts. Each dot is a seed. {_BARS}"
    words = "; ".join(
        f"{arm}: " + ", ".join(f"{name} {number(bar.mean, 1)}" for name, bar in found.items())
        for arm, found in values.items()
    )
    svg = plots.bars(values, unit="%", is_lying=group == "by_name" or len(next(iter(values.values()))) > 9)
    return [Picture(f"{measure.capitalize()} {title}", how, f"In percent, {words}.", svg)]


_BARS = "Bars stand in the order of the legend."
_CONCEPT_WORDS = {
    "probability": "That of all the concept's tokens, given the text before it.",
    "exact": "Concepts whose every token is the most likely one.",
}


def _concept_groups(found: Mapping[str, Any], group: str, measure: str) -> dict[str, plots.Bar]:
    """By number of tokens, after those of all concepts; or by name."""
    named = {f"{name} ({part['count']:,})": part[measure] for name, part in _ordered(found[group])}
    every = {"all": found[measure], **named} if group == "by_tokens" else named
    return {
        name: plots.Bar(100 * fmean(values), None, [100 * value for value in values]) for name, values in every.items()
    }


def _ordered(parts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(parts.items(), key=lambda item: (int(item[0]) if item[0].isdecimal() else 0, -item[1]["count"]))


def _concept_table(arms: Mapping[str, Any], group: str, title: str) -> list[Table]:
    first = next(iter(arms.values()))[group]
    if not first:
        return []
    columns = [(arm, measure) for measure in ("probability", "exact") for arm in arms]
    rows = [
        [Cell(name), Cell(f"{part['count']:,}"), *(_percent(arms[arm][group][name][m]) for arm, m in columns)]
        for name, part in _ordered(first)
    ]
    head = [title.removeprefix("by "), "how many", *(f"{measure}, {arm}, %" for arm, measure in columns)]
    return [Table(f"Concepts {title}", "Means over the seeds.", head, rows, is_folded=True)]


def _percent(values: Sequence[float]) -> Cell:
    return Cell(number(100 * fmean(values), 1))


def _examples(run: Run) -> Section:
    section = Section("Examples")
    for item in run["examples"]:
        others = [one for one in run["examples"] if one["task"] == item["task"]]
        scores = {answer["score"] for one in others for answer in one["answers"].values()}
        answers = [Answer("reference", marked(item["reference"]), "", "")]
        for arm, answer in item["answers"].items():
            answers.append(Answer(arm, marked(answer), *_judged(answer["score"], is_binary=scores <= {0, 1})))
        said = ", ".join(f"{answer.name} {answer.mark or answer.score}" for answer in answers[1:])
        section.examples.append(Example(f"{item['task']} {item['id']}: {said}", item["prompt"], answers))
    if section.examples:
        kinds = any(part.depth for example in section.examples for answer in example.answers for part in answer.parts)
        section.text.append("Examples of the first seed." + " Concepts are underlined on a coloured ground." * kinds)
    return section


def _judged(score: float, *, is_binary: bool) -> tuple[str, str]:
    return ("right" if score == 1 else "wrong", "") if is_binary else ("", f"score {score:.3g}".replace("-", "−"))


def _heads(run: Run) -> Section:
    quality = run["quality"]
    if not quality:
        return Section("Heads")
    names = {"heads": "heads", "untrained": "untrained copies", "trunk": "the model, one token before"}
    rows, horizons = [], list(quality["targets"])
    for measure, places in (("loss", 3), ("top1", 1), ("top5", 1), ("agreement", 1)):
        for kind, who in names.items():
            if measure in quality[kind]:
                values = [(1 if measure == "loss" else 100) * quality[kind][measure][h] for h in horizons]
                unit = "nats" if measure == "loss" else "%"
                rows.append([Cell(f"{measure}, {unit}: {who}"), *(Cell(number(value, places)) for value in values)])
    lengths = [f"{names[kind]} {quality[kind]['accepted_length']:.2f}" for kind in ("heads", "untrained")]
    how = "Loss, share of first guesses (top1) and of first five (top5) that are right, and of what the model itself writes."
    table = Table("Quality by horizon", how, ["", *(f"h = {h}" for h in horizons)], rows, is_folded=True)
    said = (
        "Good heads lie between untrained copies and the model itself, which sees h − 1 more tokens. Guesses that the model "
        f"would accept in a row, of {len(horizons)}: {', '.join(lengths)}."
    )
    what = "The numbers are in the table below."
    drawn = plots.quality_pictures(quality).items()
    pictures = [Picture(title, "By horizon: how many tokens ahead.", what, svg) for title, svg in drawn]
    return Section("Heads", text=[said], pictures=pictures, tables=[table])


def _provenance(run: Run) -> Section:
    section = Section("Provenance")
    rows = []
    for key, value in run["provenance"].items():
        if isinstance(value, Mapping) and key in ("data", "heads"):
            rows += [[Cell(f"{key}: {name}"), Cell(in_words(part))] for name, part in value.items()]
        else:
            rows.append([Cell(key), Cell(without_servers(value) if key == "command" else in_words(value))])
    if rows:
        how = "What this was made with; data and heads are named by the SHA-256 of their contents."
        section.tables.append(Table("How to repeat it", how, ["", ""], rows))
    if run["recipe"]:
        section.code = yaml.safe_dump(without_addresses(run["recipe"]), sort_keys=False, allow_unicode=True)
    return section
