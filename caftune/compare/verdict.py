"""What may be concluded of a comparison, in sentences."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from caftune.evals.statistics import LEVEL

BASE, BASELINE, TREATMENT = "base", "ntp", "caft"
HELD_OUT, CONCEPTS = "held-out text", "concepts"  # measures that belong to no task
_UNITS = {(HELD_OUT, "loss"): "nats"}
_SAME_START = 1e-3  # relative: arms compute the first step's loss by different kernels


def main_loss(entry: Mapping[str, Any]) -> float | None:
    """L_1 of a line of a training's log, the same quantity in every arm; None where it has none."""
    # logs older than `main_loss` have h1_loss alone, a mean over other weights
    return entry.get("main_loss", entry.get("h1_loss", entry.get("loss")))


def verdict(found: Mapping[str, Any]) -> str:
    """Whether CAFT helped, by the measure that decides, in one sentence with its interval."""
    arm = TREATMENT if TREATMENT in found["arms"] else next(arm for arm in found["arms"] if arm != BASELINE)
    name = {"caft": "CAFT"}.get(arm, arm)
    task, measure = _deciding(found)
    where = _named(task, measure)
    lost = [row["run"] for row in _left_out(found, task, measure) if row["arm"] in (arm, BASELINE)]
    if lost:
        return f"This comparison cannot tell whether {name} helped: {where} is no finite number in {', '.join(lost)}."
    if not found["measures"]:
        return f"Nothing can be said yet: no seed has all its arms (missing: {len(found['missing'])})."
    if len(found["seeds"]) < 2:
        ours, theirs = (_values(found, task, measure, which)[0] for which in (arm, BASELINE))
        shown = [_value(found, task, measure, value) for value in (ours, theirs)]
        return f"One seed cannot tell {name} from luck: {where} is {shown[0]} with it and {shown[1]} without. Run more seeds."
    pair = _pair(found, task, measure, arm, BASELINE)
    if not _is_apart(pair):
        return (
            f"This comparison cannot tell whether {name} helped: {where} {_interval(found, pair)} against next-token "
            f"fine-tuning; {_power(found, task, measure, pair['minimum_detectable'])}."
        )
    helped = (pair["difference"] > 0) != _is_lower_better(found, task, measure)
    return (
        f"{name} {'helped' if helped else 'did harm'}: {where} {_interval(found, pair)} against next-token fine-tuning."
    )


def remarks(found: Mapping[str, Any]) -> list[str]:
    """What one should know beside the verdict: controls, other measures, whether the arms were alike, costs, missing runs."""
    said = [f"Missing runs: {', '.join(found['missing'])}."] if found["missing"] else []
    if found.get("unused_seeds"):
        seeds = ", ".join(map(str, found["unused_seeds"]))
        said.append(f"Runs with seed {seeds} are there and not in this: compare.seeds is {len(found['seeds'])}.")
    said += [
        f"{row['run']}: {_named(row['task'], row['measure'])} is {row['value']}, so {row['arm']} has no mean and no test in it."
        for row in _left_out(found)
    ]
    if not found["measures"]:
        return said
    return [*_against_controls(found), *_other_measures(found), *_fairness(found), *_price(found), *said]


def _power(found: Mapping[str, Any], task: str, measure: str, least: float | None) -> str:
    if least is None:
        return "with runs so few or so alike it is not known what could have been found"
    return (
        f"a true difference of {_difference(found, task, measure, least)} would have been found four times out of five"
    )


def _against_controls(found: Mapping[str, Any]) -> list[str]:
    """CAFT against arms that have no pretrained heads in the right places: a gain that these have too is not CAFT's."""
    task, measure = _deciding(found)
    said = []
    for row in found["comparisons"]:
        if row["arm"] != TREATMENT or row["baseline"] == BASELINE:
            continue
        tail = "the two can be told apart" if _is_apart(row) else "the two cannot be told apart"
        said.append(f"CAFT against {row['baseline']}: {_named(task, measure)} {_interval(found, row)}; {tail}.")
    return said


def _other_measures(found: Mapping[str, Any]) -> list[str]:
    deciding = _deciding(found)
    rows = [row for row in found["comparisons"] if row["arm"] == TREATMENT and row["baseline"] == BASELINE]
    others = [row for row in rows if (row["task"], row["measure"]) != deciding]
    apart = [
        f"{_named(row['task'], row['measure'])} {_interval(found, row)}" for row in others if row["p_holm"] <= LEVEL
    ]
    if not others:
        return []
    if not apart:
        return [f"None of the {len(others)} other measures differs after Holm's correction for their number."]
    return [
        f"Of {len(others)} other measures these differ after Holm's correction for their number: {'; '.join(apart)}."
    ]


