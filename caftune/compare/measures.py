"""From the runs of a comparison to its numbers: measures of the arms over seeds, and their differences.

Only seeds that every arm has finished count, so that all arms have the same ones. The first task's primary measure decides;
it is named before the runs are made, so its p-value stands uncorrected. All other measures of a pair of arms are one family
for Holm's correction.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from caftune.checkpoints.cards import read_quality
from caftune.checkpoints.heads_folder import QUALITY_FILE
from caftune.checkpoints.provenance import provenance
from caftune.compare.concept_study import summarise_concepts
from caftune.compare.examples import ConceptMarker, compared_examples
from caftune.compare.runs import ComparedRun, evaluated_task, ids_of, run_is_done
from caftune.compare.summary import (
    BASE,
    BASELINE,
    CONCEPTS,
    HELD_OUT,
    TREATMENT,
    Checks,
    Comparison,
    Costs,
    Difference,
    EvaluatedTask,
    LeftOut,
    Measured,
    StudiedConcepts,
    main_loss,
)
from caftune.compare.verdict import remarks, verdict
from caftune.errors import CaftuneError
from caftune.evals.concepts import read_terms
from caftune.evals.statistics import compare as compare_scores
from caftune.evals.statistics import compare_runs, holm
from caftune.evals.tasks import TASKS
from caftune.files import write_json
from caftune.pipeline.base_model import BaseModel
from caftune.pipeline.folder import RunFolder
from caftune.pipeline.heads_choice import pretrained_heads
from caftune.pipeline.schema import Recipe

Scores = np.ndarray[Any, Any]  # [examples] of a run, [seeds, examples] of an arm
OneRun = dict[str, tuple[float, Scores | None]]  # by measure: the value, and the scores that it is the mean of
Runs = Mapping[str, Sequence[ComparedRun]]  # by arm; of the base one
Lines = list[dict[str, Any]]  # of a TASK.jsonl


@dataclass(frozen=True)
class Values:
    """One measure of one arm: a value for each seed, and what they are means of (None for a measure of a whole run)."""

    values: list[float]
    scores: Scores | None = None

    @property
    def is_finite(self) -> bool:
        """Whether its values have a mean: a run that diverged has no finite loss."""
        return all(map(math.isfinite, self.values))


Table = dict[tuple[str, str, str], Values]  # task, measure, arm


def summarise_comparison(recipe: Recipe) -> Comparison:
    """Compare the arms over the seeds that all of them have finished; written to compare/comparison.json."""
    folder, section = Path(recipe.output, "compare"), recipe.compare
    seeds = range(recipe.seed, recipe.seed + section.seeds)
    missing = [(arm, seed) for seed in seeds for arm in section.arms if not run_is_done(folder / arm / str(seed))]
    complete = [seed for seed in seeds if all(seed != late for _, late in missing)]
    runs: Runs = {arm: [ComparedRun.read(folder / arm / str(seed)) for seed in complete] for arm in section.arms}
    base = {BASE: [ComparedRun.read(folder / BASE, BASE)]} if run_is_done(folder / BASE) else {}
    made = (path.name for path in (folder / BASELINE).glob("*"))
    quality = None
    if recipe.heads.path is not None or Path(recipe.output, "heads").is_dir():
        heads = pretrained_heads(recipe.heads, RunFolder(recipe.output)).folder
        # `caftune heads measure` writes to the run folder where heads.path is given
        quality = read_quality(heads) or read_quality(heads, Path(recipe.output, QUALITY_FILE))
    terms = read_terms(section.concepts.terms) if section.concepts.terms is not None else []
    found = Comparison(
        title=Path(recipe.output).resolve().name,
        arms=list(section.arms),
        seeds=complete,
        verdict="",
        recipe=recipe.model_dump(),
        missing=[f"{arm}/{seed}" for arm, seed in missing],
        unused_seeds=sorted(int(name) for name in made if name.isdecimal() and int(name) not in seeds),
        costs={arm: _costs(of_arm) for arm, of_arm in runs.items()},
        plans={arm: _plans(of_arm) for arm, of_arm in runs.items()},
        device=", ".join(_devices(runs)),
        logs={arm: [run.log for run in of_arm] for arm, of_arm in runs.items()},
        quality=quality,
        provenance=provenance({"train": str(recipe.data.train), "eval": str(recipe.data.eval), **recipe.eval.data}),
    )
    if complete:
        tokenizer = BaseModel.of(recipe.model).tokenizer() if recipe.eval.tasks else None
        marker = ConceptMarker(tokenizer, section.concepts.kind, terms)
        tasks = [_task(name, {**base, **runs}) for name in recipe.eval.tasks]
        table = _measure(tasks, {**base, **runs}, marker, has_held_out=recipe.data.eval is not None)
        # Arms with a diverged run are left out.
        whole = {arm: [run.concepts for run in of_arm] for arm, of_arm in {**base, **runs}.items()}
        studied = {arm: summarise_concepts(concepts) for arm, concepts in whole.items() if all(concepts)}
        found = replace(
            found,
            tasks=tasks,
            measures=[Measured.of(*key, found.values) for key, found in table.items() if found.is_finite],
            left_out=_left_out(table, complete),
            differences=compare_arms(table, section.arms) if len(complete) > 1 else [],
            concepts=StudiedConcepts(section.concepts.kind, studied) if studied else None,
            examples=compared_examples(tasks[0], runs, marker) if tasks else [],
            checks=_checks(runs),
        )
    found = replace(found, verdict=verdict(found), remarks=remarks(found))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", found.to_json())
    return found


def _task(name: str, runs: Runs) -> EvaluatedTask:
    recorded = [
        run.evaluated[name].get("harness") for of_arm in runs.values() for run in of_arm if name in run.evaluated
    ]
    known = [about for about in recorded if about]
    different = [key for key in (known[0] if known else ()) if any(about.get(key) != known[0][key] for about in known)]
    if different:
        raise CaftuneError(
            f"All runs must be evaluated by the same {name}, got others in some ({', '.join(different)}): its rows, its "
            "files or the package changed in between. Undo that, or use another output."
        )
    return evaluated_task(name, len(ids_of(_any_answers(name, runs))), next(iter(known), None))


def _any_answers(name: str, runs: Runs) -> Lines:
    """The answers of the first run that has any (a diverged run has none); all runs answer the same examples."""
    return next((lines for of_arm in runs.values() for run in of_arm if (lines := run.answers.get(name))), [])


def _measure(tasks: Sequence[EvaluatedTask], runs: Runs, marker: ConceptMarker, *, has_held_out: bool) -> Table:
    """Every measure of every arm, the primary one of each task first."""
    table: Table = {}
    for task in tasks:
        lines = _any_answers(task.name, runs)
        ids, dense = ids_of(lines), _dense_examples(lines, marker)
        answers = {arm: [_of_answers(task, run, ids, dense) for run in found] for arm, found in runs.items()}
        table |= _table(task.name, task.primary, answers)
    if has_held_out:
        losses = {arm: [_of_training(run.trained) for run in found] for arm, found in runs.items()}
        table |= _table(HELD_OUT, "loss", losses)
    concepts = {arm: [_of_concepts(run.concepts) for run in found] for arm, found in runs.items()}
    if any(one for found in concepts.values() for one in found):
        table |= _table(CONCEPTS, "probability", concepts)
    return table


def _table(task: str, primary: str, found: Mapping[str, Sequence[OneRun]]) -> Table:
    """The measures that all runs of an arm have. A diverged run has none: NaN in every measure, and no scores by example."""
    table: Table = {}
    for arm, runs in found.items():
        whole = [run for run in runs if run]
        if arm == BASE and not whole:
            continue
        names = [name for name in whole[0] if all(name in run for run in whole)] if whole else [primary]
        for name in names:
            values = [run[name][0] if run else math.nan for run in runs]
            scores = [scored for run in whole if (scored := run[name][1]) is not None]
            table[task, name, arm] = Values(values, np.stack(scores) if len(scores) == len(runs) else None)
    return table


def _of_answers(task: EvaluatedTask, run: ComparedRun, ids: Sequence[str], dense: Mapping[str, bool]) -> OneRun:
    """The measures of one run; those that are means over examples with their scores, averaged over an evaluation's runs."""
    lines, primary = run.answers.get(task.name, []), task.primary
    if not lines:
        return {}
    if task.name in TASKS:
        whole = TASKS[task.name].combine([line["scores"] for line in lines])
    else:
        whole = {name: fmean(values) for name, values in run.evaluated[task.name]["measures"].items()}
    found: OneRun = {primary: (whole[primary], None)}  # first
    for measure, value in whole.items():
        scores = _scores(lines, ids, measure)
        is_mean = scores is not None and np.isclose(scores.mean(), value, rtol=0, atol=1e-9)
        found[measure] = (value, scores if is_mean else None)
    scores = found[primary][1]
    if scores is not None and dense:
        marks = np.array([dense[example] for example in ids])
        for label, part in (("concept-dense", scores[marks]), ("concept-light", scores[~marks])):
            found[f"{primary}, {label}"] = (float(part.mean()), part)
    return found


