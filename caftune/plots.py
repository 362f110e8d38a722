"""Pictures: the quality of heads, and the losses of the two arms of the demo. The only user of matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_COLOURS = {"next-token": "#6b7280", "CAFT": "#0f766e"}
_KINDS = {
    "heads": ("heads", "#0f766e", "o"),
    "untrained": ("untrained copies", "#b45309", "s"),
    "trunk": ("the model, one token before", "#6b7280", "^"),
}


def plot_quality(quality: Mapping[str, Any], path: Path) -> None:
    """A report of `measure_heads`, each measure by horizon: loss; top-1 and top-5; agreement and accepted length."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    losses, hits, agreement = figure.subplots(1, 3)
    horizons = [int(horizon) for horizon in quality["targets"]]
    for kind, (label, colour, marker) in _KINDS.items():
        style: dict[str, Any] = {"color": colour, "marker": marker, "linewidth": 2}
        losses.plot(horizons, list(quality[kind]["loss"].values()), label=label, **style)
        for measure, dash in (("top1", "-"), ("top5", ":")):
            values = [100 * value for value in quality[kind][measure].values()]
            hits.plot(horizons, values, linestyle=dash, **style)
        if "agreement" in quality[kind]:
            values = [100 * value for value in quality[kind]["agreement"].values()]
            length = quality[kind]["accepted_length"]
            agreement.plot(horizons, values, label=f"{label}: {length:.2f} of {len(horizons)} accepted", **style)
    losses.set(title="Loss", ylabel="nats per token", ylim=(0, None))
    hits.set(title="Right: first guess (line), first five (dots)", ylabel="% of targets", ylim=(0, 103))
    agreement.set(title="Guesses the model writes itself", ylabel="% of places", ylim=(0, 103))
    for axes in (losses, hits, agreement):
        axes.set_xlabel("horizon")
        axes.set_xticks(horizons)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    losses.legend(frameon=False)
    agreement.legend(frameon=False)
    figure.savefig(path, dpi=130)


def plot_losses(ntp: Sequence[dict[str, float]], caft: Sequence[dict[str, float]], path: Path) -> None:
    """Left: the next-token loss L_1 of both arms. Right: CAFT's loss at every horizon, and its weight over time."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*_series(ntp, "loss"), color=_COLOURS["next-token"], label="next-token", linewidth=3, alpha=0.5)
    left.plot(*_series(caft, "h1_loss"), color=_COLOURS["CAFT"], label="CAFT", linewidth=2, linestyle="--")
    left.set(title="Next-token loss on the task", xlabel="optimizer step", ylabel="nats per token")
    left.legend(frameon=False)
    horizons = sorted({int(key[1:-5]) for entry in caft for key in entry if key[0] == "h" and key.endswith("_loss")})
    for position, horizon in enumerate(horizons):
        shade = 0.25 + 0.75 * (1 - position / max(len(horizons) - 1, 1))
        right.plot(*_series(caft, f"h{horizon}_loss"), color=_COLOURS["CAFT"], alpha=shade, label=f"h = {horizon}")
    right.set(title="CAFT: loss by horizon, and the weight of h = 2", xlabel="optimizer step", ylabel="nats per token")
    right.legend(frameon=False, ncols=5, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    weight = right.twinx()
    weight.plot(*_series(caft, "h2_weight"), color="#b45309", linestyle=":", linewidth=1.5)
    weight.set_ylabel("β γ(t) α", color="#b45309")
    weight.set_ylim(bottom=0)
    for axes in (left, right):
        axes.spines[["top"]].set_visible(False)
        axes.grid(alpha=0.2)
    figure.savefig(path, dpi=130)


def _series(log: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    points = [(entry["step"], entry[name]) for entry in log if name in entry]
    return [step for step, _ in points], [value for _, value in points]
