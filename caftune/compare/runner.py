"""`caftune compare`: the same task by several arms and seeds, that differ in the auxiliary losses alone.

    output/compare/base/eval/base/TASK.jsonl      the base's own answers
    output/compare/ARM/SEED/                      a run folder of its own: see pipeline.py and evaluation.py
        recipe.yaml                               what this run is, whole
        heads/                                    control heads
        concepts.jsonl                            whole concepts of data.eval: see concept_study.py
    output/compare/comparison.json                everything a report needs: see comparison.py

    ntp                 next-token fine-tuning, what the others are held to
    caft                the recipe as it is
    beta0               the heads attached and measured, their losses not trained on: must equal ntp
    random_heads        CAFT with heads of shuffled weights
    shuffled_horizons   CAFT with each head in the place of the next
    no_pretraining      heads as stage 1 begins with them, trained along: multi-token prediction without head pretraining

Runs of one seed begin with the same weights, see the same rows in the same order, and choose their checkpoint by the same
rule. A comparison that was stopped goes on; one more seed runs for itself alone. With `only` one run is made, so that a
scheduler can spread them; whoever comes last, or a call without `only`, puts the comparison down.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from caftune.compare.concept_study import study_concepts
from caftune.compare.control_heads import write_control_heads, write_untrained_heads
from caftune.compare.runs import run_folder, run_is_done, seeds_of
from caftune.compare.summary import summarise_comparison
from caftune.compare.verdict import BASE
from caftune.core.heads import HeadsConfig
from caftune.errors import CaftuneError
from caftune.evals.concepts import read_terms
from caftune.evals.statistics import load_scipy
from caftune.files import write_lines
from caftune.pipeline import finetune, label, pretrain
from caftune.pipeline.base_model import BaseModel, free_memory
from caftune.pipeline.evaluate import asks_in_conversation, evaluate_model, in_words, read_tasks
from caftune.pipeline.folder import RunFolder, Stage
from caftune.pipeline.heads_choice import pretrained_heads
from caftune.pipeline.recipe import save_recipe
from caftune.pipeline.run import Run
from caftune.pipeline.schema import Arm, Recipe
from caftune.pipeline.stage_config import stage_two_config
from caftune.pipeline.stage_rows import task_rows
from caftune.training.divergence import DivergedError
from caftune.training.measured_cost import device_name

_WITHOUT_HEADS = ("ntp", "no_pretraining")


def compare(recipe: Recipe, only: str | None = None) -> dict[str, Any]:
    """Make every run that is not there yet (or the one named `ARM/SEED` or `base`), and compare what is there.

    Returns:
        What comparison.json holds; after a single run (`only`) with others missing, the names of these.

    Raises:
        CaftuneError: settings that cannot be compared, no such run, or a run made from another recipe.
    """
    runs = [(arm, seed) for seed in seeds_of(recipe) for arm in recipe.compare.arms]
    chosen = _chosen(runs, only)
    recipe = Run.open(recipe).recipe
    _refuse_unfit(recipe)
    recipe = _with_form(recipe)
    if any(arm not in _WITHOUT_HEADS for arm, _ in runs):
        _ensure_heads(recipe, make=only is None)
    _refuse_other_runs(recipe, runs)
    if only in (None, BASE):
        _base(recipe)
    for number, (arm, seed) in enumerate(chosen, start=1):
        tqdm.write(f"[{number}/{len(chosen)}] {arm}, seed {seed}", file=sys.stderr)
        _run(recipe, arm, seed)
    missing = [f"{arm}/{seed}" for arm, seed in runs if not run_is_done(recipe, arm, seed)]
    if only is not None and missing:
        return _unfinished(recipe, only, missing)
    return summarise_comparison(recipe)


def _unfinished(recipe: Recipe, only: str, missing: Sequence[str]) -> dict[str, Any]:
    """The summary of a comparison after one of its runs while others are missing: no statistics are computed yet."""
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    return {
        "arms": list(recipe.compare.arms),
        "seeds": [],
        "missing": list(missing),
        "tasks": [],
        "measures": [],
        "verdict": f"{only} is done. Runs that are missing: {', '.join(missing[:5])}{more}.",
        "remarks": ["The last of them, or `caftune compare` without --only, compares all and writes comparison.json."],
    }


def _refuse_unfit(recipe: Recipe) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CaftuneError(
            "caftune compare must run in one process, got several. Start single runs with --only ARM/SEED, one a process."
        )
    if recipe.eval.backend == "server":
        raise CaftuneError(
            "eval.backend must be transformers or vllm in a comparison, got server, which serves one model. Change it."
        )
    if recipe.loss.weight == 0:
        raise CaftuneError("loss.weight must be above 0 in a comparison, got 0: arm ntp is the one without. Change it.")
    if not recipe.eval.tasks and recipe.data.eval is None:
        raise CaftuneError("eval.tasks or data.eval must be given, got neither: there is nothing to compare. Add one.")
    _refuse_arms(recipe)
    load_scipy()
    if recipe.eval.tasks:
        read_tasks(recipe.eval)
    if recipe.compare.concepts.terms is not None:
        read_terms(recipe.compare.concepts.terms)


def _with_form(recipe: Recipe) -> Recipe:
    """The recipe that says where a chat model is asked plain text: runs made before there was `eval.chat` asked otherwise."""
    if not recipe.eval.tasks:
        return recipe
    tokenizer = BaseModel.of(recipe.model).tokenizer()
    if asks_in_conversation(recipe.eval, recipe.data, tokenizer) or not tokenizer.chat_template:
        return recipe
    return recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"chat": False})})


def _refuse_arms(recipe: Recipe) -> None:
    if recipe.model.tuning != "full" and not recipe.model.lora.merge:
        raise CaftuneError("model.lora.merge must be true in a comparison, which evaluates whole models. Change it.")
    if recipe.heads.keep:
        raise CaftuneError("heads.keep must be false in a comparison, which keeps no heads. Change it.")
    scrambled = [arm for arm in recipe.compare.arms if arm in ("random_heads", "shuffled_horizons")]
    if scrambled and recipe.adapt is not None:
        raise CaftuneError(
            f"compare.arms must not hold {scrambled[0]} with adapt, which would train its heads on the task. Remove one."
        )
    if "shuffled_horizons" in recipe.compare.arms and _heads_config(recipe).count < 2:
        raise CaftuneError("compare.arms must not hold shuffled_horizons with one head. Remove it.")


def _chosen(runs: Sequence[tuple[Arm, int]], only: str | None) -> list[tuple[Arm, int]]:
    if only is None:
        return list(runs)
    named = {f"{arm}/{seed}": (arm, seed) for arm, seed in runs}
    if only != BASE and only not in named:
        raise CaftuneError(f"--only must be one of {BASE}, {', '.join(named)}, got {only}.")
    return [named[only]] if only in named else []


def _ensure_heads(recipe: Recipe, *, make: bool) -> None:
    """Heads made once for all arms; a single run does not make them, for another process might be at it."""
    folder = RunFolder(recipe.output)
    if recipe.heads.path is not None or folder.is_done("pretrain"):
        pretrained_heads(recipe.heads, folder)  # refuses what is not there
        if recipe.heads.path is None:
            Stage(recipe, "pretrain", {"labels": recipe.head_source}).refuse_other()
        return
    compared = Path(recipe.output, "compare")
    made = [run for run in compared.glob("*/*/compare/recipe.yaml") if run.parts[-4] not in (BASE, *_WITHOUT_HEADS)]
    if made:
        raise CaftuneError(
            f"{made[0].parents[1]} was made with other heads than those of this recipe, which are still to be made. Set "
            f"heads.path back, use another output, or remove {compared} to make all runs anew."
        )
    if not make:
        raise CaftuneError(
            f"{Path(recipe.output, 'heads')} is missing. Run `caftune label` and `caftune pretrain-heads` before single runs."
        )
    if recipe.heads.text is None:
        label.label_prompts(recipe)
        free_memory()
    pretrain.pretrain_heads(recipe)
    free_memory()


def _heads_config(recipe: Recipe) -> HeadsConfig:
    """How many heads of which kind: those of heads.path, or what the recipe has made."""
    if recipe.heads.path is None:
        return HeadsConfig(recipe.heads.count, recipe.heads.kind)
    return pretrained_heads(recipe.heads, RunFolder(recipe.output)).config


def _refuse_other_runs(recipe: Recipe, runs: Sequence[tuple[Arm, int]]) -> None:
    """Raise CaftuneError where a run that is done was made from another recipe or other files: it would be compared."""
    every = [(BASE, _base_recipe(recipe)), *((arm, arm_recipe(recipe, arm, seed)) for arm, seed in runs)]
    for arm, run in every:
        if RunFolder(run.output).is_begun("compare"):
            try:
                Stage(run, "compare", _files(recipe, run, arm)).refuse_other()
            except CaftuneError as error:
                what = str(error).partition(" Remove ")[0]
                everything = Path(recipe.output, "compare")
                raise CaftuneError(
                    f"{what} Undo the change, use another output, or remove {everything} to make all runs anew."
                ) from error


def _base_recipe(recipe: Recipe) -> Recipe:
    folder = Path(recipe.output, "compare", BASE)
    asked = recipe.eval.model_copy(update={"model": BASE})
    return arm_recipe(recipe, "ntp", recipe.seed).model_copy(update={"output": str(folder), "eval": asked})


def _base(recipe: Recipe) -> None:
    """Evaluate and study the base, unless it is done."""
    run = _base_recipe(recipe)
    with _alone(run):
        stage = Stage(run, "compare", _files(recipe, run, BASE))
        is_whole = RunFolder(run.output).is_begun("compare")
        stage.open()
        if not is_whole:
            _finish(run, BASE, recipe.model.name)


def arm_recipe(recipe: Recipe, arm: Arm, seed: int) -> Recipe:
    """The recipe of one run. Arms differ in `loss.weight` and `heads` alone."""
    folder = run_folder(recipe, arm, seed)
    config = _heads_config(recipe)
    heads: dict[str, Any] = {"path": str(folder / "heads"), "count": config.count, "kind": config.kind}
    if arm == "ntp":
        heads |= {"path": None, "train": False, "lora_rank": None, "learning_rate": None, "max_grad_norm": None}
    elif arm in ("caft", "beta0"):
        heads |= {"path": str(pretrained_heads(recipe.heads, RunFolder(recipe.output)).folder)}
    elif arm == "no_pretraining":
        heads |= {"train": True}
    weight = 0.0 if arm in ("ntp", "beta0") else recipe.loss.weight
    changes = {
        "output": str(folder),
        "seed": seed,
        "heads": recipe.heads.model_copy(update=heads),
        "loss": recipe.loss.model_copy(update={"weight": weight}),
        "adapt": None if arm == "no_pretraining" else recipe.adapt,
        # The first step is logged, so that one can see that all begin alike.
        "trainer": {"logging_first_step": True, **recipe.trainer, "data_seed": _data_seed(seed)},
        "eval": recipe.eval.model_copy(update={"model": None}),
    }
    return recipe.model_copy(update=changes)


def _data_seed(seed: int) -> int:
    """Accelerate (1.15) orders epoch e by data_seed + e: neighbouring seeds would share the orders of their epochs."""
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4]) >> 1


def _run(recipe: Recipe, arm: Arm, seed: int) -> None:
    """Train, evaluate and study one arm with one seed, unless it is done."""
    run = arm_recipe(recipe, arm, seed)
    folder = Path(run.output)
    with _alone(run):
        stage = Stage(run, "compare", _files(recipe, run, arm))
        is_whole = RunFolder(run.output).is_begun("compare")
        stage.open()
        if not is_whole:
            save_recipe(folder / "recipe.yaml", run.model_dump())
            _write_heads(recipe, run, arm, seed)
            try:
                _train(run)
            except DivergedError as error:
                _record_diverged(run, arm, error)
            else:
                _finish(run, arm, str(folder / "model"))
        if not recipe.compare.keep_models:
            _remove_models(folder)


@contextmanager
def _alone(run: Recipe) -> Iterator[None]:
    """Within the block no other process makes this run. A lock ends with its process, however that ends."""
    folder = Path(run.output)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise CaftuneError(f"{folder} is being made by another process. Wait for it, or start another run.") from error
    try:
        yield
    finally:
        lock.release()


def _files(recipe: Recipe, run: Recipe, arm: str) -> dict[str, str | Path | None]:
    """The files that a run's result depends on; of control heads those that they are made from."""
    data = {"train": run.data.train, "eval": run.data.eval, "terms": run.compare.concepts.terms}
    heads = None if arm in (BASE, *_WITHOUT_HEADS) else pretrained_heads(recipe.heads, RunFolder(recipe.output)).file
    return {**data, **run.eval.data, "heads": heads}


