"""`caftune compare` of a recipe with a given base, such as SmolLM2-135M: its verdict and differences."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from caftune.compare.summary import Comparison

TITLE = "The study's comparison on its base"
ROW = "caftune compare"


def measured(model: str | None, recipe: str | None) -> Any:
    """The comparison that the recipe describes, in a folder that is then deleted."""
    if model is None or recipe is None:
        return "not run: needs --model and --recipe"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "run")
        command = [sys.executable, "-m", "caftune.cli", "compare", recipe, f"model.name={model}", f"output={output}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            return f"failed: {' '.join((done.stderr or done.stdout).split())[-300:]}"
        found = Comparison.read(output / "compare" / "comparison.json")
    differences = [" ".join(f"{name}={value}" for name, value in asdict(x).items()) for x in found.differences]
    return {"verdict": found.verdict, "arms": found.arms, "seeds": found.seeds, "differences": differences}


def rows(model: str | None, recipe: str | None) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The one row."""
    yield ROW, partial(measured, model, recipe)


def lines(found: Mapping[str, Any], _plans: Mapping[str, Any]) -> list[str]:
    """The verdict, then a row a difference."""
    values = found.get(ROW, "not measured")
    shown = [values["verdict"], *values["differences"]] if isinstance(values, dict) else [str(values)]
    return ["| result |", "|---|", *(f"| {' '.join(line.split())} |" for line in shown)]
