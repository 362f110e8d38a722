"""Ways to pretrain heads at equal processor time, on held-out text that the base wrote itself.

    python benchmarks/head_targets.py BASE PROMPTS.json [--seconds 120] [--seeds 3] [--output targets.json]

    text        the data set's own answers, the token as target
    self        answers the base wrote, the token as target (the paper's way); writing them is part of the time
    text, soft  the data set's own answers, the base's own next-token distribution as target
    self, soft  both: written by the base, its distributions as targets; writing is part of the time
    ..., top 8  soft, of each distribution the eight likeliest tokens alone

Every seed draws new training prompts, new answers and a new order; the held-out answers are the same for all. Time is the
process's own (one thread), so that other work on the machine does not count.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from caftune import CAFTConfig, CAFTTrainer
from caftune.data.forms import load_rows
from caftune.data.prompts import conversations
from caftune.generation.answers import AnswerCache, generate_labels
from caftune.generation.backends import Sampling, transformers_backend
from caftune.generation.labels import label_dataset
from caftune.training.prepare import prepare

# Whether the base writes the text, and what the targets are.
ARMS: dict[str, tuple[bool, dict[str, Any]]] = {
    "text": (False, {}),
    "self": (True, {}),
    "text, soft": (False, {"soft_targets": True}),
    "self, soft": (True, {"soft_targets": True}),
    "text, top 8": (False, {"soft_targets": True, "soft_top_k": 8}),
    "self, top 8": (True, {"soft_targets": True, "soft_top_k": 8}),
}
PROMPT_TOKENS, NEW_TOKENS, TEMPERATURE = 256, 128, 0.8
HELD_OUT, TRAINED_ON = 200, 1000
HEADS = 4
# Two-sided 95% quantiles of Student's t for 2 to 9 degrees of freedom.
T_QUANTILE = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class StopAt(TrainerCallback):
    """Stop when the process has used up its time."""

    def __init__(self, end: float) -> None:
        self.end = end

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = time.process_time() > self.end


def answers_of(base: str, rows: Any, seed: int, path: Path) -> Any:
    """The base's own answers to the rows' prompts, as a data set of tokens."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=TEMPERATURE)
    found = generate_labels(
        dict(enumerate(conversations(rows, tokenizer))),
        tokenizer,
        AnswerCache(path, sampling, seed=seed, fingerprint=base),
        lambda: transformers_backend(model, tokenizer, sampling),
        room=PROMPT_TOKENS,
    )
    return label_dataset(found.labels, keep_truncated=True).remove_columns("row")


def train(base: str, arm: str, rows: Any, held_out: Any, seed: int, seconds: float, folder: Path) -> dict[str, float]:
    """One arm and seed: its losses and accuracies on the held-out text, and the steps it came to."""
    is_own, targets = ARMS[arm]
    end = time.process_time() + seconds
    args = CAFTConfig(
        str(folder / f"{arm}-{seed}"),
        **{"pretrain_heads": True, "num_heads": HEADS, "seed": seed, "use_cpu": True, **targets},
        **{"learning_rate": 2e-3, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 20},
        max_length=PROMPT_TOKENS + NEW_TOKENS,
        **{"per_device_train_batch_size": 16, "num_train_epochs": 1000, "logging_steps": 10**6, "disable_tqdm": True},
        **{"save_strategy": "no", "report_to": [], "gradient_checkpointing": False, "dataloader_pin_memory": False},
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    data = (
        answers_of(base, rows, seed, folder / f"{arm}-{seed}.jsonl")
        if is_own
        else prepare(rows, tokenizer, args, name="train").rows
    )
    trainer = CAFTTrainer(base, args, train_dataset=data, eval_dataset=held_out, callbacks=[StopAt(end)])
    if seconds > 0:
        trainer.train()
    trainer.evaluate()
    entry = next(entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry)
    found = {name.removeprefix("eval_"): entry[name] for name in entry if name.startswith("eval_h")}
    return {**found, "steps": trainer.state.global_step}


def interval(values: list[float]) -> str:
    """Mean and half the width of its 95% interval."""
    half = T_QUANTILE[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def table(results: dict[str, list[dict[str, float]]], show: Callable[[list[float]], str]) -> str:
    """Markdown: one line an arm, losses and top-1 accuracies by horizon."""
    horizons = range(2, HEADS + 2)
    head = [*(f"h{h} loss" for h in horizons), *(f"h{h} top-1" for h in horizons), "steps"]
    lines = [f"| arm | {' | '.join(head)} |", f"|{'---|' * (len(head) + 1)}"]
    for arm, runs in results.items():
        names = [*(f"h{h}_loss" for h in horizons), *(f"h{h}_accuracy" for h in horizons)]
        cells = [show([run[name] for run in runs]) if len(runs) > 1 else f"{runs[0][name]:.3f}" for name in names]
        lines.append(f"| {arm} | {' | '.join(cells)} | {statistics.mean(run['steps'] for run in runs):.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the options, run every arm and seed, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="to share the seeds out over processes")
    parser.add_argument("--output", type=Path, default=Path("targets.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for source in options.prompts for row in load_rows(source)]
    rows = [row for row in rows if row["completion"].strip()]
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    talks = conversations(Dataset.from_list(rows), tokenizer)
    fits = [len(talk.prompt(0, [], tokenizer).ids) <= PROMPT_TOKENS for talk in talks]
    rows = [row for row, is_short in zip(rows, fits, strict=True) if is_short]
    pool = Dataset.from_list(rows).shuffle(seed=1234)
    held_out_rows, pool = pool.select(range(HELD_OUT)), pool.select(range(HELD_OUT, len(pool)))
    results: dict[str, list[dict[str, float]]] = {"copy of the last layer": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        held_out = answers_of(options.base, held_out_rows, 10**6, folder / "held-out.jsonl")
        drawn = pool.shuffle(seed=0).select(range(min(TRAINED_ON, len(pool))))
        results["copy of the last layer"].append(train(options.base, "text", drawn, held_out, 0, 0.0, folder))
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            drawn = pool.shuffle(seed=seed).select(range(min(TRAINED_ON, len(pool))))
            for arm in ARMS:
                found = train(options.base, arm, drawn, held_out, seed, options.seconds, folder)
                results.setdefault(arm, []).append(found)
                options.output.write_text(json.dumps(results, indent=2) + "\n")
                print(arm, seed, {key: round(value, 3) for key, value in found.items()}, flush=True)
    if options.seeds > 2:
        print(table(results, interval))


if __name__ == "__main__":
    main()
