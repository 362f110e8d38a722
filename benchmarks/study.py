"""Does concept-aware fine-tuning help? The runs and tables of docs/study/protocol.md.

    python benchmarks/study.py heads                         pretrain the heads of the models, once
    python benchmarks/study.py run calibration|control|screen|small|fine|confirm [--cells demo ...] [--scores] [--dry-run]
    python benchmarks/study.py plan                          what is still to run, with processor hours
    python benchmarks/study.py table [--output help.md]      differences, intervals, corrected p

Common options: --shared (data and small models), --models (larger ones), --folder (runs/study). Every finished run is a line of
FOLDER/results.jsonl, and is never run again; stop and start at will. A process locks its run, so the same command started twice
uses two cores. One thread a process, niced.
"""

import argparse
import copy
import fcntl
import hashlib
import json
import math
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from study_data import (
    CONCEPTS,
    MODELS,
    SCORED_BY,
    Splits,
    control_config,
    control_rows,
    smiles_for_heads,
    splits_of,
    tokenizer_of,
    tokens_of_smiles,
    write_demo_data,
)
from study_table import Line, differences, tables
from study_variants import ARMS, CONTROL, SCREENED, Arm, Concepts
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging

from caftune import CAFTConfig, CAFTTrainer
from caftune.compare.control_heads import write_control_heads, write_untrained_heads
from caftune.core.attach import detach_heads
from caftune.core.heads import HeadsConfig
from caftune.core.objective import IGNORED
from caftune.data.prompts import Prompt
from caftune.demo.run import demo_recipe
from caftune.evals.tasks import TASKS
from caftune.generation.backends import Sampling, transformers_backend
from caftune.pipeline.label import label_prompts
from caftune.pipeline.pretrain import pretrain_heads
from caftune.pipeline.schema import Recipe
from caftune.training.estimate import Estimate, estimate
from caftune.training.run_setup import Setup

ROOT = Path(__file__).parents[1]
TUNING_SEED = 300
SEEDS = {
    "calibration": range(591, 594),
    "control": range(501, 511),
    "screen": range(301, 306),
    "small": range(401, 411),
    "fine": range(421, 431),
    "confirm": range(401, 406),
}
RATES = {"small": (3e-4, 1e-3, 3e-3), "lora": (1e-3, 3e-3), "full": (1e-5, 3e-5, 1e-4)}
EPOCHS = {"small": {100: (4, 12), 400: (3, 8), 1500: (2, 4)}, "smollm2": {100: (2,), 400: (2,), 1500: (2,)}}
CONTROL_ROWS, CONTROL_RATE = 80_000, 2e-3
FINE_EPOCHS, FINE_ARMS = (4, 5, 6, 8), ("ntp", "paper", "adapt", "top", "w0.1", "w0.3")
FINE_MATCHED = {"smiles-gpt2": ("paper", "adapt", "w0.1")}  # arms with a claim of help
HEADS = 4
ADAPT_RATE = 1e-4
SCORED_EXAMPLES = 200
PAUSE = 5.0  # seconds between looks at the runs of other processes
# Processor seconds of one thread: (a run's evaluation, a training row of the baseline, factor of heads trained along);
# measured, smollm2's estimated from its operations.
SECONDS = {
    "demo": (1.4, 0.0125, 1.4),
    "smiles-gpt2": (0.8, 0.008, 1.4),
    "stories260k": (2.8, 0.030, 1.4),
    "smollm2": (20.0, 0.9, 1.0),
    "control": (1.0, 0.0006, 1.3),
}


@dataclass(frozen=True)
class Cell:
    """Runs that are tuned and compared with one another."""

    model: str
    task: str
    tuning: str
    rows: int

    @property
    def name(self) -> str:
        """Its name, as `--cells` takes the beginning of it."""
        return f"{self.model}/{self.task}/{self.tuning}/{self.rows}"


@dataclass(frozen=True)
class Run:
    """One training and its evaluation, on the validation split (tuning) or the test split."""

    cell: Cell
    arm: str
    rate: float
    epochs: float
    seed: int
    split: str = "test"

    @property
    def key(self) -> str:
        """What makes it this run."""
        return f"{self.cell.name}/{self.arm}/{self.rate:g}/{self.epochs:g}/{self.seed}/{self.split}"


