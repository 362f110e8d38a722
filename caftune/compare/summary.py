"""What a comparison found: measures of the arms over seeds, differences with intervals, and what may be concluded.

Only seeds that every arm has finished count, so that all arms have the same ones. The first task's primary measure decides;
it is named before the runs are made, so it stands uncorrected. All measures of a pair of arms are one family of Holm's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from caftune.checkpoints.heads_folder import QUALITY_FILE
from caftune.checkpoints.provenance import provenance
from caftune.compare.concept_study import summarise_concepts
from caftune.compare.examples import compared_examples, terms_of
from caftune.compare.runs import (
    ComparedRun,
    base_folder,
    base_is_done,
    ids_of,
    lines_of,
    run_folder,
    run_is_done,
    seeds_of,
)
from caftune.compare.verdict import BASE, BASELINE, CONCEPTS, HELD_OUT, TREATMENT, main_loss, remarks, verdict
from caftune.evals.concepts import density
from caftune.evals.statistics import Comparison, compare_runs, holm, interval
from caftune.evals.statistics import compare as compare_scores
from caftune.evals.tasks import TASKS
from caftune.files import read_json, write_json
from caftune.pipeline.base_model import BaseModel
from caftune.pipeline.folder import RunFolder
from caftune.pipeline.heads_choice import pretrained_heads
from caftune.pipeline.schema import Recipe

_FORMAT = 1

Scores = np.ndarray[Any, Any]  # [seeds, examples], or [seeds] where a measure is of a whole run


@dataclass(frozen=True)
class _Measured:
    """One measure of one arm: a value for each seed, and what it is the mean of."""

    values: list[float]
    scores: Scores | None = None  # [seeds, examples]

    @property
    def is_finite(self) -> bool:
        """Whether there are means of it: the loss of a run that diverged is no number."""
        return all(map(math.isfinite, self.values))


Table = dict[tuple[str, str, str], _Measured]  # task, measure, arm


def summarise_comparison(recipe: Recipe, *, partly: bool = True) -> dict[str, Any]:
    """Compare the arms over the seeds that all of them have finished; written to compare/comparison.json.

    Args:
        partly: write it also where runs are missing. Of processes that make a run each, only the last one should write.
    """
    arms: list[str] = list(recipe.compare.arms)
    seeds = seeds_of(recipe)
    missing = [(arm, seed) for seed in seeds for arm in arms if not run_is_done(recipe, arm, seed)]
    complete = [seed for seed in seeds if all(seed != late for _, late in missing)]
    runs = {arm: [ComparedRun.read(run_folder(recipe, arm, seed)) for seed in complete] for arm in arms}
    table = _measures(recipe, runs) if complete else {}
    found: dict[str, Any] = {
        "format": _FORMAT,
        "title": Path(recipe.output).resolve().name,
        "recipe": recipe.model_dump(),
        "arms": arms,
        "seeds": complete,
        "missing": [f"{arm}/{seed}" for arm, seed in missing],
        "unused_seeds": _unused_seeds(recipe, seeds),
        "tasks": [_task(name, runs) for name in recipe.eval.tasks] if complete else [],
        "measures": [_row(key, measured) for key, measured in table.items() if measured.is_finite],
        "left_out": _left_out(table, complete),
        "comparisons": _comparisons(table, arms) if len(complete) > 1 else [],
        "costs": {arm: _costs(found) for arm, found in runs.items()},
        "plans": {arm: _plans(found) for arm, found in runs.items()},
        "device": ", ".join(_devices(runs)),
        "logs": {arm: [run.log for run in found] for arm, found in runs.items()},
        "concepts": _concepts(recipe, runs) if complete else None,
        "examples": compared_examples(recipe, runs) if complete and recipe.eval.tasks else [],
        "checks": _checks(runs) if complete else {},
        "quality": _quality(recipe),
        "provenance": provenance({"train": str(recipe.data.train), "eval": str(recipe.data.eval), **recipe.eval.data}),
    }
    found["verdict"], found["remarks"] = verdict(found), remarks(found)
    Path(recipe.output, "compare").mkdir(parents=True, exist_ok=True)
    if partly or not missing:
        write_json(Path(recipe.output, "compare", "comparison.json"), found)
    return found


def _unused_seeds(recipe: Recipe, seeds: Sequence[int]) -> list[int]:
    """Seeds of runs that an earlier call made, and that this one's compare.seeds leaves out."""
    made = (folder.name for folder in Path(recipe.output, "compare", BASELINE).glob("*"))
    return sorted(int(name) for name in made if name.isdecimal() and int(name) not in seeds)


