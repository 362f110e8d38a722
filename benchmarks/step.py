"""One training step, timed and weighed: SFTTrainer, CAFT exact and sampled, textbook stacked logits, and the reference.

    python benchmarks/step.py --quick                        two minutes: one small case
    python benchmarks/step.py [--tunings full full-heads lora lora-heads stage1] [--vocabularies 32000 131072]
        [--labelled 0.25 0.5 1] [--heads 1 2 4 8] [--shapes 4x512 ...] [--arms ...] [--rounds 3] [--steps 3]
        [--reference-python PATH] [--models FOLDER ...]

With --models these are measured in the Llama's place (arms sft, exact, sampled): random tokens, untrained heads. A
Llama of 6 layers, width 512, random weights. Float32 on a CPU (bfloat16 autocast on a GPU), 2 threads, AdamW, no gradient
checkpointing. Every arm of a case runs once per round in a process of its own, so that a slow spell of the machine hits all
alike, cases too; a number is the median of all rounds' steps (processor: seconds of all threads,
which other jobs disturb less). The timed processes keep freed memory, so that page faults hardly count. Memory comes from one
more process per arm, in which it goes back at once: the peak of a step above the process before its model was built. Cases are
all combinations of the options. Writes step.json and step.md; ratios are to SFTTrainer, beside them what `caftune plan` states
(with TRL's loss as it is on this device). FLOPs are matrix products and attention, counted in the first step.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from reference import reference_environment
from step_worker import RANK, TRUNK, Case
from transformers import AutoConfig, LlamaConfig

from caftune import CAFTConfig
from caftune.training.estimate import Estimate, estimate
from caftune.training.run_setup import Setup

WORKER = Path(__file__).with_name("step_worker.py")
ARMS = ("sft", "exact", "sampled", "stacked", "reference")
QUICK: dict[str, Any] = {
    **{"tunings": ["full"], "vocabularies": [32000], "labelled": [0.5], "heads": [4], "shapes": ["2x128"]},
    **{"rounds": 1, "steps": 1},
}
# Of the reference's environment, beyond what benchmarks/reference.py installs.
PEFT = ("peft==0.15.2", "accelerate<1.8", "transformers==4.51.3")


def run(python: str, arm: str, case: Case, folder: Path, options: argparse.Namespace, *, frees: bool) -> dict[str, Any]:
    """One process of an arm; why there is no result, where it failed."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    # glibc gives freed blocks of more than 32 MiB back, and page faults then cost as much as a step or nothing, by machine.
    keeps = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**35), "THP_MEM_ALLOC_ENABLE": "1"}
    environment = {name: value for name, value in environment.items() if name not in keeps}
    environment |= {"MALLOC_MMAP_THRESHOLD_": str(2**20)} if frees else keeps
    command = [python, str(WORKER), arm, json.dumps(asdict(case)), str(folder), "--device", options.device]
    command += ["--threads", str(options.threads), "--steps", str(1 if frees else options.steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        killed = " (out of memory?)" if done.returncode == -9 else ""
        return {"failed": f"exit status {done.returncode}{killed}: {done.stderr.strip()[-200:]}"}
    return json.loads(done.stdout.rstrip().rpartition("\n")[2])


def measure(cases: list[Case], pythons: dict[str, str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """All arms of all cases, round by round; what is known is written after each timed case."""
    runs: dict[tuple[Case, str], list[dict[str, Any]]] = {(case, arm): [] for case in cases for arm in pythons}
    with tempfile.TemporaryDirectory() as folder:
        heads = {case: Path(folder, str(number), "heads") for number, case in enumerate(cases)}
        for case in cases:
            run(sys.executable, "write-heads", case, heads[case], options, frees=False)
        for number in range(options.rounds + 1):  # the first round is for memory
            for (case, arm), results in runs.items():
                if results and "failed" in results[-1]:
                    continue
                results.append(run(pythons[arm], arm, case, heads[case], options, frees=number == 0))
                print(f"{case}, round {number}, {arm}: {results[-1]}", file=sys.stderr, flush=True)
                write([summary(*key, found) for key, found in runs.items() if len(found) > 1], options.output)
    return [summary(*key, results) for key, results in runs.items()]


def write(results: list[dict[str, Any]], path: Path) -> None:
    """The numbers and their table."""
    path.write_text(json.dumps(results, indent=2) + "\n")
    path.with_suffix(".md").write_text(table(results) + "\n")


def summary(case: Case, arm: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """One arm's numbers, and the plan's."""
    found: dict[str, Any] = {**asdict(case), "arm": arm}
    if "failed" in results[-1]:
        return {**found, "failed": results[-1]["failed"]}
    seconds = [second for result in results[1:] for second in result["seconds"]]
    found |= {"seconds": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds)}
    found["processor"] = statistics.median(second for result in results[1:] for second in result["processor"])
    found |= {name: results[0][name] for name in ("peak_mib", "growth_mib", "flops")}
    if arm in ("sft", "exact", "sampled"):
        plan = planned(case, arm)
        found |= {"plan_overhead": plan.overhead, "plan_overhead_here": plan.overhead_here}
        found["plan_peak_mib"] = plan.memory.peak / 2**20
    return found


def planned(case: Case, arm: str) -> Estimate:
    """What `caftune plan` says of an arm."""
    from peft import LoraConfig

    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    setup = Setup(
        stage="heads" if case.tuning == "stage1" else "train",
        tuning="lora" if case.tuning.startswith("lora") else "full",
        heads=case.heads,
        trains_heads=case.tuning.endswith("-heads"),
        target_share=0.25 if arm == "sampled" else 1.0,
        batch_size=case.batch,
        length=case.length,
        mean_length=case.length,
        labelled=case.labelled,
        checkpointing=False,
    )
    if arm == "sft":
        setup = replace(setup, stage="train", heads=0)
    random = LlamaConfig(vocab_size=case.vocabulary, **TRUNK)
    config = AutoConfig.from_pretrained(case.model) if case.model else random
    return estimate(config, setup, lora if setup.tuning == "lora" else None)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: an arm a row."""
    lines = [
        "| model | tuning | vocabulary | labelled | heads | rows x tokens | arm | step, s (range) | to SFTTrainer "
        "| processor time, to SFTTrainer | FLOPs, to SFTTrainer | plan | peak, MiB | to SFTTrainer | plan, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    names = [f.name for f in fields(Case)]
    for result in results:
        first = [Path(result["model"]).name or "random Llama", *(f"{result[name]}" for name in names[:4])]
        first += [f"{result['batch']} x {result['length']}", result["arm"]]
        if "failed" in result:
            why = result["failed"].replace("\n", " ").replace("|", "/")
            lines.append(f"| {' | '.join(first)} | {why} | | | | | | | |")
            continue
        base = next((r for r in results if r["arm"] == "sft" and all(r[n] == result[n] for n in names)), {})
        here, peak = result.get("plan_overhead_here"), result.get("plan_peak_mib")
        cells = [
            f"{result['seconds']:.2f} ({result['fastest']:.2f}-{result['slowest']:.2f})",
            *(ratio(result, base, name) for name in ("seconds", "processor", "flops")),
            f"{here:.2f}" if here else "",
            f"{result['peak_mib']:.0f}",
            ratio(result, base, "peak_mib"),
            f"{peak:.0f}" if peak else "",
        ]
        lines.append(f"| {' | '.join([*first, *cells])} |")
    return "\n".join(lines)


def ratio(result: dict[str, Any], base: dict[str, Any], name: str) -> str:
    """A number over SFTTrainer's, as a cell."""
    return f"{result[name] / base[name]:.2f}" if result.get(name) and base.get(name) else ""


def cases_of(options: argparse.Namespace) -> list[Case]:
    """All combinations of the options."""
    shapes = [tuple(int(part) for part in shape.split("x")) for shape in options.shapes]
    models = [(AutoConfig.from_pretrained(name).vocab_size, name) for name in options.models]
    models = models or [(vocabulary, "") for vocabulary in options.vocabularies]
    combinations = itertools.product(models, options.tunings, options.labelled, options.heads, shapes)
    return [Case(tuning, size, *choice, *shape, name) for (size, name), tuning, *choice, shape in combinations]


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ("full", "full-heads", "lora", "lora-heads", "stage1")
    parser.add_argument("--tunings", nargs="+", choices=kinds, default=["full", "lora", "stage1"])
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[32000, 131072])
    parser.add_argument("--labelled", nargs="+", type=float, default=[0.5])
    parser.add_argument("--heads", nargs="+", type=int, default=[4])
    parser.add_argument("--shapes", nargs="+", default=["4x512"], help="rows x tokens of a batch")
    parser.add_argument("--models", nargs="+", default=[], help="folders of real models, in place of --vocabularies")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="one small case, one round")
    parser.add_argument("--reference-python", help="interpreter of an environment with caft-llm 0.0.1 and peft 0.15")
    parser.add_argument("--output", type=Path, default=Path("step.json"))
    options = parser.parse_args()
    if "lora-heads" in options.tunings and {"stacked", "reference"} & {*options.arms}:
        parser.error("--tunings lora-heads needs --arms sft exact sampled: the others have no LoRA on their heads.")
    if options.models and {"stacked", "reference"} & {*options.arms}:
        parser.error("--models needs --arms sft exact sampled: the others build the Llama.")
    if options.quick:
        vars(options).update(QUICK)
    if "sampled" in options.arms and "aux_target_share" not in {field.name for field in fields(CAFTConfig)}:
        print("The sampled arm is left out: CAFTConfig has no aux_target_share.", file=sys.stderr)
        options.arms.remove("sampled")
    return options


def main() -> None:
    """Run every case."""
    options = parsed()
    pythons = {arm: sys.executable for arm in ARMS if arm in options.arms and arm != "reference"}
    with reference_environment(options.reference_python if "reference" in options.arms else sys.executable) as python:
        if "reference" in options.arms:
            pythons["reference"] = python
            if options.reference_python is None and "lora" in options.tunings:
                subprocess.run([python, "-m", "pip", "install", "--quiet", *PEFT], check=True)
        results = measure(cases_of(options), pythons, options)
    write(results, options.output)
    print(table(results))


if __name__ == "__main__":
    main()