Results = dict[str, dict[str, Any]]  # by the run's key


@dataclass(frozen=True)
class Stage:
    """Which arms and seeds a stage runs in which cells.

    Args:
        matched: arms for which the baseline is also run with as many operations.
        is_tuned: False: with the control's fixed settings.
        epochs: tuned over these; empty: over those of the cell's grid.
        chosen_from: cells of the screening that must be finished, since the arms are chosen by them.
    """

    cells: Sequence[Cell]
    arms: Sequence[str]
    seeds: Sequence[int]
    matched: Sequence[str] = ()
    is_tuned: bool = True
    epochs: Sequence[float] = ()
    chosen_from: Sequence[Cell] = ()


SMALL = ("demo", "smiles-gpt2", "stories260k")
ROWS = (100, 400, 1500)


def stages(name: str, results: Results) -> list[Stage]:
    """The stages of that name, in their order. Which arms are confirmed depends on the screening's results."""
    seeds = list(SEEDS[name])
    if name in ("calibration", "control"):
        control = Cell("control", MODELS["control"].tasks[0], "full", CONTROL_ROWS)
        return [Stage([control], list(CONTROL), seeds, is_tuned=False)]
    if name == "screen":
        return [Stage([*_small(SMALL[:2], rows), *_small(SMALL[2:], rows)], list(SCREENED), seeds) for rows in ROWS]
    if name == "small":
        return [_confirmation(_small(SMALL, rows), (rows,), seeds, results) for rows in ROWS]
    if name == "fine":
        return [
            Stage(_small([model], 100), FINE_ARMS, seeds, matched=FINE_MATCHED.get(model, ()), epochs=FINE_EPOCHS)
            for model in SMALL[:2]
        ]
    order = [(tuning, rows) for rows in ROWS for tuning in MODELS["smollm2"].tunings]
    found = [
        _confirmation(
            [Cell("smollm2", task, tuning, rows) for task in MODELS["smollm2"].tasks], (rows,), seeds, results
        )
        for tuning, rows in order
    ]
    few = [replace(stage, arms=stage.arms[:3], matched=()) for stage in found]  # paper and the best other
    claims = [
        replace(
            stage, cells=[cell], matched=[arm for arm in stage.arms[1:] if is_better(cell, arm, stage.arms, results)]
        )
        for stage in few
        for cell in stage.cells
    ]
    return few + claims


def _small(models: Sequence[str], rows: int) -> list[Cell]:
    return [Cell(model, MODELS[model].tasks[0], "full", rows) for model in models]


def _confirmation(cells: Sequence[Cell], rows: Sequence[int], seeds: Sequence[int], results: Results) -> Stage:
    """The arms that were best in the first two models' cells with these numbers of rows."""
    screened = [cell for count in rows for cell in _small(SMALL[:2], count)]
    chosen = choice(results, screened)
    return Stage(cells, ["ntp", *chosen], seeds, matched=chosen, chosen_from=screened)


def is_screened(results: Results, cell: Cell) -> bool:
    """Whether all runs of the cell's screening are finished."""
    seeds = set(SEEDS["screen"])
    return all(len(_losses(results, cell, arm, seeds)) == len(seeds) for arm in SCREENED)


def choice(results: Results, cells: Sequence[Cell]) -> list[str]:
    """The arms to confirm: `paper`, and the two others with the lowest mean relative difference over finished cells."""
    means = {arm: value for arm, value in ranking(results, cells).items() if arm != "paper"}
    best = sorted(means, key=means.__getitem__)[:2]
    return ["paper", *(best if best and means[best[0]] < 0 else ["w0.1"])]


def ranking(results: Results, cells: Sequence[Cell]) -> dict[str, float]:
    """Each arm's mean over the finished cells of (difference / baseline's loss), screening seeds only."""
    found: dict[str, list[float]] = {}
    seeds = set(SEEDS["screen"])
    for cell in cells:
        if not is_screened(results, cell):
            continue
        losses = {arm: _losses(results, cell, arm, seeds) for arm in SCREENED}
        mean = {arm: math.fsum(own.values()) / len(own) for arm, own in losses.items()}
        for arm, value in mean.items():
            if SCREENED[arm].role == "arm" and math.isfinite(value):
                found.setdefault(arm, []).append(value / mean["ntp"] - 1)
    most = max(map(len, found.values()), default=0)  # an arm that diverged in a cell is not ranked by the others
    return {arm: math.fsum(values) / len(values) for arm, values in found.items() if len(values) == most}