def _task(name: str, runs: Mapping[str, Sequence[ComparedRun]]) -> dict[str, Any]:
    task = TASKS[name]
    examples = len(ids_of(_answered([run.answers.get(name) for found in runs.values() for run in found])))
    return {
        "name": name,
        "primary": task.primary,
        "examples": examples,
        "lower_is_better": sorted(task.lower_is_better),
    }


def _answered(answers: Sequence[list[dict[str, Any]] | None]) -> list[dict[str, Any]]:
    """The answers of the first run that has any (a diverged run has none)."""
    return next((lines for lines in answers if lines), [])


def _measures(recipe: Recipe, runs: Mapping[str, Sequence[ComparedRun]]) -> Table:
    """Every measure of every arm, the primary one of each task first."""
    table: Table = {}
    for name in recipe.eval.tasks:
        base = lines_of(base_folder(recipe) / "eval" / BASE / f"{name}.jsonl") if base_is_done(recipe) else []
        by_arm: dict[str, list[list[dict[str, Any]] | None]] = {BASE: [base]} if base else {}
        by_arm |= {arm: [run.answers.get(name) for run in found] for arm, found in runs.items()}
        dense = _dense_examples(recipe, _answered([lines for found in by_arm.values() for lines in found]))
        for arm, answers in by_arm.items():
            table |= {(name, measure, arm): found for measure, found in _of_task(name, answers, dense).items()}
    losses = {arm: _main_losses(found) for arm, found in runs.items()}
    if recipe.data.eval is not None and all(value is not None for values in losses.values() for value in values):
        table |= {
            (HELD_OUT, "loss", arm): _Measured([v for v in values if v is not None]) for arm, values in losses.items()
        }
    studied = _studied(recipe, runs)
    for measure in ("probability", "exact"):
        for arm, every in studied.items():
            whole = [_by_row(concepts, measure) for concepts in every if concepts]
            values = [float(scores.mean()) for scores in whole]
            scores = np.stack(whole) if len(whole) == len(every) else None
            table[CONCEPTS, measure, arm] = _Measured(_in_place(values, every), scores)
    return table


def _studied(recipe: Recipe, runs: Mapping[str, Sequence[ComparedRun]]) -> dict[str, list[list[dict[str, Any]]]]:
    """The concepts of each arm's runs (none for a diverged run) and of the base; empty where none were studied."""
    every = [run for found in runs.values() for run in found]
    if not (any(run.concepts for run in every) and all(run.concepts or run.diverged for run in every)):
        return {}
    base = lines_of(base_folder(recipe) / "concepts.jsonl") if base_is_done(recipe) else []
    return ({BASE: [base]} if base else {}) | {arm: [run.concepts for run in found] for arm, found in runs.items()}


def _main_losses(runs: Sequence[ComparedRun]) -> list[float | None]:
    """L_1 on data.eval, which is what `loss` of an evaluation is in every arm of stage 2; NaN for a diverged run."""
    return [run.trained["metrics"].get("loss", math.nan if run.diverged else None) for run in runs]


def _in_place(values: Sequence[float], every: Sequence[Any]) -> list[float]:
    """One value per run: NaN where `every` has nothing (a diverged run), else the next of `values`."""
    left = iter(values)
    return [next(left) if found else math.nan for found in every]


def _of_task(
    name: str, answers: Sequence[list[dict[str, Any]] | None], dense: Mapping[str, bool]
) -> dict[str, _Measured]:
    """The measures of one arm; NaN for a diverged run, and then no scores by example."""
    whole = [lines for lines in answers if lines]
    if not whole:
        return {TASKS[name].primary: _Measured(_in_place([], answers))}
    found = _of_answers(name, whole, dense)
    if len(whole) == len(answers):
        return found
    return {measure: _Measured(_in_place(measured.values, answers)) for measure, measured in found.items()}


def _of_answers(name: str, answers: Sequence[list[dict[str, Any]]], dense: Mapping[str, bool]) -> dict[str, _Measured]:
    """The measures of one arm; those that are means over examples with their scores, averaged over an evaluation's runs."""
    task = TASKS[name]
    combined = [task.combine([line["scores"] for line in lines]) for lines in answers]
    measures = [task.primary, *(measure for measure in combined[0] if measure != task.primary)]
    found = {}
    for measure in measures:
        if not all(measure in values for values in combined):
            continue
        values = [values[measure] for values in combined]
        scores = _scores(answers, measure)
        is_mean = scores is not None and np.allclose(scores.mean(axis=1), values, rtol=0, atol=1e-9)
        found[measure] = _Measured(values, scores if is_mean else None)
    primary = found[task.primary].scores
    if primary is not None and dense:
        marks = np.array([dense[name] for name in ids_of(answers[0])])
        for label, part in (("concept-dense", marks), ("concept-light", ~marks)):
            found[f"{task.primary}, {label}"] = _Measured(primary[:, part].mean(axis=1).tolist(), primary[:, part])
    return found


