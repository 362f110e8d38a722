"""What may be concluded of a comparison, in sentences: the verdict, and the remarks below it."""

from statistics import median

from caftune.compare.summary import BASELINE, TREATMENT, Comparison, Difference, Known, LeftOut, Measure
from caftune.evals.statistics import LEVEL

_NAMES = {"caft": "CAFT", "caft_frozen": "CAFT with frozen heads"}
_SAME_START = 1e-3  # relative: arms compute the first step's loss by different kernels


def verdict(found: Comparison) -> str:
    """Whether CAFT helped, by the deciding measure, in one sentence with its interval."""
    arm, name = found.treatment, _name(found.treatment)
    measure = found.deciding
    lost = [row.run for row in _left_out(found, measure) if row.arm in (arm, BASELINE)]
    if lost:
        runs = ", ".join(lost)
        return f"This comparison cannot tell whether {name} helped: {measure.label} is not a finite number in {runs}."
    if not found.measures:
        return f"There is no result yet: no seed has finished in all arms (missing runs: {len(found.missing)})."
    if len(found.seeds) < 2:
        return (
            f"One seed cannot tell {name} from chance: {measure.label} is {measure.value(arm)} with it and "
            f"{measure.value(BASELINE)} without. Run more seeds."
        )
    pair = next(row for row in measure.differences if (row.arm, row.baseline) == (arm, BASELINE))
    compared = f"{measure.label} {measure.difference_in_words(pair)} compared with next-token fine-tuning"
    if not pair.is_apart:
        return f"This comparison cannot tell whether {name} helped: {compared}; {_power(measure, pair)}."
    return f"{name} {'helped' if (pair.difference > 0) != measure.is_lower_better else 'did harm'}: {compared}."


def _name(arm: str) -> str:
    return _NAMES.get(arm, arm)


def _power(measure: Measure, row: Difference) -> str:
    if row.minimum_detectable is None:
        return "the runs are too few or too similar to estimate the smallest detectable difference"
    least = f"{measure.size(row, row.minimum_detectable)} {measure.unit}".rstrip()
    return f"a true difference of {least} would be detected four times out of five"


def remarks(found: Comparison) -> list[str]:
    """What to know next to the verdict: controls, other measures, fairness, costs, missing runs."""
    said = [f"Missing runs: {', '.join(found.missing)}."] if found.missing else []
    if found.unused_seeds:
        seeds = ", ".join(map(str, found.unused_seeds))
        said.append(f"Runs with seed {seeds} exist but are not used: compare.seeds is {len(found.seeds)}.")
    said += [
        f"{row.run}: {found.measure(row.task, row.measure).label} is {row.value}, so {row.arm} has no mean and no test in it."
        for row in found.left_out
    ]
    if not found.measures:
        return said
    return [*_against_controls(found), *_other_measures(found), *_fairness(found), *_price(found), *said]


def _against_controls(found: Comparison) -> list[str]:
    """CAFT against the other arms: a gain that it shares with control heads is not due to pretraining."""
    measure = found.deciding
    return [
        f"CAFT compared with {_name(row.baseline)}: {measure.label} {measure.difference_in_words(row)}; "
        f"the difference is {'' if row.is_apart else 'not '}significant."
        for row in measure.differences
        if row.arm == TREATMENT and row.baseline != BASELINE
    ]


def _other_measures(found: Comparison) -> list[str]:
    deciding = (found.deciding.task, found.deciding.name)
    others = [
        (measure, row)
        for measure in found.by_measure
        for row in measure.differences
        if (row.arm, row.baseline) == (found.treatment, BASELINE) and (measure.task, measure.name) != deciding
    ]
    if not others:
        return []
    apart = [f"{measure.label} {measure.difference_in_words(row)}" for measure, row in others if row.p_holm <= LEVEL]
    if not apart:
        return [f"None of the {len(others)} other measures differs after Holm's correction."]
    return [f"Of {len(others)} other measures, these differ after Holm's correction: {'; '.join(apart)}."]


def _fairness(found: Comparison) -> list[str]:
    said, checks = [], found.checks
    if checks.start is not None and checks.start > _SAME_START:
        said.append(
            f"The arms did not start from the same state: their losses at the first step differ by up to "
            f"{100 * checks.start:.1f}%. Do not rely on this comparison."
        )
    elif checks.start is not None:
        said.append(
            "All arms started from the same state: their losses at the first step agree to a relative difference of "
            f"{max(checks.start, 1e-9):.0e}."
        )
    if checks.beta0 == 0:
        said.append(f"With beta = 0, all {checks.answers} answers equal those of next-token fine-tuning, as they must.")
    elif checks.beta0:
        said.append(
            f"With beta = 0, {checks.beta0} of {checks.answers} answers differ from those of next-token fine-tuning: training "
            "is not reproducible on this machine, and differences of this size mean nothing."
        )
    return said


def _price(found: Comparison) -> list[str]:
    if found.checks.devices > 1:
        return [f"Runs used different devices ({found.device}), so their times cannot be compared."]
    if BASELINE not in found.costs:
        return []
    kinds = {"seconds": "time", "flops": "FLOPs"}
    if found.device != "cpu":  # there it is the memory of the whole process, mostly libraries
        kinds["peak_memory_bytes"] = "peak memory"
    said = []
    for arm in dict.fromkeys([found.treatment, *(arm for arm in _NAMES if arm in found.costs)]):
        times = [
            f"{ratio:.2f} times the {words}" for name, words in kinds.items() if (ratio := _ratio(found, arm, name))
        ]
        said += [f"A training step of {_name(arm)} took {', '.join(times)} of next-token fine-tuning."] if times else []
    return said


def _ratio(found: Comparison, arm: str, name: str) -> float | None:
    """A cost of an arm over the baseline's, by medians of the runs; None where one is not known.

    Per token where it grows with them: arms may stop early, after different numbers of steps.
    """
    costs = [found.costs[each] for each in (arm, BASELINE) if each in found.costs]
    per_token = name != "peak_memory_bytes" and all(any(cost.tokens) for cost in costs)
    values: list[Known] = [cost.per_token(name) if per_token else getattr(cost, name) for cost in costs]
    known = [[value for value in of_arm if value is not None] for of_arm in values]
    return median(known[0]) / median(known[1]) if len(known) == 2 and all(known) else None


def _left_out(found: Comparison, measure: Measure) -> list[LeftOut]:
    return [row for row in found.left_out if (row.task, row.measure) == (measure.task, measure.name)]