def _losses(results: Results, cell: Cell, arm: str, seeds: set[int]) -> dict[int, float]:
    lines = (line for line in results.values() if line["cell"] == asdict(cell) and line["arm"] == arm)
    return {line["seed"]: line["loss"] for line in lines if line["split"] == "test" and line["seed"] in seeds}


def epochs_of(cell: Cell) -> tuple[float, ...]:
    """The grid's epochs."""
    return EPOCHS["smollm2" if cell.model == "smollm2" else "small"][cell.rows]


def base_rates(cell: Cell) -> tuple[float, ...]:
    """The grid's learning rates."""
    return RATES[cell.tuning if cell.model == "smollm2" else "small"]


def rates_of(cell: Cell, arms: Sequence[str], results: Results) -> tuple[float, ...]:
    """The grid's rates; once it is finished for all arms, with one more at an end where the best of any arm is."""
    base = base_rates(cell)
    best = [_best(cell, arm, base, epochs_of(cell), results) for arm in arms]
    if None in best:
        return base
    found = {pair[0] for pair in best if pair is not None}
    low = (base[0] * base[0] / base[1],) if base[0] in found else ()
    high = (base[-1] * base[-1] / base[-2],) if base[-1] in found else ()
    return (*(float(f"{rate:.2g}") for rate in low), *base, *(float(f"{rate:.2g}") for rate in high))


def _best(
    cell: Cell, arm: str, rates: Sequence[float], epochs: Sequence[float], results: Results
) -> tuple[float, float] | None:
    """Rate and epochs with the lowest loss on the validation split; None: some are still to run."""
    runs = [Run(cell, arm, rate, count, TUNING_SEED, "validation") for rate in rates for count in epochs]
    if not all(run.key in results for run in runs):
        return None
    best = min(runs, key=lambda run: _finite(results[run.key]["loss"]))
    return best.rate, best.epochs


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def runs_of(stage: Stage, cell: Cell, results: Results, ratio: Callable[[str], float]) -> list[Run]:
    """The cell's runs, finished or not, as far as finished ones decide them: first tuning, then the seeds.

    Args:
        ratio: an arm's operations in an epoch over the baseline's; `adapt:ARM`: those of its adaptation.
    """
    if not stage.is_tuned:
        return [Run(cell, arm, CONTROL_RATE, 1, seed) for seed in stage.seeds for arm in stage.arms]
    arms, rates = stage.arms, rates_of(cell, _tuned_in(stage, cell), results)
    epochs = stage.epochs or epochs_of(cell)
    tuning = [Run(cell, a, r, e, TUNING_SEED, "validation") for a in arms for r in rates for e in epochs]
    found = {arm: _best(cell, arm, rates, epochs, results) for arm in arms}
    if None in found.values():
        return tuning
    pairs = {arm: pair for arm, pair in found.items() if pair is not None}
    for arm in stage.matched:
        length = (round(pairs[arm][1] * ratio(arm) + (ratio(f"adapt:{arm}") if ARMS[arm].adapts else 0), 2),)
        name = f"ntp={arm}"
        tuning += [Run(cell, name, rate, length[0], TUNING_SEED, "validation") for rate in rates]
        best = _best(cell, name, rates, length, results)
        if best is not None:
            pairs[name] = best
    return tuning + [Run(cell, arm, *pair, seed) for seed in stage.seeds for arm, pair in pairs.items()]


def _tuned_in(stage: Stage, cell: Cell) -> Sequence[str]:
    """The arms whose best rates extend the grid of a small model, which is tuned once, in the screening."""
    return list(SCREENED) if cell.model in SMALL else stage.arms