def _finish(run: Recipe, arm: str, model: str) -> None:
    results = evaluate_model(run) if run.eval.tasks else []
    studied = _study(run, model)
    tasks = [result.task for result in results]
    RunFolder(run.output).record(
        {"stage": "compare", "arm": arm, "seed": run.seed, "tasks": tasks, "concepts": studied}
    )


def _record_diverged(run: Recipe, arm: str, error: DivergedError) -> None:
    """Record a diverged run as done, without a model: its measures are NaN, and the other runs continue."""
    tqdm.write(f"{arm}, seed {run.seed}: {error}", file=sys.stderr)
    costs = {**dict.fromkeys(("tokens", "flops", "seconds", "peak_memory_bytes")), "device": device_name()}
    result = {"metrics": {}, "costs": costs, "log": [], **error.result, "diverged": error.step}
    RunFolder(run.output).record({"stage": "train", **result})
    RunFolder(run.output).record(
        {"stage": "compare", "arm": arm, "seed": run.seed, "tasks": [], "concepts": 0, "diverged": error.step}
    )


def _train(run: Recipe) -> None:
    folder = RunFolder(run.output)
    if folder.is_begun("train"):  # all arms train for the same length, so no run may change its length
        Run.open(run).train_stage().refuse_other()
    if not (folder.is_done("train") and (folder.model / "config.json").is_file()):
        finetune.finetune_model(run)
        free_memory()


