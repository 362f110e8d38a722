"""What the trainings of a report cost: as they were measured, and beside it what `caftune plan` says of them."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from caftune.compare.verdict import BASELINE
from caftune.report.parts import Cell, Run, Section, Table, number, scaled

_Costs = Mapping[str, Sequence[float | None]]


def costs(run: Run) -> Section:
    """The section of costs."""
    return Section("Costs", tables=[*_measured(run), *_beside_the_plan(run)])


def _measured(run: Run) -> list[Table]:
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "tokens": ("tokens", scaled),
        "flops": ("FLOPs", scaled),
        "seconds": ("seconds", lambda value: number(value, 1)),
        "peak_memory_bytes": ("peak memory, GiB", lambda value: number(value / 2**30, 2)),
    }
    rows = []
    for arm, costs in run["costs"].items():
        cells = [
            _cost(costs.get(name, []), run["costs"].get(BASELINE, {}).get(name, []) if arm != BASELINE else [], shown)
            for name, (_, shown) in columns.items()
        ]
        rows.append([Cell(arm), *cells])
    many = any(len(values) > 1 for costs in run["costs"].values() for values in costs.values())
    how = f"Of one training{', median of the seeds' * many}{f'; × is the ratio to {BASELINE}' * (len(rows) > 1)}."
    head = ["arm", *(heading for heading, _ in columns.values())]
    return [Table(f"Training on {run['device']}", how, head, rows)] if rows else []


def _cost(values: Sequence[float | None], baseline: Sequence[float | None], shown: Callable[[float], str]) -> Cell:
    known, theirs = ([value for value in found if value is not None] for found in (values, baseline))
    if not known:
        return Cell("not measured")
    ratio = f" (×{median(known) / median(theirs):.2f})" if theirs and median(theirs) > 0 else ""
    some = f", {len(known)} of {len(values)} runs" if len(known) < len(values) else ""
    return Cell(f"{shown(median(known))}{ratio}{some}")


def _beside_the_plan(run: Run) -> list[Table]:
    """Nothing of runs that recorded no plan."""
    plans = {arm: plan for arm, plan in run.get("plans", {}).items() if plan}
    if not plans:
        return []
    baseline = run["costs"].get(BASELINE)
    head = ["arm", "FLOPs per token: plan", "FLOPs per token: measured", f"FLOPs over {BASELINE}: plan"]
    head += [f"FLOPs over {BASELINE}: measured", f"time over {BASELINE}: measured"] * (baseline is not None)
    head += ["peak memory, MiB: plan", "peak memory, MiB: measured"]
    rows = [[Cell(arm), *_pairs(plan, run["costs"][arm], baseline)] for arm, plan in plans.items()]
    libraries = ", here of a process, whose libraries take some while they train" * (run["device"] == "cpu")
    how = (
        "Plan: what `caftune plan` says of these runs on their device, written down when they ended. FLOPs per token: planned "
        "over all rows, measured in the first step, where attention counts in full under a written-out mask (of padded rows), "
        "as it is then computed; padding is computed, too, and is no token. "
        f"What is over {BASELINE} is per token. Peak memory, measured: less what was held "
        f"before the model was loaded{libraries}."
    )
    return [Table("Plan and measurement", how, head, rows)]


def _pairs(plan: _Costs, ours: _Costs, theirs: _Costs | None) -> list[Cell]:
    """What was planned of an arm, and what was measured; `theirs` None: without a baseline."""
    per_token = {name: _combined(ours, name, "tokens", _divided) for name in ("flops", "seconds")}
    ratios = []
    if theirs is not None:
        ratios = [_over(values, _combined(theirs, name, "tokens", _divided)) for name, values in per_token.items()]
    grown = _combined(ours, "peak_memory_bytes", "memory_before_bytes", lambda peak, before: peak - before)
    return [
        *(_cost(values, [], scaled) for values in (plan["flops_per_token"], per_token["flops"])),
        *(_cost(plan["overhead"], [], _times), *ratios),
        *(_cost(values, [], _mib) for values in (plan["peak_memory_bytes"], grown)),
    ]


def _combined(arm: _Costs, one: str, other: str, how: Callable[[float, float], float | None]) -> list[float | None]:
    """Of each run one number made of two costs, None where either was not measured."""
    pairs = zip(arm.get(one, []), arm.get(other, []), strict=False)  # a run of an older version has no second
    return [None if a is None or b is None else how(a, b) for a, b in pairs]


def _divided(value: float, tokens: float) -> float | None:
    return value / tokens if tokens else None


def _over(values: Sequence[float | None], baseline: Sequence[float | None]) -> Cell:
    known, theirs = ([value for value in found if value is not None] for found in (values, baseline))
    return Cell(_times(median(known) / median(theirs)) if known and theirs else "not measured")


def _times(value: float) -> str:
    return f"×{number(value, 2)}"


def _mib(value: float) -> str:
    return number(value / 2**20, 0)