class Study:
    """Folders, loaded models, tokenized rows and finished runs."""

    def __init__(self, folder: Path, shared: Path, models: Path) -> None:
        self.folder, self.folders = folder, {"shared": shared, "models": models}
        folder.mkdir(parents=True, exist_ok=True)
        self.base = cache(self._base)
        self.splits = cache(self._splits)
        self.tokenizer = cache(lambda model: tokenizer_of(model, self.folders))
        self.estimate = cache(self._estimate)

    @property
    def file(self) -> Path:
        """The finished runs, one a line."""
        return self.folder / "results.jsonl"

    def results(self) -> Results:
        """The finished runs by key. A line that was cut off by a crash does not count."""
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        found = {}
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[entry["key"]] = entry
        return found

    def record(self, entry: dict[str, Any]) -> None:
        """Append a finished run, in one write."""
        with self.file.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            is_cut = file.tell() > 0 and not self.file.read_bytes().endswith(b"\n")
            file.write("\n" * is_cut + json.dumps(entry) + "\n")

    def _base(self, model: str, seed: int | None) -> Any:
        """The base, in evaluation mode; `seed`: of a random one."""
        if model == "control":
            set_seed(seed or 0)
            return AutoModelForCausalLM.from_config(control_config())
        quiet = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if model == "smiles-gpt2" else {}
        if model == "smollm2":
            quiet["attn_implementation"] = "eager"  # the fastest for short rows on a CPU in bfloat16
        return AutoModelForCausalLM.from_pretrained(MODELS[model].folder(self.folders), dtype=torch.float32, **quiet)

    def _splits(self, model: str, task: str) -> Splits:
        return splits_of(model, task, self.folders, self.tokenizer(model))

    def train_rows(self, cell: Cell, seed: int) -> Dataset:
        """The rows that the seed draws from the pool, in the seed's order; all of a smaller pool."""
        if cell.model == "control":
            return control_rows(cell.rows, seed, self.tokenizer("control"))
        pool = self.splits(cell.model, cell.task).train
        return pool.select(random.Random(seed).sample(range(len(pool)), min(cell.rows, len(pool))))

    def _estimate(self, cell: Cell, heads: int, trains_heads: bool, stage: str) -> tuple[Estimate, float]:
        """The estimate of a run in the cell, and its tokens per epoch."""
        ids, labels = (self.train_rows(cell, TUNING_SEED)[column] for column in ("input_ids", "labels"))
        lengths, batch = [len(row) for row in ids], MODELS[cell.model].batch
        mean = math.fsum(lengths) / len(lengths)
        batches = [lengths[start : start + batch] for start in range(0, len(lengths), batch)]
        padded = sum(max(part) * len(part) for part in batches)
        setup = Setup(
            stage=stage,  # type: ignore[arg-type]
            tuning=cell.tuning,  # type: ignore[arg-type]
            heads=heads,
            head_kind="mlp" if cell.model == "control" else "decoder",
            trains_heads=trains_heads,
            batch_size=batch,
            length=max(lengths),
            mean_length=mean,
            labelled=sum(label != IGNORED for row in labels for label in row) / sum(lengths),
            is_padded=True,
            padding=padded / sum(lengths),
            checkpointing=False,
        )
        config = (
            control_config()
            if cell.model == "control"
            else AutoConfig.from_pretrained(MODELS[cell.model].folder(self.folders))
        )
        return estimate(config, setup, lora() if cell.tuning == "lora" else None), float(sum(lengths))

    def ratio(self, cell: Cell, arm: str) -> float:
        """An arm's operations in an epoch over the baseline's; `adapt:ARM`: those of its adaptation."""
        if arm.startswith("adapt:"):
            heads, _ = self.estimate(cell, HEADS, True, "heads")
            return heads.flops.total / self.estimate(cell, 0, False, "train")[0].flops.total
        own = ARMS[arm]
        parts = [self.estimate(cell, count, own.trains_heads and count > 0, "train")[0].overhead for count in own.used]
        return math.fsum(parts) / len(parts)

    def operations(self, run: Run) -> float:
        """Operations of a run's training, by the estimate."""
        plain, tokens = self.estimate(run.cell, 0, False, "train")
        arm = run.arm.partition("=")[0]
        per_epoch = plain.flops.total * tokens
        adapted = self.ratio(run.cell, f"adapt:{arm}") if ARMS[arm].adapts else 0
        return per_epoch * (run.epochs * self.ratio(run.cell, arm) + adapted)

    def heads_folder(self, model: str) -> Path:
        """Where the pretrained heads of a base are."""
        return self.folder / "heads" / model / "heads"

    @cached_property
    def protocol(self) -> str:
        """The commit of the protocol that governs the runs."""
        command = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--", "docs/study/protocol.md"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"

    def execute(self, run: Run, *, scores: bool = False) -> dict[str, Any]:
        """Train, evaluate, and say what came out."""
        arm = ARMS[run.arm.partition("=")[0]]
        with tempfile.TemporaryDirectory() as temporary:
            self.splits(run.cell.model, run.cell.task)  # once a process, and no part of a run's cost
            started = time.process_time()
            trainer = self.trainer(run, arm, Path(temporary))
            began = time.process_time()
            done = trainer.train()
            trained = time.process_time()
            if trainer.heads is not None:  # the same evaluation for every arm
                detach_heads(trainer.backbone.model)
                trainer.heads = None
            loss = trainer.evaluate()["eval_loss"]
            ended = time.process_time()
            entry = {
                "key": run.key,
                **asdict(run),
                "loss": loss,
                "train_loss": done.training_loss,
                "steps": done.global_step,
                "rows_used": len(trainer.train_dataset),
                "flops": self.operations(run),
                "cpu_s": {"set_up": began - started, "train": trained - began, "evaluate": ended - trained},
                "protocol": self.protocol,
            }
            agreements = getattr(trainer, "agreements", None)
            if agreements:
                entry["agreement"] = [round(value, 4) for value in agreements]
            if scores and run.split == "test":
                entry["score"] = self.score(run.cell, trainer)
        return entry

    def trainer(self, run: Run, arm: Arm, folder: Path) -> CAFTTrainer:
        """The trainer of a run, with its model and rows."""
        cell = run.cell
        initial_seed = run.seed if cell.model == "control" else None
        model = copy.deepcopy(self.base(cell.model, initial_seed))
        if cell.tuning == "lora":
            model = model.to(torch.bfloat16)  # the adapters are float32
        splits, rows = self.splits(cell.model, cell.task), self.train_rows(cell, run.seed)
        heads = self.heads(run, arm, model, rows, folder)
        options = {**arm.options, "heads": None if heads is None else str(heads)}
        args = CAFTConfig(str(folder), **run_options(run), **options)
        trainer = arm.trainer(
            model,
            args,
            train_dataset=rows,
            eval_dataset=getattr(splits, run.split),
            processing_class=self.tokenizer(cell.model),
            peft_config=lora() if cell.tuning == "lora" else None,
        )
        trainer.remove_callback(PrinterCallback)
        if isinstance(trainer, Concepts):
            trainer.kind = CONCEPTS[cell.task]
        return trainer

    def heads(self, run: Run, arm: Arm, model: Any, rows: Dataset, folder: Path) -> Path | None:
        """The folder of the heads that an arm starts from."""
        source, tokenizer = self.heads_folder(run.cell.model), self.tokenizer(run.cell.model)
        if arm.heads == "none":
            return None
        if arm.heads == "untrained":
            write_untrained_heads(model, tokenizer, HeadsConfig(HEADS, "mlp"), folder / "heads", revision=None)
            return folder / "heads"
        if arm.heads == "random":
            write_control_heads("random_heads", source, folder / "heads", seed=run.seed)
            return folder / "heads"
        if not arm.adapts:
            return source
        options = {**run_options(run), "learning_rate": ADAPT_RATE, "num_train_epochs": 1}
        args = CAFTConfig(str(folder / "adapt"), pretrain_heads=True, heads=str(source), **options)
        trainer = CAFTTrainer(copy.deepcopy(model), args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        trainer.export(folder / "heads")
        return folder / "heads"

    def score(self, cell: Cell, trainer: CAFTTrainer) -> float | None:
        """The task's primary measure over the first test examples, greedy; None: the task has none."""
        if cell.task not in SCORED_BY:
            return None
        task, splits = TASKS[SCORED_BY[cell.task]], self.splits(cell.model, cell.task)
        tokenizer, model = self.tokenizer(cell.model), trainer.accelerator.unwrap_model(trainer.model).eval()
        examples = splits.examples[:SCORED_EXAMPLES]
        rows = splits.test.select(range(len(examples)))
        prompts = [
            Prompt(ids[: next(place for place, label in enumerate(labels) if label != IGNORED)])
            for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)
        ]
        room = max(sum(label != IGNORED for label in labels) for labels in rows["labels"]) + 16
        answer = transformers_backend(model, tokenizer, Sampling(room, temperature=0.0), batching="static")
        found = [0.0] * len(examples)
        with torch.no_grad():
            for number, given in answer(prompts, [0] * len(prompts)):
                text = tokenizer.decode(given.ids, skip_special_tokens=True)  # type: ignore[union-attr]
                found[number] = task.score(examples[number], text.strip())[task.primary]
        return math.fsum(found) / len(found)