def _scores(answers: Sequence[list[dict[str, Any]]], measure: str) -> Scores | None:
    """[seeds, examples], None where some answer lacks the measure."""
    rows = []
    for lines in answers:
        by_id: dict[str, list[float]] = {name: [] for name in ids_of(answers[0])}
        for line in lines:
            if measure not in line["scores"]:
                return None
            by_id[line["id"]].append(line["scores"][measure])
        rows.append([math.fsum(values) / len(values) for values in by_id.values()])
    return np.array(rows)


def _dense_examples(recipe: Recipe, lines: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Which examples' answers are denser in concepts than the median; empty where this divides nothing."""
    section = recipe.compare.concepts
    tokenizer = BaseModel.of(recipe.model).tokenizer()
    texts = {line["id"]: line["answer"] for line in lines if line.get("answer")}
    if not texts or len(texts) < len(ids_of(lines)):
        return {}
    densities = {name: density(text, section.kind, tokenizer, terms_of(recipe)) for name, text in texts.items()}
    middle = median(densities.values())
    dense = {name: value > middle for name, value in densities.items()}
    return dense if sum(dense.values()) >= 2 else {}


def _by_row(concepts: Sequence[Mapping[str, Any]], measure: str) -> Scores:
    """Each row's share in the mean over all concepts, times the number of rows: their mean is that mean.

    Concepts of one row depend on each other, so rows are what is drawn anew, not concepts.
    """
    sums: dict[int, float] = {}
    for item in concepts:
        value = math.exp(item["log_prob"]) if measure == "probability" else float(item["exact"])
        sums[item["row"]] = sums.get(item["row"], 0.0) + value
    return np.array(list(sums.values())) * len(sums) / len(concepts)


def _row(key: tuple[str, str, str], measured: _Measured) -> dict[str, Any]:
    mean, half = interval(measured.values) if len(measured.values) > 1 else (measured.values[0], None)
    return {"task": key[0], "measure": key[1], "arm": key[2], "values": measured.values, "mean": mean, "half": half}


def _left_out(table: Table, seeds: Sequence[int]) -> list[dict[str, str]]:
    """The values that are no finite numbers; their arms have no means and tests in that measure."""
    return [
        {
            "arm": arm,
            "run": arm if arm == BASE else f"{arm}/{seed}",
            "task": task,
            "measure": measure,
            "value": f"{value}",
        }
        for (task, measure, arm), measured in table.items()
        for seed, value in zip(seeds, measured.values, strict=False)  # the base has one value
        if not math.isfinite(value)
    ]


def _comparisons(table: Table, arms: Sequence[str]) -> list[dict[str, Any]]:
    """Every arm against the baseline in every measure; CAFT against every control in the one that decides.

    The deciding measure is named before and stands as it is; the others of a pair are one family of Holm's.
    """
    measures = list(dict.fromkeys(key[:2] for key in table))
    table = {key: measured for key, measured in table.items() if measured.is_finite}
    rows = []
    for arm in arms:
        if arm != BASELINE:
            rows += _family(table, arm, BASELINE, measures)
    # not beta0, which is the baseline once more
    controls = [arm for arm in arms if arm not in (BASELINE, TREATMENT, "beta0")] if TREATMENT in arms else []
    for control in controls:
        rows += _family(table, TREATMENT, control, measures[:1])
    return rows


def _family(table: Table, arm: str, baseline: str, measures: Sequence[tuple[str, ...]]) -> list[dict[str, Any]]:
    rows = []
    for task, measure in measures:
        ours, theirs = table.get((task, measure, arm)), table.get((task, measure, baseline))
        if ours is None or theirs is None:
            continue
        is_both = ours.scores is not None and theirs.scores is not None and ours.scores.shape[1] > 1
        if is_both:
            found = compare_scores(ours.scores, theirs.scores, paired_seeds=True)  # type: ignore[arg-type]
        else:
            found = compare_runs(ours.values, theirs.values)
        rows.append({"task": task, "measure": measure, "arm": arm, "baseline": baseline} | _plain(found, is_both))
    p_values = [row["p_value"] for row in rows]
    first = sum((row["task"], row["measure"]) == measures[0] for row in rows)  # 0 where what decides is left out
    values = [*p_values[:first], *(holm(p_values[first:]) if p_values[first:] else [])]
    return [{**row, "p_holm": float(value)} for row, value in zip(rows, values, strict=True)]


def _plain(found: Comparison, is_both: bool) -> dict[str, Any]:
    values = {name: value for name, value in asdict(found).items() if name in ("difference", "low", "high", "p_value")}
    effect = found.effect_size if math.isfinite(found.effect_size) else None
    # of two runs, a spread is too little known to say what they could have found
    least = found.minimum_detectable if min(found.num_seeds) > 2 and found.minimum_detectable > 0 else None
    known = {"effect_size": effect, "minimum_detectable": least}
    return {**values, **known, "over": "runs and examples" if is_both else "runs"}


def _devices(runs: Mapping[str, Sequence[ComparedRun]]) -> list[str]:
    return sorted({run.trained["costs"]["device"] for found in runs.values() for run in found})


def _costs(runs: Sequence[ComparedRun]) -> dict[str, list[Any]]:
    names = ("tokens", "flops", "seconds", "peak_memory_bytes")
    known = {name: [run.trained["costs"][name] for run in runs] for name in names}
    return {**known, "memory_before_bytes": [run.trained["costs"].get("memory_before_bytes") for run in runs]}


def _plans(runs: Sequence[ComparedRun]) -> dict[str, list[float]]:
    """What `caftune plan` says of an arm's runs; empty where it could not, or the runs are older than that."""
    made = [run.trained["plan"] for run in runs if run.trained.get("plan")]
    return {name: [plan[name] for plan in made] for name in made[0]} if made else {}


def _checks(runs: Mapping[str, Sequence[ComparedRun]]) -> dict[str, Any]:
    """What must hold if the comparison is fair.

    `start`: the largest relative difference, over arms and seeds, between an arm's L_1 at the first step and the baseline's:
    near 0 where both had the same weights and the same rows. `beta0`: how many answers of beta0 are not the baseline's.
    """
    starts = [[_first_loss(run.log) for run in found] for found in runs.values()]
    baseline = [_first_loss(run.log) for run in runs[BASELINE]]
    # 0 is what Trainer logs where the first loss was no number
    known = all(value is not None and 0 < value < math.inf for arm in starts for value in arm)
    apart = [abs(a / b - 1) for arm in starts for a, b in zip(arm, baseline, strict=True)] if known else []  # type: ignore[operator]
    checks: dict[str, Any] = {"start": max(apart, default=None), "devices": len(_devices(runs))}
    checks |= {"beta0": None, "answers": None}
    if "beta0" in runs:
        pairs = [
            (ours["completion"], theirs["completion"])
            for one, other in zip(runs["beta0"], runs[BASELINE], strict=True)
            for task in one.answers.keys() & other.answers.keys()  # a run that diverged has none
            for ours, theirs in zip(one.answers[task], other.answers[task], strict=True)
        ]
        if pairs:
            checks |= {"beta0": sum(a != b for a, b in pairs), "answers": len(pairs)}
    return checks


def _first_loss(log: Sequence[Mapping[str, Any]]) -> float | None:
    """L_1 of the first optimizer step."""
    return next((main_loss(entry) for entry in log if "loss" in entry and entry.get("step") == 1), None)


def _concepts(recipe: Recipe, runs: Mapping[str, Sequence[ComparedRun]]) -> dict[str, Any] | None:
    studied = _studied(recipe, runs)
    if not studied:
        return None
    # Arms with a diverged run are left out.
    whole = {arm: every for arm, every in studied.items() if all(every)}
    arms = {arm: _joined([summarise_concepts(concepts) for concepts in every]) for arm, every in whole.items()}
    if not arms:
        return None
    return {"kind": recipe.compare.concepts.kind, "arms": arms}


def _joined(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The summaries of an arm's seeds as one, with a list over the seeds in the place of each number."""
    names = ("probability", "exact")
    joined: dict[str, Any] = {name: [item[name] for item in summaries] for name in names}
    for group in ("by_tokens", "by_name"):
        joined[group] = {
            key: {"count": part["count"]} | {name: [item[group][key][name] for item in summaries] for name in names}
            for key, part in summaries[0][group].items()
        }
    return joined


def _quality(recipe: Recipe) -> Any:
    """The quality report of the very heads that were used, from their folder or (`caftune heads measure`) the run's."""
    if recipe.heads.path is None and not Path(recipe.output, "heads").is_dir():
        return None
    heads = pretrained_heads(recipe.heads, RunFolder(recipe.output))
    for file in (heads.folder / QUALITY_FILE, Path(recipe.output, QUALITY_FILE)):
        quality = read_json(file)
        if quality.get("weights_sha256") == heads.sha256:
            return quality
    return None