def _scores(lines: Lines, ids: Sequence[str], measure: str) -> Scores | None:
    """By example, None where some answer lacks the measure."""
    if not all(measure in line["scores"] for line in lines):
        return None
    by_id: dict[str, list[float]] = {example: [] for example in ids}
    for line in lines:
        by_id[line["id"]].append(line["scores"][measure])
    return np.array([math.fsum(values) / len(values) for values in by_id.values()])


def _dense_examples(lines: Lines, marker: ConceptMarker) -> dict[str, bool]:
    """Which examples' answers are denser in concepts than the median; empty where this splits nothing."""
    texts = {line["id"]: line["answer"] for line in lines if line.get("answer")}
    if not texts or len(texts) < len(ids_of(lines)):
        return {}
    densities = {name: marker.density(text) for name, text in texts.items()}
    middle = median(densities.values())
    dense = {name: value > middle for name, value in densities.items()}
    return dense if sum(dense.values()) >= 2 else {}


def _of_training(trained: Mapping[str, Any]) -> OneRun:
    """L_1 on data.eval, which is `loss` of an evaluation in every arm."""
    return {name: (value, None) for name, value in trained.get("metrics", {}).items() if name == "loss"}


def _of_concepts(concepts: Lines) -> OneRun:
    """Means over concepts. Concepts of one row depend on each other, so rows are resampled, not concepts.

    A row's score is its share in the mean over all concepts, times the number of rows: their mean is that mean.
    """
    found: OneRun = {}
    for measure in ("probability", "exact") if concepts else ():
        sums: dict[int, float] = {}
        for item in concepts:
            value = math.exp(item["log_prob"]) if measure == "probability" else float(item["exact"])
            sums[item["row"]] = sums.get(item["row"], 0.0) + value
        scores = np.array(list(sums.values())) * len(sums) / len(concepts)
        found[measure] = (float(scores.mean()), scores)
    return found


