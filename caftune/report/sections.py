"""The sections of a report, as plain values: sentences, tables, pictures, examples. render.py lays them out."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import yaml

from caftune.checkpoints.quality_card import quality_rows
from caftune.compare.summary import (
    ARMS,
    BASE,
    BASELINE,
    ArmConcepts,
    Comparison,
    ConceptGroup,
    Difference,
    Measure,
    main_loss,
    number,
)
from caftune.evals.statistics import LEVEL
from caftune.report import plots
from caftune.report.cost_tables import costs
from caftune.report.parts import Answer, Cell, Example, Picture, Section, Table, marked

_HORIZON = re.compile(r"h(\d+)_(loss|weight)")
_GROUP = re.compile(r"(\w+)_(precision|recall|f1)")
_BARS = "Bars are in the order of the legend."
_CONCEPT_WORDS = {
    "probability": "Probability of all tokens of the concept, given the text before it.",
    "exact": "Share of concepts of which every token is the most likely one.",
}


def sections(run: Comparison) -> Iterator[Section]:
    """The sections that this run has something for, in their order."""
    for build in (_verdict, _results, _training, _concepts, _examples, costs, _heads, _provenance):
        section = build(run)
        if not section.is_empty():
            yield section


def _arms(run: Comparison) -> list[str]:
    """The arms, after the base and before any other evaluated model."""
    measured = [row.arm for row in run.measures]
    return list(dict.fromkeys([*[BASE] * (BASE in measured), *run.arms, *measured]))


def _verdict(run: Comparison) -> Section:
    heads = "trained along" if run.recipe.get("heads", {}).get("train") else "frozen"
    arms = {arm: ARMS[arm].format(heads=heads) for arm in _arms(run) if arm in ARMS}
    section = Section("Verdict", text=list(run.remarks), terms=arms if len(run.arms) > 1 else {})
    section.pictures += [_forest(measure) for measure in run.by_measure if measure.is_primary and measure.differences]
    return section


def _forest(measure: Measure) -> Picture:
    names = [row.arm if row.baseline == BASELINE else f"{row.arm} vs {row.baseline}" for row in measure.differences]
    pairs = list(zip(names, measure.differences, strict=True))
    drawn = [
        plots.Difference(name, *(measure.factor * value for value in (row.difference, row.low, row.high)))
        for name, row in pairs
    ]
    unit = measure.unit or measure.name
    return Picture(
        f"{measure.name} on {measure.task}: differences",
        f"Each mark is an arm's mean minus that of {BASELINE} (or of the arm named after “vs”); its line is the 95% interval. "
        "If the line crosses zero, these runs do not show a difference.",
        f"Differences in {unit}: {'; '.join(f'{name} {measure.difference(row)}' for name, row in pairs)}.",
        plots.forest(drawn, unit=unit, is_lower_better=measure.is_lower_better),
    )


def _results(run: Comparison) -> Section:
    section = Section("Results")
    if run.missing:
        section.text.append(
            f"Missing runs: {', '.join(run.missing)}. Their seeds are left out of every arm, so that all arms have the same "
            "seeds."
        )
    groups = _group_names(run)
    sizes = {task.name: f", {task.examples:,} examples" for task in run.tasks}
    for task in dict.fromkeys(measure.task for measure in run.by_measure):
        measures = [measure for measure in run.by_measure if measure.task == task and measure.name not in groups]
        if measures:
            section.tables.append(_measure_table(run, f"{task}{sizes.get(task, '')}", measures))
    compared = [(measure, row) for measure in run.by_measure for row in measure.differences]
    if compared:
        section.tables.append(_difference_table(compared))
    return section


def _measure_table(run: Comparison, title: str, measures: Sequence[Measure], *, is_folded: bool = False) -> Table:
    seeds = max(len(row.values) for measure in measures for row in measure.arms.values())
    how = f"Mean of {seeds} runs ± half of its 95% interval."
    if seeds < 2:
        how = "One run per arm, so the variation between runs is unknown."
    if run.differences:
        how += f" ▲ better and ▼ worse than {BASELINE}, by p-values corrected for the number of measures (Holm)."
    headings = [measure.heading for measure in measures]
    signs = {"★": "primary measure of the task", "↓": "lower is better"}
    known = [f"{sign} {words}" for sign, words in signs.items() if any(sign in heading for heading in headings)]
    how += f" {'; '.join(known)}." if known else ""
    arms = [arm for arm in _arms(run) if any(arm in measure.arms for measure in measures)]
    rows = [[Cell(arm), *(Cell(measure.mean(arm), _tag(measure, arm)) for measure in measures)] for arm in arms]
    return Table(title, how, ["arm", *headings], rows, is_folded)


def _tag(measure: Measure, arm: str) -> str:
    for row in measure.differences:
        if row.arm == arm and row.baseline == BASELINE and row.p_holm <= LEVEL:
            return "better" if (row.difference > 0) != measure.is_lower_better else "worse"
    return ""


def _difference_table(compared: Sequence[tuple[Measure, Difference]]) -> Table:
    rows = [
        (
            f"{measure.task}: {measure.heading}",
            row.arm,
            row.baseline,
            measure.difference(row),
            _p_value(row.p_value),
            _p_value(row.p_holm),
            "–" if row.minimum_detectable is None else measure.size(row, row.minimum_detectable),
            row.over,
        )
        for measure, row in compared
    ]
    return Table(
        "All differences, with p-values",
        "p is the probability of a difference at least this large between arms without a true difference; “p, Holm” is "
        "corrected for the number of measures. A true difference of the smallest detectable size would be detected four times "
        "out of five. Differences of shares are in percentage points.",
        ["measure", "arm", "baseline", "difference [95% interval]", "p", "p, Holm", "smallest detectable", "over"],
        [[Cell(text) for text in row] for row in rows],
        is_folded=True,
    )


def _p_value(value: float) -> str:
    return "<\N{NO-BREAK SPACE}0.001" if value < 0.001 else f"{value:.2g}"


def _training(run: Comparison) -> Section:
    section = Section("Training")
    losses = {
        arm: [[(entry["step"], loss) for entry in log if (loss := main_loss(entry)) is not None] for log in logs]
        for arm, logs in run.logs.items()
    }
    drawn = {arm: seeds for arm, seeds in losses.items() if any(seeds)}
    seeds = " Thick: mean of the seeds; thin: each seed." if any(len(found) > 1 for found in drawn.values()) else ""
    if drawn:
        section.pictures.append(_curves("Next-token loss L₁ in training", f"Lower is better.{seeds}", drawn))
    others = {arm: found for arm, found in drawn.items() if BASELINE in drawn and arm != BASELINE}
    apart = {arm: less for arm, found in others.items() if any(less := _minus(found, drawn[BASELINE]))}
    if apart:
        how = f"Below zero the arm predicts its training text better than {BASELINE} at the same step.{seeds}"
        section.pictures.append(_curves(f"L₁ minus that of {BASELINE}", how, apart))
    for arm, logs in run.logs.items():
        by_horizon = _by_horizon(logs, "loss")
        if by_horizon:
            how = f"Loss of the token h positions ahead; h = 1 is the model itself, the others are heads.{seeds}"
            section.pictures.append(_curves(f"{arm}: loss by horizon", how, by_horizon))
    for arm, logs in run.logs.items():
        weights = _by_horizon(logs[:1], "weight")
        if any(weight for lines in weights.values() for _, weight in lines[0]):
            title, how = f"{arm}: weights of the heads' losses", "Weight of each head's loss next to L₁: β γ(t) αʰ⁻¹."
            section.pictures.append(_curves(title, how, weights, unit="weight"))
            break  # the other arms have the same
    return section


def _curves(title: str, how: str, lines: plots.Lines, unit: str = "nats per token") -> Picture:
    last = {name: fmean(points[-1][1] for points in seeds if points) for name, seeds in lines.items()}
    ends = ", ".join(f"{name} {value:.3g}" for name, value in last.items()).replace("-", "−")
    return Picture(title, how, f"At the last step ({unit}): {ends}.", plots.curves(lines, unit=unit))


def _by_horizon(logs: Sequence[Sequence[Mapping[str, Any]]], kind: str) -> dict[str, list[plots.Points]]:
    names = [_HORIZON.fullmatch(key) for log in logs for entry in log for key in entry]
    horizons = sorted({int(name[1]) for name in names if name and name[2] == kind})
    return {
        f"h = {h}": [
            [(entry["step"], entry[f"h{h}_{kind}"]) for entry in log if f"h{h}_{kind}" in entry] for log in logs
        ]
        for h in horizons
    }


def _minus(ours: Sequence[plots.Points], theirs: Sequence[plots.Points]) -> list[plots.Points]:
    pairs = [(one, dict(other)) for one, other in zip(ours, theirs, strict=True)]
    return [[(step, value - other[step]) for step, value in one if step in other] for one, other in pairs]


def _concepts(run: Comparison) -> Section:
    section = Section("Concepts")
    if run.concepts:
        name = "functional group" if run.concepts.kind == "smiles" else "name"
        for group, title in (("by_tokens", "by number of tokens"), ("by_name", f"by {name}")):
            arms = {arm: getattr(found, group) for arm, found in run.concepts.arms.items() if getattr(found, group)}
            if arms:
                for measure in ("probability", "exact"):
                    section.pictures.append(_concept_bars(run.concepts.arms, arms, measure, title))
                section.tables.append(_concept_table(arms, title))
    groups = _group_names(run)
    by_group: dict[str, dict[str, Measure]] = {}
    for found in run.by_measure:
        if found.name in groups:
            by_group.setdefault(f"{found.task}: {groups[found.name][0]}", {})[groups[found.name][1]] = found
    section.pictures += [_measure_bars(title, found) for title, found in by_group.items()]
    if by_group:
        every = [measure for found in by_group.values() for measure in found.values()]
        section.tables.append(_measure_table(run, "Functional groups in the answers", every, is_folded=True))
    return section


def _group_names(run: Comparison) -> dict[str, tuple[str, str]]:
    """Measures that belong together, as (group, measure): precision, recall and F1 of one thing, and RDKit's fragments."""
    names = {row.measure for row in run.measures}
    found = {name: (match[1], match[2]) for name in names if (match := _GROUP.fullmatch(name))}
    whole = {group for group, kind in found.values() if kind == "recall"}
    fragments = {name: ("fragments", name) for name in names if name.startswith("fragments_")}
    return {name: pair for name, pair in found.items() if pair[0] in whole} | fragments


