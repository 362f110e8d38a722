"""`caftune demo`: label, pretrain heads, fine-tune with and without them, evaluate, export, on a CPU in minutes.

The base (caftune/demo/base, 0.9 million parameters) reads systematic chemical names and writes SMILES; it is good at simple
molecules and poor at the ones asked for here, with two to four substituents. Both arms start from the same weights and see
the same rows in the same order; they differ in the auxiliary losses alone.
"""

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from caftune import pipeline
from caftune.cards import quality_table
from caftune.demo.chemistry import Molecule, completion, molecules, prompt
from caftune.generation import answer_in_batches, until_end
from caftune.recipe import Recipe, RecipeError, save_recipe

BASE = Path(__file__).parent / "base"
TRAIN_ROWS, TEST_ROWS, PROMPTS = 1500, 400, 600
SUBSTITUENTS = (2, 4)
LONGEST_ANSWER = 100  # tokens
# The base's training text leaves out the molecules drawn with these seeds: base/provenance.json.
TRAIN_SEED, TEST_SEED, PROMPT_SEED = 1, 2, 3
_FOLDERS = ("data", "stage1", "ntp", "caft")
_MARKER = ".caftune-demo"
_LEVEL = 0.05
_ARMS = {"ntp": "next-token", "caft": "CAFT"}


@dataclass(frozen=True)
class Score:
    """Answers of one model: which are right to the letter."""

    name: str
    correct: list[bool]

    @property
    def percent(self) -> float:
        """Exact match in percent."""
        return 100 * sum(self.correct) / len(self.correct)


def demo(
    output: str, *, train_rows: int = TRAIN_ROWS, test_rows: int = TEST_ROWS, prompts: int = PROMPTS
) -> list[Score]:
    """Run the whole path in the folder `output`; returns the scores of base, next-token and CAFT."""
    started = time.monotonic()
    console = Console()
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    folder = _fresh(Path(output))

    _say(console, 1, "Data: chemical names and SMILES, written by the package")
    test = _write_data(folder / "data", train_rows, test_rows, prompts)
    console.print(f"    {prompt(test[0]).replace(chr(10), '  ')}{completion(test[0])}", style="dim", highlight=False)
    _say(console, 2, f"Labels: the base answers {prompts} prompts itself")
    pipeline.label(_recipe(folder, "stage1"))
    _say(console, 3, "Stage 1: pretrain four auxiliary heads on these answers")
    pipeline.pretrain_heads(_recipe(folder, "stage1"))
    for number, arm in ((4, "ntp"), (5, "caft")):
        _say(console, number, f"Stage 2: fine-tune on {train_rows} names, {_ARMS[arm]}")
        pipeline.finetune(_recipe(folder, arm))
    _say(console, 6, f"Evaluation: {test_rows} unseen names, greedy, exact match")
    scores = [score("base", BASE, test), *(score(name, folder / arm / "model", test) for arm, name in _ARMS.items())]
    _report(console, folder, scores)
    console.print(f"\nDone in {time.monotonic() - started:.0f} s. Everything is in {folder}.", highlight=False)
    return scores


def score(name: str, model_folder: Path, test: Sequence[Molecule]) -> Score:
    """Greedy answers of the model in `model_folder`, compared to the letter."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    eos = tokenizer.eos_token_id
    greedy = GenerationConfig(
        max_new_tokens=LONGEST_ANSWER, do_sample=False, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id
    )
    asked = [tokenizer(prompt(molecule))["input_ids"] for molecule in test]
    correct = [False] * len(test)
    for index, answer in answer_in_batches(model, asked, greedy, batch_size=100):
        ids = until_end(answer, {eos}).ids
        correct[index] = tokenizer.decode(ids, skip_special_tokens=True) == completion(test[index])
    return Score(name, correct)


def verdict(ntp: Score, caft: Score) -> str:
    """Whether CAFT helped in this run: exact sign test (McNemar) over the names that only one of the two got right."""
    gained = sum(ours and not theirs for ours, theirs in zip(caft.correct, ntp.correct, strict=True))
    lost = sum(theirs and not ours for ours, theirs in zip(caft.correct, ntp.correct, strict=True))
    p_value = sign_test(gained, lost)
    if p_value >= _LEVEL:
        said = "This run cannot tell whether CAFT helped"
    else:
        said = "In this run CAFT helped" if gained > lost else "In this run CAFT did harm"
    return (
        f"{said}: {caft.percent - ntp.percent:+.1f} points; right only with CAFT {gained}, only without {lost} "
        f"(sign test, p = {p_value:.2g}). One seed: another one can turn out otherwise."
    )


def sign_test(gained: int, lost: int) -> float:
    """Two-sided exact p-value of `gained` against `lost` under equal chances."""
    total = gained + lost
    tail = sum(math.comb(total, k) for k in range(min(gained, lost) + 1)) / 2**total
    return min(1.0, 2 * tail)


def _fresh(folder: Path) -> Path:
    """`folder` without an earlier demo in it. A folder that is not empty and not a demo's is refused."""
    marker = folder / _MARKER
    if folder.exists() and not (folder.is_dir() and (marker.is_file() or not any(folder.iterdir()))):
        raise RecipeError(f"{folder} holds something else than a demo. Use another --output.")
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text("caftune demo made this folder and clears it when run again.\n")
    return folder


