"""Stage 1 of an 8B shape: four heads on 8 x 4096 tokens, of which the base keeps no graph."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from caftune import CAFTConfig, CAFTTrainer
from gpu_parts.shapes import options_of, rows_of, shapes, tokenizer, train, vocabularies
from gpu_parts.step import TIMED, WARM, Meter, at_depths, cells_of, free_memory

TITLE = "Stage 1 of an 8B shape, four heads, 8 x 4096 tokens, vocabulary 150k"
SHAPE, BATCH, LENGTH = "8B", 8, 4096
ROWS: dict[str, dict[str, Any]] = {
    "half of the tokens labelled": {"labelled": 0.5},
    "all tokens labelled": {"labelled": 1.0},
    "all tokens labelled, 25% of the targets": {"labelled": 1.0, "aux_target_share": 0.25},
    "half of the tokens labelled, the model's own distributions as targets": {"labelled": 0.5, "soft_targets": True},
}


def measured(labelled: float, layers: int, *, small: bool, device: str, **own: Any) -> dict[str, Any]:
    """One run at one depth."""
    free_memory(device)
    shape, vocabulary = shapes(small)[SHAPE], vocabularies(small)["150k"]
    batch, length = (shape.batch, 2 * shape.length) if small else (BATCH, LENGTH)
    meter, steps = Meter(device), WARM + TIMED + 1
    options = options_of(device, steps, batch)
    with tempfile.TemporaryDirectory() as folder:
        trainer = CAFTTrainer(
            shape.model(vocabulary, layers, device),
            CAFTConfig(folder, pretrain_heads=True, num_heads=4, **options, **own),
            train_dataset=rows_of(vocabulary, batch, length, labelled, steps),
            processing_class=tokenizer(),
        )
        train(trainer, meter)
    return {"layers": layers, **meter.found()}


def row(options: dict[str, Any], *, small: bool, device: str) -> dict[str, Any]:
    """The run at all layers, or at two depths."""
    return at_depths(partial(measured, **options, small=small, device=device), shapes(small)[SHAPE])


def rows(small: bool, device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The rows by name."""
    for name, options in ROWS.items():
        yield name, partial(row, options, small=small, device=device)


def lines(found: Mapping[str, Any], plans: Mapping[str, Any]) -> list[str]:
    """A row a run."""
    table = ["| run | step, s | peak, GiB | plan, GiB | to the plan | waits a step |", "|---|---|---|---|---|---|"]
    for name in ROWS:
        step, _, _, _, *rest = cells_of(found.get(name, "not measured"), None, plans.get(name))
        table.append(f"| {' | '.join([name, step, *rest])} |")
    return table
