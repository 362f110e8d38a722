"""A fixed run, to compare two versions of the code bit for bit: losses, answers, labels and weights.

    python benchmarks/same_run.py FOLDER > before.json      on one commit
    python benchmarks/same_run.py FOLDER > after.json       on the other (the same folder: its path is part of the recipes)
    diff before.json after.json

On the demo's base, one thread, about two minutes: labels and heads (stage 1); a comparison of two seeds with full
fine-tuning and heads trained along; LoRA with frozen heads, adapted to the task before; and its evaluation.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

import caftune.demo
from caftune.demo.chemistry import completion, molecules, prompt

COMMAND = [sys.executable, "-c", "import torch; torch.set_num_threads(1); from caftune.cli import app; app()"]
KEPT = ("stage", "rows", "metrics", "log", "measures")  # of a line of results.jsonl
TIMES = ("runtime", "per_second", "memory")  # logged, and different each time
STAGE = {
    "gradient_checkpointing": False,
    "learning_rate": 5e-4,
    "logging_steps": 1,
    "max_steps": 12,
    "per_device_train_batch_size": 8,
}


def main() -> None:
    """Make the runs in the folder that is named, and print what they found."""
    folder = Path(sys.argv[1]).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, seed, count in (("train", 1, 200), ("test", 2, 40), ("prompts", 3, 60)):
        drawn = molecules(count, seed=seed, substituents=(2, 4))
        rows = [{"prompt": prompt(one), "completion": completion(one)} for one in drawn]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder)))
    (folder / "base").symlink_to(Path(caftune.demo.__path__[0], "base"))
    full = ["model.tuning=full", "compare.arms=[ntp, caft, shuffled_horizons]", "heads.train=true"]
    run(folder, "label")
    run(folder, "pretrain-heads")
    run(folder, "compare", f"heads.path={folder}/heads", f"output={folder}/full", "compare.seeds=2", *full)
    lora = [f"heads.path={folder}/heads", f"output={folder}/lora", "model.tuning=lora", "adapt.max_steps=4"]
    lora += ["heads.train=false"]
    run(folder, "train", *lora)
    run(folder, "eval", *lora)
    json.dump(found_in(folder), sys.stdout, indent=1, sort_keys=True)


def recipe(folder: Path) -> dict[str, Any]:
    """What all runs share."""
    return {
        "output": str(folder),
        "model": {"name": str(folder / "base")},
        "labels": {"prompts": str(folder / "prompts.jsonl"), "max_new_tokens": 60, "temperature": 0.7},
        "pretrain": {**STAGE, "learning_rate": 1e-3},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "test.jsonl"), "max_length": 192},
        "trainer": {**STAGE, "eval_strategy": "steps", "eval_steps": 6},
        "eval": {"tasks": ["exact_match"], "data": {"exact_match": str(folder / "test.jsonl")}, "max_new_tokens": 60},
    }


def run(folder: Path, command: str, *overrides: str) -> None:
    """Run a command of caftune on the recipe, with its output on stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*COMMAND, command, str(folder / "recipe.yaml"), *overrides]
    subprocess.run(words, check=True, stdout=sys.stderr, env=environment)


def found_in(folder: Path) -> dict[str, Any]:
    """The logs and measures of each run, and the hash of each file of answers, labels and weights."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if "checkpoint-" in name:
            continue
        if path.name == "results.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{key: without_times(line[key]) for key in KEPT if key in line} for line in lines]
        elif path.suffix == ".safetensors" or path.parent.parent.name == "eval" or path.name == "labels.jsonl":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def without_times(entry: Any) -> Any:
    """A log's entry without what differs between two runs of one code."""
    if isinstance(entry, dict):
        return {key: without_times(value) for key, value in entry.items() if not any(time in key for time in TIMES)}
    return [without_times(value) for value in entry] if isinstance(entry, list) else entry


if __name__ == "__main__":
    main()
