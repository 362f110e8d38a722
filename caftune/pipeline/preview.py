"""`caftune preview`: rows of training data as a person would check them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from caftune.core.objective import IGNORED, horizon_targets
from caftune.errors import CaftuneError
from caftune.pipeline.base_model import BaseModel
from caftune.pipeline.heads_choice import HeadsRef
from caftune.pipeline.schema import Recipe
from caftune.pipeline.stage_config import stage_two_config
from caftune.pipeline.stage_rows import task_rows

_SHOWN = 24


def preview_rows(recipe: Recipe, count: int = 3) -> Iterator[tuple[list[str], list[bool], dict[int, list[str]]]]:
    """For the first rows of data.train: the tokens, which of them are trained on, and each horizon's target per position."""
    base = BaseModel.of(recipe.model)
    tokenizer = base.tokenizer()
    args = stage_two_config(recipe, base, Path(recipe.output, "train"), heads=None, aux_weight=0.0)
    found = task_rows(recipe.data, "train", base, tokenizer, args, limit=count, is_whole=False)
    if found is None:
        raise CaftuneError("data.train must name a file or hub id, got nothing. Add it to the recipe.")
    number = HeadsRef.find(recipe.heads.path).config.count if recipe.heads.path else recipe.heads.count
    horizons = range(1, number + 2)
    for row in found.rows.with_format("torch"):
        labels = row["labels"][None]
        targets = {h: horizon_targets(labels, h)[0].tolist() for h in horizons}
        yield (
            tokenizer.convert_ids_to_tokens(row["input_ids"].tolist()),
            [token != IGNORED for token in row["labels"].tolist()],
            {h: [tokenizer.convert_ids_to_tokens(t) if t != IGNORED else "" for t in targets[h]] for h in horizons},
        )


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
