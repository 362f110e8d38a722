"""Every command on a real model, once each: seconds and peak memory, next to what `caftune plan` says.

    python benchmarks/real_models.py MODEL_FOLDER --data FOLDER [--output docs/results/real_models.md] [--only label eval ...]
        [--runs runs/real_models] [--threads 1] [--again]

FOLDER holds gsm8k/{train,test}.jsonl and instructions/alpaca_en_demo.json. Each command is its own process, through the
command line, with one recipe and few rows. Seconds are those of the whole command, with Python and its imports; memory is the
largest resident set of its process as the system counts it. Results are written after every command (a JSON next to the
Markdown, both with the models measured before), commands measured before are left out unless `--again` is given, and one that
fails is listed with its last line.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from caftune.cli import app

ROWS, BATCH, LENGTH = 8, 4, 256


@dataclass(frozen=True)
class Command:
    """A command of caftune after `caftune`: `RECIPE` and `RUN` stand for the recipe and its run folder."""

    words: str
    overrides: str = ""
    plan: str | None = None  # the stage that `plan` is asked for, with the same overrides
    makes: str = ""  # folders that are removed before: a finished run would be resumed, and take no step


LORA, QLORA, FULL = "model.tuning=lora", "model.tuning=qlora", "model.tuning=full"
COMMANDS = {
    "label": Command("label RECIPE", makes="RUN/labels"),
    "pretrain-heads": Command("pretrain-heads RECIPE", plan="heads", makes="RUN/pretrain RUN/heads"),
    "heads measure": Command("heads measure RECIPE"),
    "heads info --measure": Command(
        "heads info RUN/heads --model MODEL --measure PROMPTS --limit 4 --max-new-tokens 32"
    ),
    "train, LoRA": Command(
        "train RECIPE", f"{LORA} output=RUN-lora heads.path=RUN/heads", plan="train", makes="RUN-lora"
    ),
    "train, QLoRA": Command(
        "train RECIPE", f"{QLORA} output=RUN-qlora heads.path=RUN/heads", plan="train", makes="RUN-qlora"
    ),
    "train, full": Command("train RECIPE", FULL, plan="train", makes="RUN/train RUN/model"),
    "train, full, heads frozen": Command(
        "train RECIPE",
        f"{FULL} output=RUN-full-frozen heads.path=RUN/heads heads.train=false",
        plan="train",
        makes="RUN-full-frozen",
    ),
    "export, full": Command("export RECIPE", FULL),
    "export, QLoRA": Command("export RECIPE", f"{QLORA} output=RUN-qlora heads.path=RUN/heads"),
    "eval": Command("eval RECIPE", makes="RUN/eval"),
    "generate": Command("generate RUN/model RUN/heads --prompts PROMPTS --limit 4 --max-new-tokens 32 --alone"),
    "compare, LoRA": Command(
        "compare RECIPE",
        f"{LORA} output=RUN-compare heads.path=RUN/heads compare.arms=[ntp,caft] compare.seeds=1 compare.concepts.limit=4",
        plan="train",
        makes="RUN-compare",
    ),
    "report": Command("report RUN-compare"),
}


def recipe(model: Path, data: Path, run: Path) -> dict[str, Any]:
    """The recipe that all commands share."""
    trainer = {"per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH, "num_train_epochs": 1}
    trainer |= {"gradient_checkpointing": False, "logging_steps": 1}
    return {
        "output": str(run),
        "model": {"name": str(model)},
        "labels": {
            "prompts": str(data / "instructions/alpaca_en_demo.json"),
            **{"limit": 24, "max_new_tokens": 48, "keep_truncated": True, "batch_size": 8},
        },
        "pretrain": {**trainer, "learning_rate": 3.0e-4},
        "data": {
            "train": str(data / "gsm8k/train.jsonl"),
            "eval": str(data / "gsm8k/test.jsonl"),
            "columns": {"prompt": "question", "completion": "answer"},
            **({"chat": True} if (model / "chat_template.jinja").is_file() else {"separator": "\n"}),
            **{"limit": ROWS, "max_length": LENGTH},
        },
        "trainer": {**trainer, "learning_rate": 1.0e-5},
        "eval": {
            "tasks": ["gsm8k"],
            "data": {"gsm8k": str(data / "gsm8k/test.jsonl")},
            **{"limit": 6, "max_new_tokens": 48, "batch_size": 6},
        },
    }


def filled(text: str, run: Path, path: Path, data: Path, model: Path) -> list[str]:
    """The words of a command with its names of files."""
    names = {
        "RECIPE": str(path),
        "PROMPTS": str(data / "instructions/alpaca_en_demo.json"),
        "RUN": str(run),
        "MODEL": str(model),
    }
    words = text.split()
    for name, value in names.items():
        words = [word.replace(name, value) for word in words]
    return words


def measure(words: list[str], log: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run one command: its seconds, processor seconds, peak memory and exit status."""
    began = time.perf_counter()
    with log.open("w") as file:
        command = [sys.executable, "-m", "caftune.cli", *words]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    found: dict[str, Any] = {
        "seconds": time.perf_counter() - began,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "peak_memory_bytes": used.ru_maxrss * 1024,  # Linux: KiB
    }
    if process.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        found["failed"] = f"exit status {process.returncode}: {lines[-1][:300] if lines else 'no output'}"
    return found