def _write_heads(recipe: Recipe, run: Recipe, arm: Arm, seed: int) -> None:
    target = Path(run.output, "heads")
    if arm == "no_pretraining" and not (target / "heads.json").is_file():
        base = BaseModel.of(recipe.model)
        write_untrained_heads(base.load(), base.tokenizer(), _heads_config(recipe), target, revision=base.revision)
        free_memory()
    elif arm in ("random_heads", "shuffled_horizons"):
        source = pretrained_heads(recipe.heads, RunFolder(recipe.output)).folder
        write_control_heads(arm, source, target, seed=seed)  # again: its source may be another by now


def _study(run: Recipe, model: str) -> int:
    """How well a model predicts whole concepts of data.eval, into the run's concepts.jsonl; returns how many there are."""
    if run.data.eval is None:
        return 0
    section = run.compare.concepts
    terms = read_terms(section.terms) if section.terms is not None else ()
    opened = Run.open(run)
    base, studied = opened.base, opened.base.other(model)
    tokenizer = studied.tokenizer()
    args = stage_two_config(run, base, Path(run.output, "train"), opened.stage_two_heads)
    limits = [limit for limit in (section.limit, run.data.limit) if limit is not None]
    prepared: Any = task_rows(run.data, "eval", base, tokenizer, args, limit=min(limits, default=None))
    found = study_concepts(studied.load(), tokenizer, prepared.rows, section.kind, terms)
    write_lines(Path(run.output, "concepts.jsonl"), found)
    free_memory()
    return len(found)


def _remove_models(folder: Path) -> None:
    for place in [folder / "model", folder / "heads", *folder.glob("train/checkpoint-*"), *folder.glob("adapt/*")]:
        shutil.rmtree(place, ignore_errors=True)


def print_comparison(console: Console, found: dict[str, Any]) -> None:
    """The measures that stand for each task, by arm; the verdict; what one should know beside it."""
    primary = {task["name"]: task["primary"] for task in found["tasks"]}
    rows = found["measures"]
    names = list(dict.fromkeys((row["task"], row["measure"]) for row in rows))
    shown = [name for name in names if primary.get(name[0], name[1]) == name[1]]
    cells = {(row["task"], row["measure"], row["arm"]): in_words(row["values"]) for row in rows}
    table = Table(title=f"{len(found['seeds'])} seed{'s' * (len(found['seeds']) != 1)} an arm")
    table.add_column("arm")
    for task, measure in shown:
        table.add_column(f"{task}: {measure}", justify="right")
    for arm in (BASE, *found["arms"]):
        table.add_row(arm, *(cells.get((*name, arm), "") for name in shown))
    if shown:
        console.print(table)
    console.print(found["verdict"], style="bold", highlight=False)
    for remark in found["remarks"]:
        console.print(remark, highlight=False)