def _write_data(folder: Path, train_rows: int, test_rows: int, prompts: int) -> list[Molecule]:
    folder.mkdir()
    test = molecules(test_rows, seed=TEST_SEED, substituents=SUBSTITUENTS)
    held_out = {molecule.smiles for molecule in test}
    train = molecules(train_rows, seed=TRAIN_SEED, substituents=SUBSTITUENTS, exclude=held_out)
    asked = molecules(prompts, seed=PROMPT_SEED, substituents=SUBSTITUENTS, exclude=held_out)
    _write_lines(folder / "train.jsonl", [{"prompt": prompt(m), "completion": completion(m)} for m in train])
    _write_lines(folder / "test.jsonl", [{"prompt": prompt(m), "completion": completion(m)} for m in test])
    _write_lines(folder / "prompts.jsonl", [{"prompt": prompt(m)} for m in asked])
    return test


def _write_lines(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _recipe(folder: Path, arm: str) -> Recipe:
    """The recipe of one output folder; the arms differ in loss.weight and heads.path alone."""
    data = folder / "data"
    common = {
        "per_device_train_batch_size": 16,
        "logging_steps": 20,
        "gradient_checkpointing": False,
        "save_strategy": "no",
    }
    heads: dict[str, Any] = {"count": 4} if arm == "stage1" else {"path": str(folder / "stage1" / "heads")}
    recipe = Recipe.model_validate(
        {
            "output": str(folder / arm),
            "model": {"name": str(BASE)},
            "labels": {"prompts": str(data / "prompts.jsonl"), "max_new_tokens": LONGEST_ANSWER, "temperature": 0.7},
            "heads": heads,
            "pretrain": {**common, "learning_rate": 1e-3, "num_train_epochs": 4, "lr_scheduler_type": "cosine"},
            "loss": {"weight": 0.0 if arm == "ntp" else 0.01},
            "data": {"train": str(data / "train.jsonl"), "eval": str(data / "test.jsonl"), "max_length": 192},
            "trainer": {**common, "learning_rate": 5e-4, "num_train_epochs": 2, "lr_scheduler_type": "cosine"},
        }
    )
    if arm == "caft":
        save_recipe(folder / "recipe.yaml", recipe.model_dump())
    return recipe


def _say(console: Console, number: int, what: str) -> None:
    console.print(f"\n[{number}/6] {what}", style="bold", markup=False, highlight=False)


def _report(console: Console, folder: Path, scores: Sequence[Score]) -> None:
    results = {arm: _log_of(folder / arm) for arm in _ARMS}
    stage1 = _last_result(folder / "stage1", "pretrain-heads")
    console.print(Markdown("\n".join(quality_table(stage1["quality"]))))
    table = Table(title="Exact match on unseen names")
    table.add_column("model")
    table.add_column("right", justify="right")
    table.add_column("%", justify="right")
    for item in scores:
        table.add_row(item.name, f"{sum(item.correct)} of {len(item.correct)}", f"{item.percent:.1f}")
    console.print(table)
    said = verdict(scores[1], scores[2])
    console.print(said, style="bold", highlight=False)
    record = {"scores": {item.name: item.percent for item in scores}, "verdict": said}
    (folder / "scores.json").write_text(json.dumps(record, indent=2) + "\n")
    try:
        from caftune.plots import plot_losses
    except ImportError:
        console.print("Install matplotlib (pip install caftune[report]) for a picture of the losses.")
        return
    plot_losses(results["ntp"], results["caft"], folder / "losses.png")
    console.print(f"Losses: {folder / 'losses.png'}    Model: {folder / 'caft' / 'model'}", highlight=False)


def _log_of(folder: Path) -> list[dict[str, float]]:
    return _last_result(folder, "train")["log"]


def _last_result(folder: Path, stage: str) -> dict[str, Any]:
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == stage][-1]
