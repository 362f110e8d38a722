"""How good heads are, as `quality.json` holds it: a table for the model card, and a picture."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KINDS = {  # name, colour, marker
    "heads": ("heads", "#0f766e", "o"),
    "untrained": ("untrained copies", "#b45309", "s"),
    "trunk": ("the model, one token before", "#6b7280", "^"),
}
_MEASURES = {"loss": "loss, nats", "top1": "top-1, %", "top5": "top-5, %", "agreement": "agreement, %"}


def quality_rows(quality: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """The measures of each kind of heads by horizon: `loss, nats: heads` and its values."""
    for measure, heading in _MEASURES.items():
        for kind, (name, _, _) in _KINDS.items():
            values = quality[kind].get(measure, {}).values()  # the model itself has no agreement
            if values:
                shown = [f"{value:.3f}" if measure == "loss" else f"{100 * value:.1f}" for value in values]
                yield f"{heading}: {name}", shown


def quality_table(quality: Mapping[str, Any]) -> list[str]:
    """A quality report as lines of Markdown."""
    horizons = list(quality["targets"])
    trained, untrained = (quality[kind]["accepted_length"] for kind in ("heads", "untrained"))
    return [
        f"| | {' | '.join(f'h = {h}' for h in horizons)} |",
        f"|---|{'---|' * len(horizons)}",
        *(f"| {name} | {' | '.join(values)} |" for name, values in quality_rows(quality)),
        "",
        f"Measured on {quality['targets'][horizons[0]]:,} targets at h = {horizons[0]} of held-out text. *Agreement*: how "
        f"often the head's first guess equals the model's own greedy token, over {quality['positions']} positions. As drafts, "
        f"{trained:.2f} of the {len(horizons)} guesses would be accepted on average (untrained copies: {untrained:.2f}).",
    ]


def plot_quality(quality: Mapping[str, Any], path: Path) -> None:
    """Write the three panels side by side as a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, title in zip(panels, PANELS, strict=True):
        draw_panel(axes, title, quality)
        axes.set(title=title)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    panels[0].legend(frameon=False)
    panels[2].legend(frameon=False)
    figure.savefig(path, dpi=130)


# by title: measures with their line styles, factor, and label of the axis
PANELS: dict[str, tuple[dict[str, str], int, str]] = {
    "Loss": ({"loss": "-"}, 1, "nats per token"),
    "Correct: first guess (line), first five (dots)": ({"top1": "-", "top5": ":"}, 100, "% of targets"),
    "Agreement with greedy decoding": ({"agreement": "-"}, 100, "% of positions"),
}


def draw_panel(axes: "Axes", title: str, quality: Mapping[str, Any]) -> None:
    """One of PANELS by horizon: a line for each kind of heads and measure."""
    measures, factor, label = PANELS[title]
    horizons = [int(horizon) for horizon in quality["targets"]]
    for kind, (name, colour, marker) in _KINDS.items():
        for measure, dash in measures.items():
            found = quality[kind].get(measure)
            if not found:
                continue
            words = None if dash == ":" else name  # one entry of the legend for both
            if measure == "agreement":
                words = f"{name}: {quality[kind]['accepted_length']:.2f} of {len(horizons)} accepted"
            values = [factor * value for value in found.values()]
            axes.plot(horizons, values, linestyle=dash, label=words, color=colour, marker=marker, linewidth=2)
    axes.set(xlabel="horizon", ylabel=label, ylim=(0, None if factor == 1 else 103))
    axes.set_xticks(horizons)
