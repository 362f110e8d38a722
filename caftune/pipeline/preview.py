"""One row of training data as a person would check it."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

_SHOWN = 24


def print_row(
    console: Console, number: int, tokens: Sequence[str], trained: Sequence[bool], targets: Mapping[int, Sequence[str]]
) -> None:
    """The row's text with its trained tokens marked, and a table of targets where training begins."""
    console.print(f"\nRow {number}: {len(tokens)} tokens, {sum(trained)} of them trained on (green).", style="bold")
    text = Text()
    for token, is_trained in zip(tokens, trained, strict=True):
        text.append(token, style="black on green" if is_trained else "dim")
        text.append(" ")
    console.print(text)
    first = max(0, min((t for t, is_trained in enumerate(trained) if is_trained), default=1) - len(targets))
    table = Table(title=f"Targets per horizon, positions {first} to {min(first + _SHOWN, len(tokens)) - 1}")
    table.add_column("t", justify="right")
    table.add_column("token")
    for horizon in targets:
        table.add_column(f"h={horizon}")
    for t in range(first, min(first + _SHOWN, len(tokens))):
        table.add_row(str(t), Text(tokens[t]), *(Text(targets[horizon][t]) for horizon in targets))
    console.print(table)
