"""What drafts of the heads are worth on stories260k: passes of the model per token, time, and what fine-tuning does to it.

    python benchmarks/decoding.py STORIES260K GSM8K [--openings 2000] [--epochs 10] [--output runs/decoding]

Heads are pretrained on the base's own stories (openings made of a few words, answers at temperature 0.8). Then, on other
openings, greedy and sampled, with four drafted tokens and with as many as pay: passes per token, seconds beside the model
alone (the same prompts in turn, in one process), and the share of each head's tokens that the model takes over where it took
those before. Then the base is fine-tuned on GSM8K without heads, and with CAFT where heads are frozen, adapted to the task
before, trained along, or kept by the preset (`heads.keep`): the same for questions of its test set. A stopped run goes on.
Prints Markdown. One thread.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers.utils import logging

from caftune.core.speculative import Drafting
from caftune.generation.backends import Sampling
from caftune.pipeline.finetune import finetune_model
from caftune.pipeline.generate import Writer
from caftune.pipeline.label import label_prompts
from caftune.pipeline.pretrain import pretrain_heads
from caftune.pipeline.schema import Recipe

WORDS = {
    "who": ["girl", "boy", "dog", "cat", "bird", "bear", "rabbit", "frog", "mouse", "fish", "duck", "fox"],
    "how": ["little", "big", "happy", "sad", "brave", "kind", "funny", "shy", "clever", "old"],
    "name": ["Lily", "Tom", "Max", "Mia", "Ben", "Sue", "Tim", "Anna", "Spot", "Sam", "Lucy", "Jack"],
    "what": [
        "played in the park",
        "went to the forest",
        "found a box",
        "saw a big tree",
        "had a red ball",
        "was hungry",
    ],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "next-token fine-tuning, heads of the base": {"loss": {"weight": 0.0}},
    "CAFT, heads frozen": {"heads": {"keep": True, "train": False}, "loss": {"schedule": "reflected_sine"}},
    "CAFT, heads adapted before, frozen": {
        **{"heads": {"keep": True, "train": False}, "loss": {"schedule": "reflected_sine"}},
        "adapt": {"learning_rate": 1e-3, "per_device_train_batch_size": 16},
    },
    "CAFT, heads trained along": {"heads": {"keep": True, "train": True}, "loss": {"schedule": "reflected_sine"}},
    "CAFT, preset `heads.keep`": {"heads": {"keep": True}},
}


def openings(count: int) -> list[dict[str, str]]:
    """Different beginnings of stories."""
    drawn = random.Random(0)
    found: dict[str, None] = {}
    while len(found) < count:
        words = {name: drawn.choice(choices) for name, choices in WORDS.items()}
        text = f"Once upon a time, there was a {words['how']} {words['who']} named {words['name']}. "
        found[f"{text}{words['name']} {words['what']}"] = None
    return [{"prompt": text} for text in found]


def written(path: Path, rows: Sequence[dict[str, str]]) -> str:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def line(name: str, model: str, heads: str, prompts: str, sampling: Sampling, length: int | None, limit: int) -> str:
    """One row of a table."""
    writer = Writer(model, heads, length=length)
    asked = writer.prompts([], prompts, limit)
    total, seconds, alone, same = Drafting(), 0.0, 0.0, 0
    for answer in writer.write(asked, sampling, alone=True):
        total.add(answer.drafting)
        seconds += answer.seconds
        alone += answer.seconds_alone or 0.0
        same += bool(answer.is_same)
    reached = [total.checks, *total.accepted]
    shares = [f"{a / max(min(d, r), 1):.0%}" for a, d, r in zip(total.accepted, total.drafted, reached, strict=False)]
    equal = f"{same} of {len(asked)}" if sampling.temperature == 0 else "-"
    cells = [
        f"{total.passes / total.tokens:.3f}",
        f"{total.accepted_length:.2f}",
        *shares,
        f"{seconds / alone:.2f}",
        equal,
    ]
    return f"| {name} | {' | '.join(cells)} |"


def head(first: str) -> list[str]:
    """The head of a table."""
    cells = [
        first,
        "passes a token",
        "accepted of a draft",
        *(f"h = {h}" for h in range(2, 6)),
        "time, to the model alone",
        "same text",
    ]
    return ["", f"| {' | '.join(cells)} |", "|---" * len(cells) + "|"]


def main() -> None:
    """Make heads and models, decode, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the folder of stories260k")
    parser.add_argument("gsm8k", type=Path, help="the folder with train.jsonl and test.jsonl")
    parser.add_argument("--openings", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=100, help="to decode from")
    parser.add_argument("--output", type=Path, default=Path("runs/decoding"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    rows = openings(options.openings + options.prompts)
    held = written(options.output / "held.jsonl", rows[options.openings :])
    recipe = Recipe.model_validate(
        {
            "output": str(options.output / "base"),
            "model": {"name": options.model},
            "labels": {
                "prompts": written(options.output / "openings.jsonl", rows[: options.openings]),
                **{"max_new_tokens": 200, "temperature": 0.8, "keep_truncated": True},
            },
            "pretrain": {
                **{"learning_rate": 2e-3, "num_train_epochs": options.epochs, "lr_scheduler_type": "cosine"},
                **{"per_device_train_batch_size": 16, "gradient_checkpointing": False, "logging_steps": 100},
            },
        }
    )
    heads = Path(recipe.output, "heads")
    if not (heads / "heads.json").is_file():
        label_prompts(recipe)
        pretrain_heads(recipe)
    print(*head("stories260k, other openings"), sep="\n")
    for name, temperature in (("greedy", 0.0), ("temperature 0.8", 0.8)):
        for length in (4, None):
            sampling = Sampling(max_new_tokens=200, temperature=temperature)
            kind = f"{name}, {length or 'as many as pay'}"
            print(line(kind, options.model, str(heads), held, sampling, length, options.prompts), flush=True)
    questions = [json.loads(text)["question"] for text in (options.gsm8k / "test.jsonl").read_text().splitlines()]
    asked = written(options.output / "questions.jsonl", [{"prompt": f"{text}\n"} for text in questions])
    greedy = Sampling(max_new_tokens=100, temperature=0)
    print(*head("on questions of GSM8K"), sep="\n")
    print(line("the base, before", options.model, str(heads), asked, greedy, 4, options.prompts), flush=True)
    for number, (name, changes) in enumerate(VARIANTS.items()):
        print(name, file=sys.stderr)
        folder = options.output / f"variant-{number}"
        values = {
            **{"output": str(folder), "model": {"name": options.model}},
            "data": {
                **{
                    "train": str(options.gsm8k / "train.jsonl"),
                    "columns": {"prompt": "question", "completion": "answer"},
                },
                **{"separator": "\n", "limit": 300, "max_length": 512},
            },
            "trainer": {"learning_rate": 1e-3, "num_train_epochs": 2, "per_device_train_batch_size": 16},
            **changes,
        }
        values["heads"] = {"path": str(heads), **changes.get("heads", {})}
        if not (folder / "model" / "config.json").is_file():
            finetune_model(Recipe.model_validate(values))
        own = folder / "model-heads"
        drafting = own if own.is_dir() else heads
        print(line(name, str(folder / "model"), str(drafting), asked, greedy, 4, options.prompts), flush=True)


if __name__ == "__main__":
    main()