def planned(words: list[str], stage: str) -> dict[str, Any]:
    """What `plan` says of the same recipe and options. It is run in this process, to import libraries once for all."""
    done = CliRunner().invoke(app, ["plan", *words, "--stage", stage, "--json"])
    if done.exit_code:
        return {"plan_failed": done.output.strip()[-300:]}
    plan = json.loads(done.stdout)
    found = {"plan": plan["estimate"]["memory"], "plan_peak_bytes": plan["needed"]}
    return {**found, "plan_libraries_bytes": plan["libraries"], "rows": plan["rows"]}


def run_all(options: argparse.Namespace) -> None:
    """All commands on the model, each written down at once."""
    model, data, target = options.model.resolve(), options.data.resolve(), options.output
    results = json.loads(target.with_suffix(".json").read_text()) if target.with_suffix(".json").is_file() else {}
    found = results.setdefault(model.name, {})
    run = options.runs.resolve() / model.name
    (run.parent / "logs").mkdir(parents=True, exist_ok=True)
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe(model, data, run), sort_keys=False))
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    environment |= {"HF_HUB_OFFLINE": "1"}
    for name in options.only or COMMANDS:
        if "seconds" in found.get(name, {}) and "failed" not in found[name] and not options.again:
            continue
        command = COMMANDS[name]
        overrides = filled(command.overrides, run, path, data, model)
        log = run.parent / "logs" / f"{model.name}-{name.replace(' ', '-').replace(',', '')}.txt"
        found[name] = {"command": f"caftune {command.words} {command.overrides}".strip()}
        if command.plan:
            found[name] |= planned([str(path), *overrides], command.plan)
        for folder in filled(command.makes, run, path, data, model):
            shutil.rmtree(folder, ignore_errors=True)
        found[name] |= measure([*filled(command.words, run, path, data, model), *overrides], log, environment)
        print(f"{model.name}, {name}: {found[name]}", file=sys.stderr, flush=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        said = (
            target.read_text().partition("## ")[0] if target.is_file() else ""
        )  # what a person wrote above the tables
        target.write_text(said + page(results))


def page(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A table for each model."""
    parts = []
    for model, found in results.items():
        lines = [f"## {model}", "", "| command | seconds | processor, s | peak, MiB | plan, MiB | plan / peak |"]
        lines += ["|---|---|---|---|---|---|", *(row(name, found[name]) for name in COMMANDS if name in found)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def row(name: str, found: dict[str, Any]) -> str:
    """One command's line."""
    if "failed" in found:
        return f"| {name} | failed: {found['failed'].replace('|', '/')} | | | | |"
    cells = [name, f"{found['seconds']:.0f}", f"{found['processor_seconds']:.0f}"]
    peak = found["peak_memory_bytes"]
    cells.append(f"{peak / 2**20:,.0f}")
    plan = found.get("plan_peak_bytes")
    cells += [f"{plan / 2**20:,.0f}", f"{plan / peak:.2f}"] if plan else [found.get("plan_failed", ""), ""]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Parse the options, run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("docs/results/real_models.md"))
    parser.add_argument("--runs", type=Path, default=Path("runs/real_models"))
    parser.add_argument("--only", nargs="+", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true")
    run_all(parser.parse_args())


if __name__ == "__main__":
    main()