def _fairness(found: Mapping[str, Any]) -> list[str]:
    said, checks = [], found["checks"]
    start = checks.get("start")
    if start is not None and start > _SAME_START:
        said.append(
            f"The arms did not begin alike: their first steps' losses differ by up to {100 * start:.1f}%. Do not rely on this."
        )
    elif start is not None:
        said.append(f"All arms began alike: their first steps' losses agree to {max(start, 1e-9):.0e} of their value.")
    if checks.get("beta0") == 0:
        said.append(
            f"With beta = 0 all {checks['answers']} answers are those of next-token fine-tuning, as they must be."
        )
    elif checks.get("beta0"):
        said.append(
            f"With beta = 0 {checks['beta0']} of {checks['answers']} answers are not those of next-token fine-tuning: training "
            "does not repeat itself on this machine, and differences of this size mean nothing."
        )
    return said


def _price(found: Mapping[str, Any]) -> list[str]:
    ours, theirs = (found["costs"].get(arm, {}) for arm in (TREATMENT, BASELINE))
    said = []
    if found["checks"].get("devices", 1) > 1:
        return [f"Runs were made on different devices ({found['device']}), so their times cannot be compared."]
    kinds = [("seconds", "time"), ("flops", "FLOPs")]
    if found["device"] != "cpu":  # there it is that of the whole process, mostly libraries
        kinds.append(("peak_memory_bytes", "peak memory"))
    for name, words in kinds:
        values = [[value for value in arm.get(name, []) if value is not None] for arm in (ours, theirs)]
        if all(values):
            said.append(f"{median(values[0]) / median(values[1]):.2f} times the {words}")
    return [f"A step of CAFT took {', '.join(said)} of next-token fine-tuning."] if said else []


def _named(task: str, measure: str) -> str:
    return measure if measure == task else f"{measure} on {task}"


def _deciding(found: Mapping[str, Any]) -> tuple[str, str]:
    """The first task's primary measure, or the held-out loss where there is no task."""
    first = found["tasks"][0] if found["tasks"] else {"name": HELD_OUT, "primary": "loss"}
    return first["name"], first["primary"]


def _left_out(found: Mapping[str, Any], *key: str) -> list[Mapping[str, Any]]:
    """Values that are no finite numbers: all, or those of one task and measure."""
    return [row for row in found.get("left_out", []) if not key or (row["task"], row["measure"]) == key]


def _pair(found: Mapping[str, Any], task: str, measure: str, arm: str, baseline: str) -> Mapping[str, Any]:
    wanted = {"task": task, "measure": measure, "arm": arm, "baseline": baseline}
    return next(row for row in found["comparisons"] if wanted.items() <= row.items())


def _values(found: Mapping[str, Any], task: str, measure: str, arm: str) -> Sequence[float]:
    wanted = {"task": task, "measure": measure, "arm": arm}
    return next(row["values"] for row in found["measures"] if wanted.items() <= row.items())


def _is_apart(row: Mapping[str, Any]) -> bool:
    """Both the interval and the test say so; where they disagree, p is very near the level."""
    return row["p_value"] <= LEVEL and not row["low"] <= 0 <= row["high"]


def _is_lower_better(found: Mapping[str, Any], task: str, measure: str) -> bool:
    lower = {(item["name"], name) for item in found["tasks"] for name in item["lower_is_better"]} | {(HELD_OUT, "loss")}
    return (task, measure) in lower


def _is_share(found: Mapping[str, Any], task: str, measure: str) -> bool:
    rows = [row for row in found["measures"] if (row["task"], row["measure"]) == (task, measure)]
    is_count = (task, measure) in _UNITS or _is_lower_better(found, task, measure)
    return not is_count and all(0 <= value <= 1 for row in rows for value in row["values"])


def _value(found: Mapping[str, Any], task: str, measure: str, value: float) -> str:
    if _is_share(found, task, measure):
        return f"{100 * value:.1f}%"
    return f"{value:.3g} {_UNITS.get((task, measure), '')}".strip()


def _difference(found: Mapping[str, Any], task: str, measure: str, value: float) -> str:
    if _is_share(found, task, measure):
        return f"{100 * value:.1f} points"
    return _value(found, task, measure, value)


def _interval(found: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """`+1.2 points (95% interval -0.3 to +2.7)`."""
    is_share = _is_share(found, row["task"], row["measure"])
    factor, unit = (100, " points") if is_share else (1, f" {_UNITS.get((row['task'], row['measure']), '')}".rstrip())
    shown = [
        f"{factor * row[name]:+.1f}" if is_share else f"{row[name]:+.3g}" for name in ("difference", "low", "high")
    ]
    return f"{shown[0]}{unit} (95% interval {shown[1]} to {shown[2]})"
