"""What only a GPU can tell, in ten minutes: correctness, cost of a step, stage 1, labels, and the study on its base.

    python benchmarks/gpu.py [--seconds 570] [--model FOLDER --recipe FILE]      on a GPU; writes gpu.json
    python benchmarks/gpu.py --parts step                                        one part; the others' results stay
    python benchmarks/gpu.py --device cpu --small                                a rehearsal: the same code on tiny shapes
    python benchmarks/gpu.py --parts plan                                        what `caftune plan` says of the runs; no GPU
    python benchmarks/gpu.py --table [gpu.json] > docs/results/gpu.md            the table; without results "not measured"

Each part is a process that has at most three minutes and writes each row as it is measured. A row that fails, and a part that
has no time left, say so in the results, and the next one begins. Runs go through SFTTrainer and CAFTTrainer.
"""

import argparse
import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PARTS = ("correctness", "step", "stage_one", "labels", "study", "plan")  # plan last: it needs no GPU
LIMIT_S, SHORTEST_S = 180, 10  # of a part
_MODULES = {"pyyaml": "yaml"}
_NO_TIME = "not run: no time left"


def missing_packages() -> list[str]:
    """The packages that caftune needs and that are not installed here."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = [re.match(r"[\w-]+", line)[0] for line in needed]  # type: ignore[index]
    return [name for name in names if importlib.util.find_spec(_MODULES.get(name, name).replace("-", "_")) is None]


def read(path: Path) -> dict[str, Any]:
    """The results so far."""
    return json.loads(path.read_text()) if path.is_file() else {"parts": {}}


def write(path: Path, part: str, **values: Any) -> None:
    """Add to a part's results."""
    results = read(path)
    results["parts"].setdefault(part, {}).update(values)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(results, indent=1) + "\n")
    draft.replace(path)


def run_part(part: str, options: argparse.Namespace) -> None:
    """Measure the rows of a part in this process."""
    rows: dict[str, Any] = {}
    write(options.output, part, rows=rows)
    import torch
    import transformers

    module = importlib.import_module(f"gpu_parts.{part}")
    given = (options.model, options.recipe) if part == "study" else (options.small, options.device)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    name = torch.cuda.get_device_name() if options.device == "cuda" and part != "plan" else "cpu"
    write(options.output, part, device=name, versions=versions, small=options.small)
    for row, measure in module.rows(*given):
        began = time.perf_counter()
        try:
            rows[row] = measure()
        except Exception as error:
            rows[row] = f"failed: {type(error).__name__}: {error}"[:300]
        write(options.output, part, rows=rows)
        shown = {k: v for k, v in rows[row].items() if k != "runs"} if isinstance(rows[row], dict) else rows[row]
        sys.stdout.write(f"{part}: {row}: {shown} ({time.perf_counter() - began:.1f} s)\n")
        sys.stdout.flush()


def stopped(part: str, options: argparse.Namespace, limit_s: float) -> str | None:
    """Run a part in its own process. Returns why it ended early, if it did."""
    command = [sys.executable, __file__, "--run", part, "--device", options.device, "--output", str(options.output)]
    command += ["--small"] if options.small else []
    for name in ("model", "recipe"):
        command += [f"--{name}", getattr(options, name)] if getattr(options, name) else []
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, start_new_session=True, stderr=log)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"ended after {limit_s:.0f} s"
        log.seek(0)
        return f"failed: {' '.join(log.read().split())[-300:]}" if code else None


def run(options: argparse.Namespace) -> None:
    """The chosen parts, one after the other, until the time is up."""
    until = time.monotonic() + options.seconds
    for part in options.parts:
        began = time.monotonic()
        limit = min(LIMIT_S, until - began)
        why = stopped(part, options, limit) if limit > SHORTEST_S else _NO_TIME
        if why == _NO_TIME:
            write(options.output, part, rows={})
        write(options.output, part, stopped=why, seconds=round(time.monotonic() - began, 1))
        sys.stdout.write(f"{part}: {why or 'done'} after {time.monotonic() - began:.0f} s\n")


def table(results: dict[str, Any]) -> str:
    """docs/results/gpu.md."""
    parts = results["parts"]
    plans = parts.get("plan", {}).get("rows", {})
    text = [
        "# GPU",
        "",
        "```",
        "python benchmarks/gpu.py --parts plan                                # what `caftune plan` says of the runs; no GPU",
        "python benchmarks/gpu.py --model FOLDER --recipe FILE                # ten minutes on a GPU; writes gpu.json",
        "python benchmarks/gpu.py --parts step                                # one part, at most three minutes",
        "python benchmarks/gpu.py --device cpu --small                        # a rehearsal on tiny shapes",
        "python benchmarks/gpu.py --table [gpu.json] > docs/results/gpu.md    # this page",
        "```",
        "",
        "Runs go through SFTTrainer and CAFTTrainer: steps of `train()`, AdamW, bfloat16. Full fine-tuning has float32",
        "weights, LoRA (rank 8) bfloat16 ones. Shapes are Qwen3's with random weights; a step has 8 x 1024 tokens (8B:",
        "4 x 1024). Heads are copies of the last layer. Waits are those of the host for the GPU.",
    ]
    for part in PARTS[:-1]:
        module = importlib.import_module(f"gpu_parts.{part}")
        found = parts.get(part, {})
        text += ["", f"## {module.TITLE}", ""]
        if found:
            notes = [
                found.get("device"),
                "tiny shapes, a rehearsal" if found.get("small") else None,
                found.get("stopped"),
            ]
            text += [f"{'; '.join(note for note in notes if note)}.", ""]
        text += module.lines(found.get("rows", {}), plans)
    return "\n".join(text) + "\n"


def parsed() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all, in this order")
    parser.add_argument("--seconds", type=float, default=570, help="no part goes on after these")
    parser.add_argument("--model", help="the study's base: a folder or a hub id")
    parser.add_argument("--recipe", help="the study's recipe")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument(
        "--table", nargs="?", type=Path, const=Path(), help="print the table of these results, or of none"
    )
    parser.add_argument("--run", choices=PARTS, help=argparse.SUPPRESS)
    return parser, parser.parse_args()


def main() -> None:
    """Measure, or print the table."""
    sys.path.insert(0, str(ROOT))
    parser, options = parsed()
    missing = missing_packages()
    if missing:
        parser.error(f"not installed here: {', '.join(missing)}. Install them (pip install {' '.join(missing)}).")
    if options.table is not None:
        sys.stdout.write(table(read(options.table)))
    elif options.run is not None:
        run_part(options.run, options)
    else:
        import torch

        if options.device == "cuda" and not torch.cuda.is_available() and set(options.parts) != {"plan"}:
            parser.error("there is no GPU here; rehearse with --device cpu --small")
        run(options)


if __name__ == "__main__":
    main()
