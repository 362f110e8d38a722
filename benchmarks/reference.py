"""caftune against the reference implementation (caft-llm 0.0.1): do they agree, and what does a step cost?

    python benchmarks/reference.py [--only losses heads cost] [--reference-python PATH] [--rounds 3] [--steps 1]

`losses`: both losses of the same logits. `heads`: the reference trains heads and saves them; `caftune heads import` reads them,
and both give every head's loss on the same rows. `cost`: a training step.

The reference needs transformers 4.51.3, which caftune does not run on, so it gets an environment of its own: a throw-away one,
or the one whose interpreter is named. Linux, CPU, one thread. Prints Markdown; exits with 1 if the two disagree.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from reference_worker import CASES, NUM_HEADS, SCHEDULES, TOTAL_STEPS
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from caftune.demo.run import BASE

WORKER = Path(__file__).with_name("reference_worker.py")
REQUIREMENTS = (f"torch=={importlib.metadata.version('torch').split('+')[0]}", "transformers==4.51.3", "pandas")
# Relative for values above 1: the losses lie near 4.6, where float32 has one value every 4.8e-7.
TOLERANCES = {"torch.float32": 1e-6, "torch.float64": 1e-12}
VOCABULARIES = (8192, 32000)
PARTS = ("losses", "heads", "cost")
# Of one case: its runs' results, one per round.
Runs = list[dict[str, float]]
Costs = dict[tuple[int, str, str], Runs]


@contextmanager
def reference_environment(python: str | None) -> Iterator[str]:
    """The interpreter of an environment with the reference in it, with our version of torch."""
    if python is not None:
        yield python
        return
    with tempfile.TemporaryDirectory() as folder:
        print("Installing the reference ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [f"{folder}/bin/python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, *REQUIREMENTS], check=True)
        # --no-deps: it pins torch 2.5.1, and both sides are to be measured on one version of torch.
        subprocess.run([*install, "--no-deps", "caft-llm==0.0.1"], check=True)
        yield f"{folder}/bin/python"


def worker_output(python: str, *arguments: object) -> str:
    """What a measurement in a fresh process prints last."""
    quiet = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    environment = {**os.environ, **quiet, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [python, str(WORKER), *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.rstrip().rpartition("\n")[2]


def write_batch(path: Path) -> None:
    """Random head outputs, and labels of every step: all tokens, and with prompts of 1 to 30 tokens masked."""
    rows, tokens, vocabulary = 3, 48, 64
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(NUM_HEADS + 1, rows, tokens, vocabulary, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (TOTAL_STEPS, rows, tokens), generator=generator)
    prompts = torch.randint(1, 31, (TOTAL_STEPS, rows, 1), generator=generator)
    save_file({"logits": logits, "all": labels, "masked": labels.where(torch.arange(tokens) >= prompts, -100)}, path)


def agreement(reference_python: str, folder: Path) -> tuple[str, bool]:
    """A table of the largest differences, and whether all are within tolerance."""
    write_batch(folder / "batch.safetensors")
    sides = {"reference": reference_python, "caftune": sys.executable}
    for side, python in sides.items():
        worker_output(python, "agree", side, folder / "batch.safetensors", folder / f"{side}.safetensors")
    theirs, ours = (load_file(folder / f"{side}.safetensors") for side in sides)
    lines = [
        "| precision | schedule | values compared | loss of a horizon | its weight | total | tolerance |",
        "|---|---|---|---|---|---|---|",
    ]
    agrees = True
    for dtype, tolerance in TOLERANCES.items():
        for schedule in SCHEDULES:
            differences = [difference(theirs, ours, dtype, schedule, name) for name in ("loss", "weight", "total")]
            largest = [float(values.max()) for values in differences]
            agrees &= all(value <= tolerance for value in largest)  # false for NaN
            count = sum(values.numel() for values in differences)
            cells = " | ".join(f"{value:.1e}" for value in largest)
            lines.append(f"| {dtype.removeprefix('torch.')} | {schedule} | {count} | {cells} | {tolerance:.0e} |")
    return "\n".join(lines), agrees


def difference(
    theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor], dtype: str, schedule: str, name: str
) -> torch.Tensor:
    """|theirs - ours| / max(1, |theirs|) at every step, on both kinds of labels."""
    keys = [f"{dtype}/{labels}/{schedule}/{name}" for labels in ("all", "masked")]
    return torch.cat([((theirs[key] - ours[key]).abs() / theirs[key].abs().clamp(min=1)).flatten() for key in keys])


def imported_heads(reference_python: str, folder: Path) -> tuple[str, bool]:
    """A table of every head's loss on both sides, and whether all differences are within tolerance."""
    write_model(folder / "base", VOCABULARIES[0])
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder / "base")
    horizons = " | ".join(f"h{horizon}" for horizon in range(2, NUM_HEADS + 2))
    lines = [f"| precision | side | {horizons} | largest difference | tolerance |", f"|{'---|' * (NUM_HEADS + 4)}"]
    agrees = True
    for dtype, tolerance in TOLERANCES.items():
        given = folder / dtype
        theirs = json.loads(worker_output(reference_python, "heads", "reference", folder / "base", given, dtype))
        ours = json.loads(worker_output(sys.executable, "heads", "caftune", folder / "base", given, dtype))
        largest = max(abs(one - other) / max(1, one) for one, other in zip(theirs, ours, strict=True))
        agrees &= largest <= tolerance
        for side, losses, last in (("reference", theirs, " | "), ("caftune", ours, f"{largest:.1e} | {tolerance:.0e}")):
            cells = " | ".join(f"{loss:.8f}" for loss in losses)
            lines.append(f"| {dtype.removeprefix('torch.')} | {side} | {cells} | {last} |")
    return "\n".join(lines), agrees