def run_options(run: Run) -> dict[str, Any]:
    """The options of TRL's SFTConfig that a run has whatever its arm."""
    return {
        **{"learning_rate": run.rate, "num_train_epochs": run.epochs, "lr_scheduler_type": "cosine"},
        **{"per_device_train_batch_size": MODELS[run.cell.model].batch, "per_device_eval_batch_size": 32},
        **{"seed": run.seed, "data_seed": run.seed, "max_length": None, "bf16": run.cell.model == "smollm2"},
        **{"save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True},
        **{"gradient_checkpointing": False, "use_cpu": not torch.cuda.is_available(), "dataloader_pin_memory": False},
    }


def lora() -> LoraConfig:
    """The paper's adapters, without dropout."""
    return LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def make_heads(study: Study, model: str) -> Path:
    """Pretrain a base's heads once, with the defaults of stage 1."""
    target = study.heads_folder(model)
    if (target / "heads.json").is_file():
        return target
    folder = target.parent
    if model == "smiles-gpt2":
        return _heads_on_smiles(study, folder)
    if model == "smollm2":
        raise SystemExit(f"Put the heads of SmolLM2 (docs/heads.md) into {target}.")
    if model == "demo":
        recipe = demo_recipe(folder)
        write_demo_data(folder / "data", 600)
    else:
        recipe = Recipe.model_validate(general_recipe(model, folder, study.folders))
    label_prompts(recipe)
    return pretrain_heads(recipe)


def general_recipe(model: str, folder: Path, folders: dict[str, Path]) -> dict[str, Any]:
    """Stage 1 on a base's own answers to general instructions."""
    stage = {"per_device_train_batch_size": MODELS[model].batch, "num_train_epochs": 4, "gradient_checkpointing": False}
    return {
        "output": str(folder),
        "model": {"name": MODELS[model].folder(folders)},
        "labels": {
            "prompts": str(folders["shared"] / "data/instructions/alpaca_en_demo.json"),
            **{"limit": 900, "max_new_tokens": 128, "keep_truncated": True, "skip_long_prompts": True},
        },
        "heads": {"count": HEADS},
        "pretrain": {**stage, "save_strategy": "no"},
        "data": {"max_length": MODELS[model].length},
    }


def _heads_on_smiles(study: Study, folder: Path) -> Path:
    tokenizer, length = study.tokenizer("smiles-gpt2"), MODELS["smiles-gpt2"].length
    rows = tokens_of_smiles(smiles_for_heads(study.folders["shared"], 20_000), tokenizer, length)
    args = CAFTConfig(
        str(folder / "pretrain"),
        pretrain_heads=True,
        num_heads=HEADS,
        aux_target_share=0.25,
        **{"learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "num_train_epochs": 4},
        **{"per_device_train_batch_size": 16, "save_strategy": "no", "report_to": [], "gradient_checkpointing": False},
        **{"max_length": None, "use_cpu": not torch.cuda.is_available(), "bf16": False, "seed": 42},
    )
    trainer = CAFTTrainer(
        copy.deepcopy(study.base("smiles-gpt2", None)), args, train_dataset=rows, processing_class=tokenizer
    )
    trainer.train()
    trainer.export(folder / "heads", about={"data": {"smiles": len(rows)}})
    return folder / "heads"


def seconds_of(run: Run) -> float:
    """About how many processor seconds a run takes."""
    fixed, per_row, factor = SECONDS[run.cell.model]
    arm = ARMS[run.arm.partition("=")[0]]
    return fixed + per_row * run.cell.rows * run.epochs * (factor if arm.heads != "none" else 1.0)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Whether this process, and no other, has the lock within the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def pending(study: Study, stage: Stage, cell: Cell) -> list[Run]:
    """The runs of a cell that can be run now."""
    results = study.results()
    planned = runs_of(stage, cell, results, lambda arm: study.ratio(cell, arm))
    return [run for run in planned if run.key not in results]


def run_stage(study: Study, stage: Stage, chosen: Callable[[Cell], bool], *, scores: bool, most: int | None) -> int:
    """Run what is to run, cell by cell; runs of another process are left to it. Returns the number of runs."""
    count = 0
    if is_waiting(study, stage):
        return 0
    for cell in filter(chosen, stage.cells):
        while todo := pending(study, stage, cell):
            before = count
            for run in todo:
                if most is not None and count >= most:
                    return count
                count += run_once(study, run, scores=scores)
            if count == before:
                time.sleep(PAUSE)  # what is left of the cell is decided by runs of other processes
    return count


def lock_name(run: Run) -> str:
    """The name of the file that a process locks while it executes the run."""
    return hashlib.sha256(run.key.encode()).hexdigest()[:24]


def run_once(study: Study, run: Run, *, scores: bool) -> bool:
    """Execute and record a run, unless another process does or did. Returns whether it was executed."""
    with locked(study.folder / "locks" / lock_name(run)) as is_mine:
        if not is_mine or run.key in study.results():
            return False
        entry = study.execute(run, scores=scores)
        study.record(entry)
    print(f"{run.key}  loss {entry['loss']:.5f}  {sum(entry['cpu_s'].values()):.1f} s", flush=True)
    return True


def is_waiting(study: Study, stage: Stage) -> bool:
    """Whether the stage's arms cannot be chosen yet; says why."""
    missing = [cell.name for cell in stage.chosen_from if not is_screened(study.results(), cell)]
    if missing:
        print(f"The arms are chosen when the screening of {', '.join(missing)} is finished.")
    return bool(missing)


def plan(study: Study, names: Sequence[str], chosen: Callable[[Cell], bool]) -> str:
    """Markdown: per cell the finished and known runs, and the hours of those known and not finished."""
    results = study.results()
    lines = [
        "| stage | cell | finished | to run | later, at most | processor hours left |",
        "|---|---|---|---|---|---|",
    ]
    total = 0.0
    listed: set[tuple[str, Cell]] = set()  # a stage of equal operations has cells of a stage before it
    for name in names:
        for stage, cell in ((own, cell) for own in stages(name, results) for cell in filter(chosen, own.cells)):
            if (name, cell) in listed:
                continue
            listed.add((name, cell))
            known = runs_of(replace(stage, matched=()), cell, results, lambda _: 1.0)
            todo = [run for run in known if run.key not in results]
            later = [] if any(run.split == "test" for run in known) else _seeds_at_most(stage, cell)
            hours = math.fsum(map(seconds_of, [*todo, *later])) / 3600
            total += hours
            cells = (name, cell.name, len(known) - len(todo), len(todo), len(later), f"{hours:.1f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", f"{total:.0f} processor hours, without equal-operations rows and extended grids."])


def _seeds_at_most(stage: Stage, cell: Cell) -> list[Run]:
    """The runs on the test split, if every arm gets the most epochs of the grid."""
    rate = base_rates(cell)[0]
    return [Run(cell, arm, rate, max(epochs_of(cell)), seed) for arm in stage.arms for seed in stage.seeds]


def lines_of(results: Results) -> list[Line]:
    """The test runs, for the tables. A cell of SmolLM2 with runs outside its first grid has a table for each grid."""
    stage_of = {seed: name for name in SEEDS if name != "confirm" for seed in SEEDS[name]}
    tests = [line for line in results.values() if line["split"] == "test"]
    small = [(stage_of[line["seed"]], "", line) for line in tests if line["cell"]["model"] != "smollm2"]
    names = {Cell(**line["cell"]) for line in tests if line["cell"]["model"] == "smollm2"}
    large = [("confirm", note, line) for cell in names for note, line in _by_grid(cell, tests, results)]
    return [
        Line(
            stage=stage,
            cell=Cell(**line["cell"]).name + note,
            **{name: line[name] for name in ("arm", "rate", "epochs", "seed", "loss", "flops", "protocol")},
            seconds=line["cpu_s"]["set_up"] + line["cpu_s"]["train"],  # with the adaptation
            score=line.get("score"),
        )
        for stage, note, line in [*small, *large]
    ]


def _by_grid(cell: Cell, tests: Sequence[dict[str, Any]], results: Results) -> list[tuple[str, dict[str, Any]]]:
    """A cell's test runs at the values tuned on its first grid; then, with a note, on the extended one."""
    own = [line for line in tests if Cell(**line["cell"]) == cell]
    arms = sorted({line["arm"] for line in own if "=" not in line["arm"]})
    rates = rates_of(cell, arms, results)
    found = []
    for grid, note in ((base_rates(cell), ""), (rates, f", rates {min(rates):g} to {max(rates):g}")):
        tuned = []
        for line in own:
            lengths = epochs_of(cell) if "=" not in line["arm"] else (line["epochs"],)
            if _best(cell, line["arm"], grid, lengths, results) == (line["rate"], line["epochs"]):
                tuned.append((note, line))
        if {line["arm"] for _, line in tuned} >= {*arms} and [line for _, line in tuned] != [line for _, line in found]:
            found += tuned
    return found


def is_better(cell: Cell, arm: str, arms: Sequence[str], results: Results) -> bool:
    """Whether the arm's loss is lower than the baseline's with a corrected p of at most 0.05, all seeds finished."""
    lines = lines_of({key: line for key, line in results.items() if line["cell"] == asdict(cell)})
    rates = rates_of(cell, arms, results)
    tuned = {name: _best(cell, name, rates, epochs_of(cell), results) for name in arms}
    found = {
        name: {line.seed: line for line in lines if line.arm == name and (line.rate, line.epochs) == tuned[name]}
        for name in arms
    }
    if any(len(own) < len(SEEDS["confirm"]) for own in found.values()):
        return False
    compared = differences(found, [(name, "ntp") for name in arms if name != "ntp"])
    own = next(item for item in compared if item.arm == arm)
    return own.result is not None and own.result.difference < 0 and own.corrected <= 0.05


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options and do what the first word says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["heads", "run", "plan", "table"])
    parser.add_argument("stages", nargs="*", choices=[*SEEDS, []], help="run, plan: the stages, in order")
    parser.add_argument(
        "--cells", nargs="+", default=[""], help="only cells whose names begin so: demo, demo/names/full/400"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("CAFTUNE_SHARED", ROOT.parent / "shared")))
    parser.add_argument("--models", type=Path, default=Path(os.environ.get("CAFTUNE_MODELS", ROOT.parent / "models")))
    parser.add_argument("--scores", action="store_true", help="also the task's score of test runs, through generation")
    parser.add_argument("--most", type=int, help="stop after this many runs")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and run none")
    parser.add_argument("--output", type=Path, help="table: write it here")
    options = parser.parse_args(arguments)
    study = Study(options.folder, options.shared, options.models)

    def chosen(cell: Cell) -> bool:
        return cell.name.startswith(tuple(options.cells))

    if options.action == "table":
        text = tables(lines_of(study.results()), {arm: own.role for arm, own in ARMS.items()})
        options.output.write_text(text) if options.output else print(text)
        return
    if options.action == "plan":
        print(plan(study, options.stages or list(SEEDS), chosen))
        return
    _prepare_process()
    if options.action == "heads":
        for model in (name for name in MODELS if name != "control" and name.startswith(tuple(options.cells))):
            print(model, make_heads(study, model), flush=True)
        return
    run_stages(study, options, chosen)


def run_stages(study: Study, options: argparse.Namespace, chosen: Callable[[Cell], bool]) -> None:
    """Run the stages in their order, or print what they would run."""
    left = options.most
    for name, number in ((given, at) for given in options.stages for at in range(len(stages(given, {})))):
        stage = stages(name, study.results())[number]  # an earlier stage may have decided the arms
        if options.dry_run and not is_waiting(study, stage):
            print("\n".join(run.key for cell in filter(chosen, stage.cells) for run in pending(study, stage, cell)))
        elif not options.dry_run:
            done = run_stage(study, stage, chosen, scores=options.scores, most=left)
            left = None if left is None else left - done


def _prepare_process() -> None:
    """Quiet, niced, one thread."""
    if os.nice(0) < 10:
        os.nice(19)
    torch.set_num_threads(1)
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    main()
