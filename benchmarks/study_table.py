"""The study's tables: differences from the baseline, paired by seed, with intervals and corrected p-values."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from caftune.evals.statistics import Comparison, compare_runs, holm


@dataclass(frozen=True)
class Line:
    """A finished run on the test split."""

    stage: str
    cell: str
    arm: str
    rate: float
    epochs: float
    seed: int
    loss: float
    flops: float
    seconds: float
    protocol: str
    score: float | None = None


Arms = dict[str, dict[int, Line]]  # by arm and seed


@dataclass(frozen=True)
class Difference:
    """An arm against a baseline; `result` is None where a run diverged or fewer than two seeds are shared."""

    arm: str
    against: str
    result: Comparison | None
    corrected: float  # p by Holm within the family; nan without a result
    num_diverged: int


def differences(arms: Arms, pairs: Sequence[tuple[str, str]], measure: str = "loss") -> list[Difference]:
    """The arms against their baselines in one measure; the pairs are the family that p is corrected for."""
    found = [_difference(arms[arm], arms[against], measure) for arm, against in pairs]
    tested = [result.p_value for result, _ in found if result is not None]
    adjusted = iter(holm(tested)) if tested else iter(())
    return [
        Difference(arm, against, result, math.nan if result is None else float(next(adjusted)), diverged)
        for (arm, against), (result, diverged) in zip(pairs, found, strict=True)
    ]


def _difference(arm: dict[int, Line], baseline: dict[int, Line], measure: str) -> tuple[Comparison | None, int]:
    seeds = sorted(set(arm) & set(baseline))
    values = [(getattr(arm[seed], measure), getattr(baseline[seed], measure)) for seed in seeds]
    known = [(one, other) for one, other in values if one is not None and other is not None]
    diverged = sum(not (math.isfinite(one) and math.isfinite(other)) for one, other in known)
    if diverged or len(known) < 2:
        return None, diverged
    return compare_runs([one for one, _ in known], [other for _, other in known]), 0


def tables(lines: Sequence[Line], roles: Mapping[str, str]) -> str:
    """Markdown: one table for each stage and cell.

    Args:
        roles: of the arms; those that are not named, `ntp=ARM`, are baselines of equal operations.
    """
    cells: dict[tuple[str, str], Arms] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        cells[line.stage, line.cell][line.arm][line.seed] = line
    return "\n\n".join(_table(*key, arms, roles) for key, arms in sorted(cells.items())) + "\n"


def _table(stage: str, cell: str, arms: Arms, roles: Mapping[str, str]) -> str:
    compared = [arm for arm in arms if roles.get(arm) in ("arm", "control") and "ntp" in arms]
    matched = [(arm, f"ntp={arm}") for arm in compared if f"ntp={arm}" in arms]
    against = {item.arm: item for item in differences(arms, [(arm, "ntp") for arm in compared])}
    equal = {item.arm: item for item in differences(arms, matched)}
    scored = {item.arm: item for item in differences(arms, [(arm, "ntp") for arm in compared], "score")}
    commits = sorted({line.protocol for runs in arms.values() for line in runs.values()})
    head = [
        "arm",
        "seeds",
        "rate",
        "epochs",
        "loss",
        "less ntp",
        "p",
        "less ntp, equal operations",
        "p",
        "score less ntp",
    ]
    head += ["p", "operations", "seconds"]
    rows = [f"## {stage}: {cell}", "", f"Protocol: {', '.join(commits)}.", "", f"| {' | '.join(head)} |"]
    rows.append(f"|{'---|' * len(head)}")
    plain = next(iter(arms.get("ntp", {}).values()), None)
    for arm in sorted(arms, key=lambda name: (name != "ntp", name)):
        runs = list(arms[arm].values())
        cost = f"{runs[0].flops / plain.flops:.2f}" if plain else ""
        cells = [
            arm,
            str(len(runs)),
            f"{runs[0].rate:g}",
            f"{runs[0].epochs:g}",
            f"{_mean([r.loss for r in runs]):.4f}",
        ]
        cells += [text for part in (against, equal, scored) for text in shown(part.get(arm))]
        rows.append(f"| {' | '.join([*cells, cost, f'{_mean([r.seconds for r in runs]):.0f}'])} |")
    stronger = [text for arm, _ in matched if (text := _strongest(arms, arm))]
    if stronger:
        rows += [
            "",
            "Less the best row of next-token fine-tuning with at most the arm's operations (picked by these losses): ",
        ]
        rows[-1] += "; ".join(stronger) + "."
    return "\n".join(rows)


def _strongest(arms: Arms, arm: str) -> str:
    """The arm against the best next-token row of those that cost no more; empty: the table has that difference."""
    cost = next(iter(arms[arm].values())).flops
    shorter = [name for name, runs in arms.items() if _is_baseline(name) and next(iter(runs.values())).flops <= cost]
    best = min(shorter, key=lambda name: _mean([line.loss for line in arms[name].values()]), default="ntp")
    if best in ("ntp", f"ntp={arm}"):
        return ""
    difference, _ = shown(differences(arms, [(arm, best)])[0])
    return f"`{arm}` {difference} (`{best}`)"


def _is_baseline(arm: str) -> bool:
    return arm.partition("=")[0] == "ntp"


def shown(item: Difference | None) -> tuple[str, str]:
    """A difference with its interval, and its corrected p."""
    if item is None or (item.result is None and not item.num_diverged):
        return "", ""
    if item.result is None:
        return f"{item.num_diverged} diverged", ""
    result = item.result
    return f"{result.difference:+.4f} [{result.low:+.4f}, {result.high:+.4f}]", f"{item.corrected:.2g}"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