def _measure_bars(title: str, measures: Mapping[str, Measure]) -> Picture:
    how = "Micro: over all decisions. Macro: the mean over the kinds of fragments."
    if "recall" in measures:
        how = "Precision: share of the answers' groups that the reference has. Recall: share of its groups in the answers."
    has_intervals = any(row.half for measure in measures.values() for row in measure.arms.values())
    how += " The lines on bars are 95% intervals." * has_intervals
    arms = dict.fromkeys(arm for measure in measures.values() for arm in measure.arms)
    how += f" {_BARS}" * (len(arms) > 1)
    values = {arm: {name: plots.Bar(*m.scaled(arm)) for name, m in measures.items() if arm in m.arms} for arm in arms}
    words = "; ".join(f"{arm}: " + ", ".join(f"{name} {m.mean(arm)}" for name, m in measures.items()) for arm in arms)
    return Picture(title, how, f"{words} (%).", plots.bars(values, unit="%"))


def _concept_bars(
    whole: Mapping[str, ArmConcepts], arms: Mapping[str, Mapping[str, ConceptGroup]], measure: str, title: str
) -> Picture:
    values: dict[str, dict[str, plots.Bar]] = {}
    is_by_name = title != "by number of tokens"
    for arm, groups in arms.items():
        bars = {f"{name} ({part.count:,})": getattr(part, measure) for name, part in _ordered(groups)}
        every = bars if is_by_name else {"all": getattr(whole[arm], measure), **bars}
        values[arm] = {
            name: plots.Bar(100 * fmean(seeds), None, [100 * value for value in seeds]) for name, seeds in every.items()
        }
    how = f"{_CONCEPT_WORDS[measure]} In brackets: the number of concepts. Each dot is a seed. {_BARS}"
    words = "; ".join(
        f"{arm}: " + ", ".join(f"{name} {number(bar.mean, 1)}" for name, bar in found.items())
        for arm, found in values.items()
    )
    svg = plots.bars(values, unit="%", is_horizontal=is_by_name or len(next(iter(values.values()))) > 9)
    return Picture(f"{measure.capitalize()} {title}", how, f"In percent, {words}.", svg)


