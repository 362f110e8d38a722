"""`caftune demo`: label, pretrain heads, fine-tune with and without them, evaluate, report, on a CPU in minutes.

The base (caftune/demo/base, 0.9 million parameters) reads systematic chemical names and writes SMILES; it is good at simple
molecules and poor at those of the demo's task, with two to four substituents. The demo is a `caftune compare` of one seed;
`recipe.yaml` in its folder is that comparison's recipe, ready for more seeds and arms.
"""

import shutil
import time
from importlib.util import find_spec
from pathlib import Path

from datasets import disable_progress_bars
from rich.console import Console
from transformers.utils import logging as transformers_logging

from caftune.checkpoints.cards import print_quality
from caftune.compare.runner import compare, print_comparison
from caftune.compare.summary import Comparison
from caftune.demo.chemistry import completion, molecules, prompt
from caftune.errors import CaftuneError
from caftune.files import write_lines
from caftune.pipeline.label import label_prompts
from caftune.pipeline.pretrain import pretrain_heads
from caftune.pipeline.recipe import save_recipe
from caftune.pipeline.schema import Recipe

BASE = Path(__file__).parent / "base"
TRAIN_ROWS, TEST_ROWS, PROMPTS = 1500, 400, 600
SUBSTITUENTS = (2, 4)
LONGEST_ANSWER = 100  # tokens
# The base's training text leaves out the molecules drawn with these seeds: base/provenance.json.
TRAIN_SEED, TEST_SEED, PROMPT_SEED = 1, 2, 3
_FOLDERS = ("data", "labels", "pretrain", "heads", "compare")
_MARKER = ".caftune-demo"


def demo(
    output: str, *, train_rows: int = TRAIN_ROWS, test_rows: int = TEST_ROWS, prompts: int = PROMPTS
) -> Comparison:
    """Run the whole path in the folder `output`; returns its comparison."""
    started = time.monotonic()
    console = Console()
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    folder = _fresh(Path(output))
    recipe = demo_recipe(folder)
    save_recipe(folder / "recipe.yaml", recipe.model_dump())

    _say(console, 1, "Data: chemical names and SMILES, written by the package")
    _write_data(folder / "data", train_rows, test_rows, prompts)
    _say(console, 2, f"Labels: the base answers {prompts} prompts itself")
    label_prompts(recipe)
    _say(console, 3, "Stage 1: pretrain four auxiliary heads on these answers")
    heads = pretrain_heads(recipe)
    print_quality(console, heads)
    _say(console, 4, f"Stage 2: fine-tune with and without CAFT on {train_rows} names, evaluate on {test_rows} others")
    found = compare(recipe)
    _say(console, 5, "Results")
    print_comparison(console, found)
    _write_report(console, folder)
    console.print(f"More seeds: caftune compare {folder / 'recipe.yaml'} compare.seeds=5", highlight=False)
    console.print(f"\nDone in {time.monotonic() - started:.0f} s. Everything is in {folder}.", highlight=False)
    return found


def demo_recipe(folder: Path) -> Recipe:
    """The recipe of the demo in `folder`."""
    data = folder / "data"
    common = {"per_device_train_batch_size": 16, "logging_steps": 20, "gradient_checkpointing": False}
    stage = {**common, "lr_scheduler_type": "cosine"}
    has_rdkit = find_spec("rdkit") is not None
    task = "molecules" if has_rdkit else "exact_match"
    return Recipe.model_validate(
        {
            "output": str(folder),
            "model": {"name": str(BASE)},
            "labels": {"prompts": str(data / "prompts.jsonl"), "max_new_tokens": LONGEST_ANSWER, "temperature": 0.7},
            "heads": {"count": 4},
            "pretrain": {**stage, "learning_rate": 1e-3, "num_train_epochs": 4, "save_strategy": "no"},
            "data": {"train": str(data / "train.jsonl"), "eval": str(data / "test.jsonl"), "max_length": 192},
            "trainer": {**stage, "learning_rate": 5e-4, "num_train_epochs": 2},
            "eval": {
                "tasks": [task],
                "data": {task: str(data / "test.jsonl")},
                "columns": {"smiles": "completion"} if has_rdkit else {},
                "max_new_tokens": LONGEST_ANSWER,
                "batch_size": 100,
            },
            "compare": {
                "arms": ["ntp", "caft"],
                "seeds": 1,
                "concepts": {"kind": "smiles" if has_rdkit else "words"},
                "keep_models": True,
            },
        }
    )


def _fresh(folder: Path) -> Path:
    """`folder` without the files of an earlier demo. A folder with other files is refused."""
    marker = folder / _MARKER
    if folder.exists() and not (folder.is_dir() and (marker.is_file() or not any(folder.iterdir()))):
        raise CaftuneError(
            f"{folder} must be empty or a folder of caftune demo, got other files. Use another --output."
        )
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "results.jsonl").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text("caftune demo made this folder and clears it when run again.\n")
    return folder


def _write_data(folder: Path, train_rows: int, test_rows: int, prompts: int) -> None:
    folder.mkdir()
    test = molecules(test_rows, seed=TEST_SEED, substituents=SUBSTITUENTS)
    held_out = {molecule.smiles for molecule in test}
    train = molecules(train_rows, seed=TRAIN_SEED, substituents=SUBSTITUENTS, exclude=held_out)
    others = molecules(prompts, seed=PROMPT_SEED, substituents=SUBSTITUENTS, exclude=held_out)
    write_lines(folder / "train.jsonl", [{"prompt": prompt(m), "completion": completion(m)} for m in train])
    write_lines(folder / "test.jsonl", [{"prompt": prompt(m), "completion": completion(m)} for m in test])
    write_lines(folder / "prompts.jsonl", [{"prompt": prompt(m)} for m in others])


def _write_report(console: Console, folder: Path) -> None:
    if find_spec("jinja2") is None or find_spec("matplotlib") is None:
        how = f"For a report with pictures: pip install 'caftune[report]', then caftune report {folder}"
        console.print(how, markup=False, highlight=False)
        return
    from caftune.report.render import write_report

    for path in write_report([folder], folder):
        console.print(f"Report: {path}", highlight=False, soft_wrap=True)


def _say(console: Console, number: int, what: str) -> None:
    console.print(f"\n[{number}/5] {what}", style="bold", markup=False, highlight=False)
