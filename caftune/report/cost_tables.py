"""What a report says of costs: the trainings as they were measured, and next to it what `caftune plan` says of them."""

from collections.abc import Callable, Sequence
from statistics import median

from caftune.compare.summary import BASELINE, Comparison, Costs, Known, number
from caftune.report.parts import Cell, Section, Table, scaled

_NOT_MEASURED = Cell("not measured")


def costs(run: Comparison) -> Section:
    """The section of costs."""
    return Section("Costs", tables=[*_measured(run), *_planned(run)])


def _measured(run: Comparison) -> list[Table]:
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "tokens": ("tokens", scaled),
        "flops": ("FLOPs", scaled),
        "seconds": ("seconds", lambda value: number(value, 1)),
        "peak_memory_bytes": ("peak memory, GiB", lambda value: number(value / 2**30, 2)),
    }
    rows = []
    for arm, found in run.costs.items():
        baseline = run.costs.get(BASELINE, Costs()) if arm != BASELINE else Costs()
        cells = [_cell(getattr(found, name), shown, getattr(baseline, name)) for name, (_, shown) in columns.items()]
        rows.append([Cell(arm), *cells])
    is_median = any(len(getattr(found, name)) > 1 for found in run.costs.values() for name in columns)
    how = f"Per training{', median of the seeds' * is_median}{f'; × is the ratio to {BASELINE}' * (len(rows) > 1)}."
    head = ["arm", *(heading for heading, _ in columns.values())]
    return [Table(f"Training on {run.device}", how, head, rows)] if rows else []


def _planned(run: Comparison) -> list[Table]:
    """Plan and measurement; nothing for runs that recorded no plan."""
    plans = {arm: plan for arm, plan in run.plans.items() if plan}
    if not plans:
        return []
    baseline = run.costs.get(BASELINE)
    head = ["arm", "FLOPs per token: plan", "FLOPs per token: measured", f"FLOPs over {BASELINE}: plan"]
    head += [f"FLOPs over {BASELINE}: measured", f"time over {BASELINE}: measured"] * (baseline is not None)
    head += ["peak memory, MiB: plan", "peak memory, MiB: measured"]
    rows = []
    for arm, plan in plans.items():
        found = run.costs[arm]
        per_token = [found.per_token("flops"), found.per_token("seconds")]
        cells = [_cell(plan["flops_per_token"], scaled), _cell(per_token[0], scaled), _cell(plan["overhead"], _times)]
        if baseline is not None:
            theirs = [baseline.per_token("flops"), baseline.per_token("seconds")]
            cells += [_ratio(*pair) for pair in zip(per_token, theirs, strict=True)]
        cells += [_cell(plan["peak_memory_bytes"], _mib), _cell(_grown_memory(found), _mib)]
        rows.append([Cell(arm), *cells])
    process = " On a CPU it is that of the process, including libraries that are loaded during training."
    how = (
        "Plan: what `caftune plan` says of these runs on their device, recorded when they ended. FLOPs per token are planned "
        "over all rows and measured in the first step. The measured ones include attention in full where padded rows need an "
        "explicit mask, and padding, which is computed but does not count as tokens. "
        f"Ratios to {BASELINE} are per token. Measured peak memory excludes what was allocated before the model was loaded."
        + process
        * (run.device == "cpu")
    )
    return [Table("Plan and measurement", how, head, rows)]


def _grown_memory(costs: Costs) -> Known:
    pairs = zip(costs.peak_memory_bytes, costs.memory_before_bytes, strict=False)  # older runs lack the second
    return [None if peak is None or before is None else peak - before for peak, before in pairs]


def _cell(values: Known, shown: Callable[[float], str], baseline: Sequence[float | None] = ()) -> Cell:
    """The median of the seeds, with its ratio to the baseline's, and how many seeds have a value if not all do."""
    known, theirs = _known(values), _known(baseline)
    if not known:
        return _NOT_MEASURED
    ratio = f" (×{median(known) / median(theirs):.2f})" if theirs and median(theirs) > 0 else ""
    some = f", {len(known)} of {len(values)} runs" if len(known) < len(values) else ""
    return Cell(f"{shown(median(known))}{ratio}{some}")


def _ratio(values: Known, baseline: Known) -> Cell:
    known, theirs = _known(values), _known(baseline)
    return Cell(_times(median(known) / median(theirs))) if known and theirs else _NOT_MEASURED


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _times(value: float) -> str:
    return f"×{number(value, 2)}"


def _mib(value: float) -> str:
    return number(value / 2**20, 0)