def _left_out(table: Table, seeds: Sequence[int]) -> list[LeftOut]:
    return [
        LeftOut(arm, arm if arm == BASE else f"{arm}/{seed}", task, measure, f"{value}")
        for (task, measure, arm), found in table.items()
        for seed, value in zip(seeds, found.values, strict=False)  # the base has one value
        if not math.isfinite(value)
    ]


def compare_arms(table: Table, arms: Sequence[str]) -> list[Difference]:
    """Every arm against the baseline in every measure; CAFT against every control in the deciding one."""
    measures = list(dict.fromkeys(key[:2] for key in table))
    table = {key: found for key, found in table.items() if found.is_finite}
    rows = []
    for arm in arms:
        if arm != BASELINE:
            rows += _family(table, arm, BASELINE, measures)
    if TREATMENT in arms:
        for control in arms:
            if control not in (BASELINE, TREATMENT, "beta0"):  # beta0 is the baseline again
                rows += _family(table, TREATMENT, control, measures[:1])
    return rows


def _family(table: Table, arm: str, baseline: str, measures: Sequence[tuple[str, str]]) -> list[Difference]:
    """One pair of arms in all measures, of which the first decides."""
    rows = [
        _difference(task, measure, arm, baseline, table[task, measure, arm], table[task, measure, baseline])
        for task, measure in measures
        if {(task, measure, arm), (task, measure, baseline)} <= table.keys()
    ]
    first = sum((row.task, row.measure) == measures[0] for row in rows)  # 0 where the deciding one is left out
    others = [row.p_value for row in rows[first:]]
    corrected = [row.p_value for row in rows[:first]] + (holm(others).tolist() if others else [])
    return [replace(row, p_holm=value) for row, value in zip(rows, corrected, strict=True)]