def _ordered(parts: Mapping[str, ConceptGroup]) -> list[tuple[str, ConceptGroup]]:
    return sorted(parts.items(), key=lambda item: (int(item[0]) if item[0].isdecimal() else 0, -item[1].count))


def _concept_table(arms: Mapping[str, Mapping[str, ConceptGroup]], title: str) -> Table:
    columns = [(arm, measure) for measure in ("probability", "exact") for arm in arms]
    rows = [
        [
            Cell(name),
            Cell(f"{part.count:,}"),
            *(Cell(number(100 * fmean(getattr(arms[arm][name], measure)), 1)) for arm, measure in columns),
        ]
        for name, part in _ordered(next(iter(arms.values())))
    ]
    head = [title.removeprefix("by "), "count", *(f"{measure}, {arm}, %" for arm, measure in columns)]
    return Table(f"Concepts {title}", "Means over the seeds.", head, rows, is_folded=True)


def _examples(run: Comparison) -> Section:
    section = Section("Examples")
    for item in run.examples:
        scores = {
            answer.score for other in run.examples if other.task == item.task for answer in other.answers.values()
        }
        answers = [Answer("reference", marked(item.reference))]
        for arm, answer in item.answers.items():
            if scores <= {0, 1}:
                answers.append(Answer(arm, marked(answer), mark="right" if answer.score == 1 else "wrong"))
            else:
                answers.append(Answer(arm, marked(answer), score=f"score {answer.score:.3g}".replace("-", "−")))
        said = ", ".join(f"{answer.name} {answer.mark or answer.score}" for answer in answers[1:])
        section.examples.append(Example(f"{item.task} {item.id}: {said}", item.prompt, answers))
    if section.examples:
        has_concepts = any(part.depth for item in section.examples for answer in item.answers for part in answer.parts)
        section.text.append("Answers of the first seed." + " Concepts are coloured and underlined." * has_concepts)
    return section


