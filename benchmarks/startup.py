"""How long until training starts: `caftune train` beside the same SFTTrainer script, and what imports take.

    python benchmarks/startup.py [--rounds 5] [--shapes demo 6x512] [--threads 2]

Every number is of a process of its own with an empty cache of data sets; the ways run in turn, round by round, so that a slow
spell of the machine hits all alike. Wall clock is from the start of the process, processor is seconds of all its threads. Until
the first step begins all ways do the same but for what is caftune's; with loss.weight=0 the step is the same, too, and only the
count of its operations is added. `demo` is the model inside the package, the other shapes are Llamas of so many layers and that
width with random weights and a vocabulary of 32,000. Prints Markdown: medians (range).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

WORKER = str(Path(__file__).with_name("startup_worker.py"))
TRAININGS = {
    "SFTTrainer": ("sft",),
    "caftune train, loss.weight=0": ("caftune", "loss.weight=0", "heads.path=null"),
    "caftune train": ("caftune",),
}
IMPORTS = ("import torch", "import caftune", "from trl import SFTTrainer", "from caftune import CAFTTrainer")
COUNT = "import time; print([[time.time(), time.process_time()]])"

Times = list[tuple[float, float]]  # wall and processor seconds at each mark of a process


def times(arguments: Sequence[str], folder: Path, threads: int) -> Times:
    """Run one process, and read its marks."""
    cache = folder / "cache"
    for path in (cache, folder / "run"):
        shutil.rmtree(path, ignore_errors=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache), "PYTHONWARNINGS": "ignore"}
    started = time.time()
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{arguments} failed: {done.stderr[-2000:]}")
    marks = json.loads(done.stdout.rstrip().rpartition("\n")[2])
    return [(wall - started, processor) for wall, processor in marks]


def measured(ways: Mapping[str, Sequence[str]], folder: Path, options: argparse.Namespace) -> dict[str, list[Times]]:
    """All ways in turn, in every round."""
    found: dict[str, list[Times]] = {name: [] for name in ways}
    for number in range(options.rounds + 1):  # the first fills the caches of the disk
        for name, arguments in ways.items():
            result = times(arguments, folder, options.threads)
            print(f"round {number}, {name}: {result}", file=sys.stderr, flush=True)
            if number:
                found[name].append(result)
    return found


def table(title: str, marks: Sequence[str], found: Mapping[str, Sequence[Times]]) -> str:
    """Markdown: a way a row, beside each time its ratio to the first way's."""
    kinds = [(mark, kind) for mark in range(len(marks)) for kind in (0, 1)]
    heads = [f"{marks[mark]}, {('wall', 'processor')[kind]} s (range) | ratio" for mark, kind in kinds]
    lines = [f"| {title} | {' | '.join(heads)} |", f"|---|{'---:|' * 2 * len(kinds)}"]
    first = next(iter(found.values()))
    for name, rounds in found.items():
        cells = []
        for mark, kind in kinds:
            seconds, theirs = ([result[mark][kind] for result in results] for results in (rounds, first))
            middle = statistics.median(seconds)
            cells.append(f"{middle:.2f} ({min(seconds):.2f}-{max(seconds):.2f})")
            cells.append(f"{middle / statistics.median(theirs):.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="*", default=["demo", "6x512"], help="demo, or LAYERSxWIDTH")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    tables = []
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as name:
            subprocess.run([sys.executable, WORKER, "build", name, shape], check=True, capture_output=True)
            recipe = str(Path(name, "recipe.yaml"))
            ways = {way: [WORKER, kind, recipe, *rest] for way, (kind, *rest) in TRAININGS.items()}
            marks = ("until the first step", "until its end")
            tables.append(table(f"{shape}, first step", marks, measured(ways, Path(name), options)))
    with tempfile.TemporaryDirectory() as name:
        imports = {f"`{what}`": ["-c", f"{what}; {COUNT}"] for what in IMPORTS}
        tables.append(table("import", ["whole process"], measured(imports, Path(name), options)))
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