def _difference(task: str, measure: str, arm: str, baseline: str, ours: Values, theirs: Values) -> Difference:
    if ours.scores is not None and theirs.scores is not None and ours.scores.shape[1] > 1:
        found, over = compare_scores(ours.scores, theirs.scores, paired_seeds=True), "runs and examples"
    else:
        found, over = compare_runs(ours.values, theirs.values), "runs"
    # with two runs the spread is too uncertain to say what could be detected
    least = found.minimum_detectable if min(found.num_seeds) > 2 and found.minimum_detectable > 0 else None
    return Difference(
        task=task,
        measure=measure,
        arm=arm,
        baseline=baseline,
        difference=found.difference,
        low=found.low,
        high=found.high,
        p_value=found.p_value,
        effect_size=found.effect_size if math.isfinite(found.effect_size) else None,
        minimum_detectable=least,
        over=over,
        p_holm=found.p_value,
    )


def _devices(runs: Runs) -> list[str]:
    return sorted({run.trained["costs"]["device"] for of_arm in runs.values() for run in of_arm})


def _costs(runs: Sequence[ComparedRun]) -> Costs:
    names = ("tokens", "flops", "seconds", "peak_memory_bytes", "memory_before_bytes")  # older runs lack the last one
    return Costs(**{name: [run.trained["costs"].get(name) for run in runs] for name in names})


def _plans(runs: Sequence[ComparedRun]) -> dict[str, list[float | None]]:
    """What `caftune plan` says of an arm's runs; empty where it could not, or the runs are older than plans."""
    made = [run.trained["plan"] for run in runs if run.trained.get("plan")]
    return {name: [plan[name] for plan in made] for name in made[0]} if made else {}


def _checks(runs: Runs) -> Checks:
    starts = [[_first_loss(run.log) for run in of_arm] for of_arm in runs.values()]
    baseline = [_first_loss(run.log) for run in runs[BASELINE]]
    # 0 is what Trainer logs where the first loss is not a number
    known = all(value is not None and 0 < value < math.inf for of_arm in starts for value in of_arm)
    apart = [abs(a / b - 1) for of_arm in starts for a, b in zip(of_arm, baseline, strict=True)] if known else []  # type: ignore[operator]
    pairs = (
        [
            (ours["completion"], theirs["completion"])
            for one, other in zip(runs["beta0"], runs[BASELINE], strict=True)
            for task in one.answers.keys() & other.answers.keys()  # a run that diverged has none
            for ours, theirs in zip(one.answers[task], other.answers[task], strict=True)
        ]
        if "beta0" in runs
        else []
    )
    return Checks(
        start=max(apart, default=None),
        devices=len(_devices(runs)),
        beta0=sum(a != b for a, b in pairs) if pairs else None,
        answers=len(pairs) or None,
    )


def _first_loss(log: Sequence[Mapping[str, Any]]) -> float | None:
    """L_1 of the first optimizer step."""
    return next((main_loss(entry) for entry in log if "loss" in entry and entry.get("step") == 1), None)