def _heads(run: Comparison) -> Section:
    quality = run.quality
    if not quality:
        return Section("Heads")
    horizons = list(quality["targets"])
    heads, untrained = (quality[kind]["accepted_length"] for kind in ("heads", "untrained"))
    said = (
        "Good heads score between untrained copies and the model itself, which sees h − 1 more tokens. Guesses in a row that "
        f"the model would accept, of {len(horizons)}: heads {heads:.2f}, untrained copies {untrained:.2f}."
    )
    what = "The numbers are in the table below."
    drawn = plots.quality_pictures(quality).items()
    pictures = [Picture(title, "By horizon: how many tokens ahead.", what, svg) for title, svg in drawn]
    how = (
        "Loss; how often the first guess (top-1) or one of the first five (top-5) is correct; how often the first guess is the "
        "model's own greedy token (agreement)."
    )
    rows = [[Cell(name), *map(Cell, values)] for name, values in quality_rows(quality)]
    table = Table("Quality by horizon", how, ["", *(f"h = {h}" for h in horizons)], rows, is_folded=True)
    return Section("Heads", text=[said], pictures=pictures, tables=[table])


def _provenance(run: Comparison) -> Section:
    section = Section("Provenance")
    rows = []
    for key, value in run.provenance.items():
        if isinstance(value, Mapping) and key in ("data", "heads"):
            rows += [[Cell(f"{key}: {name}"), Cell(_in_words(part))] for name, part in value.items()]
        else:
            rows.append([Cell(key), Cell(_in_words(value))])
    if rows:
        how = "Data and heads are identified by the SHA-256 of their contents."
        section.tables.append(Table("How to repeat it", how, ["", ""], rows))
    if run.recipe:
        section.code = yaml.safe_dump(_without_addresses(run.recipe), sort_keys=False, allow_unicode=True)
    return section


def _in_words(value: Any) -> str:
    """`key value, key value`, without unknown values and the addresses of servers (as in _without_addresses)."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_in_words(part)}" for key, part in value.items() if part is not None)
    if isinstance(value, str):
        return " ".join(word for word in value.split(" ") if ".server." not in word)
    return json.dumps(value, ensure_ascii=False)


def _without_addresses(recipe: Any) -> Any:
    """The recipe without addresses of servers, which may hold keys; a report is shared with others."""
    if not isinstance(recipe, Mapping):
        return recipe
    return {key: "left out" if key == "url" else _without_addresses(value) for key, value in recipe.items()}
