"""Seconds and peak memory of reading rows, by the code of this checkout.

    python benchmarks/reading.py [--rows 200000] [--limit 1000] [--file ROWS.jsonl]

The rows are prompts and completions of a few hundred characters; without --file they are written to a temporary file (about
87 MiB at 200,000 rows). Each measurement is a process of its own, once with all rows and once with --limit. Memory is the
process's largest resident size, and what its imports took before the reading. On a machine with other work to do compare the
seconds of CPU.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda")
WORKER = """
import resource, sys, time
from caftune.data.forms import load_rows
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kilobytes on Linux
imported, limit = peak(), int(sys.argv[2]) or None
began, worked = time.perf_counter(), time.process_time()
rows = load_rows(sys.argv[1], limit=limit)
took, worked = time.perf_counter() - began, time.process_time() - worked
print(f"{len(rows)} rows: {took:.2f} s ({worked:.2f} s of CPU), {peak():.0f} MiB at most, {imported:.0f} of them imports")
"""


def write_rows(path: Path, count: int) -> None:
    """Rows of random words, the same every time."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            prompt = f"Question {number}: {' '.join(draw.choices(WORDS, k=30))}"
            file.write(json.dumps({"prompt": prompt, "completion": " ".join(draw.choices(WORDS, k=38))}) + "\n")


def main() -> None:
    """Write the rows, and read them in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--file", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.file or Path(folder, "rows.jsonl")
        if options.file is None:
            write_rows(path, options.rows)
        for limit in (0, options.limit):
            subprocess.run([sys.executable, "-c", WORKER, str(path), str(limit)], check=True)


if __name__ == "__main__":
    main()