def costs(reference_python: str, folder: Path, *, rounds: int, steps: int) -> Costs:
    """Every case in a fresh process per round, one after the other, so that a slow spell of the machine hits all alike."""
    for vocabulary in VOCABULARIES:
        write_model(folder / str(vocabulary), vocabulary)
    runs: Costs = {(v, labelled, case): [] for v in VOCABULARIES for labelled in ("all", "half") for case in CASES}
    for number in range(rounds):
        for (vocabulary, labelled, case), results in runs.items():
            python = reference_python if case.startswith("reference") else sys.executable
            result = json.loads(worker_output(python, "cost", case, folder / str(vocabulary), labelled, steps))
            results.append(result)
            print(f"round {number + 1}: {vocabulary}, {labelled} labelled, {case}: {result}", file=sys.stderr)
    for vocabulary in VOCABULARIES:
        for labelled in ("all", "half"):
            refuse_different_models([run for case in CASES for run in runs[vocabulary, labelled, case]])
    return runs


def write_model(folder: Path, vocabulary: int) -> None:
    """A tiny Llama with random weights, in a folder that both versions of transformers read."""
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **shape)).save_pretrained(folder)


def refuse_different_models(runs: Runs) -> None:
    """Raise unless every process began from the same next-token loss on the same batch."""
    start = [run["start"] for run in runs]
    if max(start) - min(start) > 1e-5:
        raise RuntimeError(f"Both sides must start from one model and batch, got next-token losses {start}.")


def cost_table(runs: Costs) -> str:
    """Medians over rounds (range in brackets), and how each case compares with the reference's, heads trained."""
    lines = [
        "| vocabulary | labelled | case | step, CPU s | in the kernel, s | to the reference | memory, MiB | to the reference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (vocabulary, labelled, case), results in runs.items():
        first = {name: median(runs[vocabulary, labelled, next(iter(CASES))], name) for name in ("seconds", "mib")}
        seconds, mib = median(results, "seconds"), median(results, "mib")
        times = [run["seconds"] for run in results]
        cells = [
            f"{vocabulary} | {labelled} | {case} | {seconds:.2f} ({min(times):.2f}-{max(times):.2f})",
            f"{median(results, 'kernel'):.2f} | {seconds / first['seconds']:.2f}",
            f"{mib:.0f} | {mib / first['mib']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def median(runs: Runs, name: str) -> float:
    """The median over rounds."""
    return statistics.median(run[name] for run in runs)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", help="interpreter of an environment with caft-llm 0.0.1")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to compare; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="processes per case of the cost table")
    parser.add_argument("--steps", type=int, default=1, help="timed steps per process")
    arguments = parser.parse_args()
    with reference_environment(arguments.reference_python) as python, tempfile.TemporaryDirectory() as folder:
        for part, compare in (("losses", agreement), ("heads", imported_heads)):
            if part in arguments.only:
                table, agrees = compare(python, Path(folder))
                print(table + "\n", flush=True)
                if not agrees:
                    sys.exit("caftune and the reference disagree by more than the tolerance.")
        if "cost" in arguments.only:
            print(cost_table(costs(python, Path(folder), rounds=arguments.rounds, steps=arguments.steps)))


if __name__ == "__main__":
    main()
