"""`caftune compare`: the same task by several arms and seeds, which differ only in the auxiliary losses.

    output/compare/base/eval/base/TASK.jsonl      the base's answers
    output/compare/ARM/SEED/                      one run: a run folder as `caftune train` and `caftune eval` make it
        recipe.yaml                               the whole recipe of this run
        heads/                                    control heads
        concepts.jsonl                            whole concepts of data.eval: see concept_study.py
    output/compare/comparison.json                everything a report needs: see summary.py

`ARMS` in summary.py says what the arms are. Runs of one seed start from the same weights, see the same rows in the same order,
and choose their checkpoint by the same rule. A comparison resumes: the same command again makes the missing runs, also those of
a new seed. With `only` one run is made, so that a scheduler can spread them; the last of them, or a call without `only`, writes
the comparison.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from caftune.checkpoints.heads_folder import DESCRIPTION_FILE
from caftune.compare.concept_study import study_concepts
from caftune.compare.control_heads import write_control_heads, write_untrained_heads
from caftune.compare.measures import summarise_comparison
from caftune.compare.runs import run_is_done
from caftune.compare.summary import BASE, Comparison
from caftune.core.heads import HeadsConfig
from caftune.errors import CaftuneError
from caftune.evals.concepts import read_terms
from caftune.evals.statistics import load_scipy
from caftune.files import write_lines
from caftune.pipeline import finetune, label, pretrain
from caftune.pipeline.base_model import BaseModel, free_memory
from caftune.pipeline.evaluate import asks_in_conversation, evaluate_model, read_tasks
from caftune.pipeline.folder import RunFolder, Stage
from caftune.pipeline.heads_choice import pretrained_heads
from caftune.pipeline.recipe import save_recipe
from caftune.pipeline.run import Run
from caftune.pipeline.schema import Arm, HeadsSection, Recipe
from caftune.pipeline.stage_config import (
    adapt_config,
    inherited_options,
    refuse_evaluation_without_rows,
    refuse_heads_options,
    stage_one_config,
    stage_two_config,
)
from caftune.pipeline.stage_rows import task_rows
from caftune.training.divergence import DivergedError
from caftune.training.measured_cost import device_name

_WITH_HEADS = ("caft", "caft_frozen", "beta0", "random_heads", "shuffled_horizons")  # need pretrained heads
_WITHOUT_LOSSES = (BASE, "ntp", "beta0")  # of the heads
_FROZEN = {"train": False, "lora_rank": None, "learning_rate": None, "max_grad_norm": None}  # in the section `heads`

RunArm = Arm | Literal["base"]
Files = dict[str, str | Path | None]  # by name: what a run's result depends on


def compare(recipe: Recipe, only: str | None = None) -> Comparison:
    """Make every missing run (or only `ARM/SEED` or `base`), and compare the finished runs.

    Returns:
        What comparison.json holds; after a single run (`only`) with others missing, the names of these.

    Raises:
        CaftuneError: settings that cannot be compared, no such run, or a run made from another recipe.
    """
    arms, seeds = recipe.compare.arms, range(recipe.seed, recipe.seed + recipe.compare.seeds)
    planned: dict[str, tuple[RunArm, int]] = {BASE: (BASE, recipe.seed)}
    planned |= {f"{arm}/{seed}": (arm, seed) for seed in seeds for arm in arms}
    if only is not None and only not in planned:
        raise CaftuneError(f"--only must be one of {', '.join(planned)}, got {only}.")
    recipe = Run.open(recipe).recipe
    _refuse_unfit(recipe)
    recipe = _with_form(recipe)
    heads = _ensure_heads(recipe, make=only is None) if {*arms} & {*_WITH_HEADS} else None
    data = {"train": recipe.data.train, "eval": recipe.data.eval, "terms": recipe.compare.concepts.terms}
    runs: dict[str, tuple[Recipe, Files]] = {}
    for name, (arm, seed) in planned.items():
        used = heads / DESCRIPTION_FILE if heads and arm in _WITH_HEADS else None
        runs[name] = arm_recipe(recipe, arm, seed), {**data, **recipe.eval.data, "heads": used}
        _refuse_other_recipe(*runs[name])
    if only in (None, BASE):
        _make(*runs[BASE], BASE, None)
    chosen = [name for name in planned if name != BASE and only in (None, name)]
    for number, name in enumerate(chosen, start=1):
        arm, seed = planned[name]
        tqdm.write(f"[{number}/{len(chosen)}] {arm}, seed {seed}", file=sys.stderr)
        _make(*runs[name], arm, heads)
    missing = [name for name, (run, _) in runs.items() if name != BASE and not run_is_done(Path(run.output))]
    return _unfinished(arms, only, missing) if only and missing else summarise_comparison(recipe)


def _unfinished(arms: Sequence[str], only: str, missing: Sequence[str]) -> Comparison:
    """After one run while others are missing: no statistics are computed yet."""
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    return Comparison(
        title="",
        arms=list(arms),
        seeds=[],
        missing=list(missing),
        verdict=f"{only} is done. Missing runs: {', '.join(missing[:5])}{more}.",
        remarks=["The last of them, or `caftune compare` without --only, compares all and writes comparison.json."],
    )


def _refuse_unfit(recipe: Recipe) -> None:
    """Raise CaftuneError for settings that cannot be compared, before anything runs."""
    arms = recipe.compare.arms
    scrambled = next((arm for arm in arms if arm in ("random_heads", "shuffled_horizons")), None)
    refused = [
        (
            int(os.environ.get("WORLD_SIZE", "1")) > 1,
            "caftune compare must run in one process, got several. Start single runs with --only ARM/SEED, one per process.",
        ),
        (
            recipe.eval.backend == "server",
            "eval.backend must be transformers or vllm in a comparison, got server, which serves one model. Change it.",
        ),
        (
            recipe.loss.weight == 0,
            "loss.weight must be above 0 in a comparison, got 0: arm ntp is the one without. Change it.",
        ),
        (
            not recipe.eval.tasks and recipe.data.eval is None,
            "eval.tasks or data.eval must be given, got neither: there is nothing to compare. Add one.",
        ),
        (
            recipe.model.tuning != "full" and not recipe.model.lora.merge,
            "model.lora.merge must be true in a comparison, which evaluates whole models. Change it.",
        ),
        (recipe.heads.keep, "heads.keep must be false in a comparison, which keeps no heads. Change it."),
        (
            scrambled is not None and recipe.adapt is not None,
            f"compare.arms must not hold {scrambled} with adapt, which would train its heads on the task. Remove one.",
        ),
        (
            "caft_frozen" in arms and not recipe.heads.train,
            "compare.arms must not hold caft_frozen with heads.train: false, which freezes the heads of caft too. Remove one.",
        ),
    ]
    for is_refused, message in refused:
        if is_refused:
            raise CaftuneError(message)
    for arm in arms:
        weight = {"weight": recipe.loss.weight * (arm not in _WITHOUT_LOSSES)}
        refuse_heads_options(_heads_of(recipe.heads, arm), recipe.loss.model_copy(update=weight), recipe.model)
    _check_options(recipe)
    if "shuffled_horizons" in arms and arm_recipe(recipe, "shuffled_horizons", recipe.seed).heads.count < 2:
        raise CaftuneError("compare.arms must not hold shuffled_horizons with one head. Remove it.")
    load_scipy()
    if recipe.eval.tasks:
        read_tasks(recipe.eval)
    if recipe.compare.concepts.terms is not None:
        read_terms(recipe.compare.concepts.terms)


def _check_options(recipe: Recipe) -> None:
    """Raise CaftuneError for what the trainings would refuse of their options: heads are made first, for hours maybe."""
    refuse_evaluation_without_rows(recipe)
    base, folder = BaseModel.of(recipe.model), Path(recipe.output, "compare")
    stage_two_config(arm_recipe(recipe, "ntp", recipe.seed), base, folder, None)
    if recipe.adapt is not None:
        adapt_config(
            recipe.model_copy(update={"adapt": inherited_options(recipe.adapt, recipe.trainer)}), base, folder, folder
        )
    if recipe.heads.path is None:
        stage_one_config(recipe, base, folder)


def _with_form(recipe: Recipe) -> Recipe:
    """The recipe with eval.chat=false where a chat model is evaluated on plain text; otherwise unchanged, as in older runs."""
    if not recipe.eval.tasks:
        return recipe
    tokenizer = BaseModel.of(recipe.model).tokenizer()
    if asks_in_conversation(recipe.eval, recipe.data, tokenizer) or not tokenizer.chat_template:
        return recipe
    return recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"chat": False})})


def _ensure_heads(recipe: Recipe, *, make: bool) -> Path:
    """The heads of all arms, made once; a single run does not make them, as another process might be making them."""
    folder = RunFolder(recipe.output)
    if recipe.heads.path is not None or folder.is_done("pretrain"):
        found = pretrained_heads(recipe.heads, folder)
        if recipe.heads.path is None:
            Stage(recipe, "pretrain", {"labels": recipe.head_source}).refuse_other()
        return found.folder
    compared = Path(recipe.output, "compare")
    made = [run for run in compared.glob("*/*/compare/recipe.yaml") if run.parts[-4] in _WITH_HEADS]
    if made:
        raise CaftuneError(
            f"{made[0].parents[1]} was made with other heads than those of this recipe, which do not exist yet. Set heads.path "
            f"back, use another output, or remove {compared} to repeat all runs."
        )
    if not make:
        raise CaftuneError(
            f"{Path(recipe.output, 'heads')} is missing. Run `caftune label` and `caftune pretrain-heads` before single runs."
        )
    if recipe.heads.text is None:
        label.label_prompts(recipe)
        free_memory()
    heads = pretrain.pretrain_heads(recipe)
    free_memory()
    return heads


def _refuse_other_recipe(run: Recipe, files: Files) -> None:
    """Raise CaftuneError where a finished run was made from another recipe or other files: it would be compared."""
    if not RunFolder(run.output).is_begun("compare"):
        return
    try:
        Stage(run, "compare", files).refuse_other()
    except CaftuneError as error:
        what = str(error).partition(" Remove ")[0]
        everything = next(folder for folder in Path(run.output).parents if folder.name == "compare")
        raise CaftuneError(
            f"{what} Undo the change, use another output, or remove {everything} to repeat all runs."
        ) from error


def _heads_of(section: HeadsSection, arm: RunArm) -> HeadsSection:
    """`heads` with the arm's own choice of whether they are trained; the other arms follow the recipe."""
    if arm in (BASE, "ntp", "caft_frozen"):
        return section.model_copy(update=_FROZEN)
    return section.model_copy(update={"train": True}) if arm == "no_pretraining" else section


def arm_recipe(recipe: Recipe, arm: RunArm, seed: int) -> Recipe:
    """The recipe of one run, or of the base's evaluation. Arms differ in `loss.weight` and `heads` only."""
    is_base = arm == BASE
    folder = Path(recipe.output, "compare", *((BASE,) if is_base else (arm, str(seed))))
    config = HeadsConfig(recipe.heads.count, recipe.heads.kind)
    if recipe.heads.path is not None:
        config = pretrained_heads(recipe.heads, RunFolder(recipe.output)).config
    heads: dict[str, Any] = {"path": str(folder / "heads"), "count": config.count, "kind": config.kind}
    if arm in (BASE, "ntp"):
        heads |= {"path": None}
    elif arm in ("caft", "caft_frozen", "beta0"):
        heads |= {"path": str(pretrained_heads(recipe.heads, RunFolder(recipe.output)).folder)}
    weight = 0.0 if arm in _WITHOUT_LOSSES else recipe.loss.weight
    changes = {
        "output": str(folder),
        "seed": seed,
        "heads": _heads_of(recipe.heads, arm).model_copy(update=heads),
        "loss": recipe.loss.model_copy(update={"weight": weight}),
        "adapt": None if arm == "no_pretraining" else recipe.adapt,
        # The first step is logged to check that all arms start from the same state.
        "trainer": {"logging_first_step": True, **recipe.trainer, "data_seed": _data_seed(seed)},
        "eval": recipe.eval.model_copy(update={"model": BASE if is_base else None}),
    }
    return recipe.model_copy(update=changes)


def _data_seed(seed: int) -> int:
    """Accelerate (1.15) orders epoch e by data_seed + e: neighbouring seeds would share the orders of their epochs."""
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4]) >> 1


def _make(run: Recipe, files: Files, arm: RunArm, heads: Path | None) -> None:
    """Train, evaluate and study one run (of the base: without training), unless it is done."""
    folder, results = Path(run.output), RunFolder(run.output)
    with _locked(folder):
        is_whole = results.is_begun("compare")
        Stage(run, "compare", files).open()
        if not is_whole:
            result: dict[str, Any] = {"stage": "compare", "arm": arm, "seed": run.seed, "tasks": [], "concepts": 0}
            try:
                model = run.model.name if arm == BASE else _train(run, arm, heads)
                result["tasks"] = [found.task for found in evaluate_model(run)] if run.eval.tasks else []
                result["concepts"] = _study(run, model)
            except DivergedError as error:
                # The run is done, without a model: its measures are NaN, and the other runs continue.
                tqdm.write(f"{arm}, seed {run.seed}: {error}", file=sys.stderr)
                costs = dict.fromkeys(("tokens", "flops", "seconds", "peak_memory_bytes"))
                unknown = {"metrics": {}, "costs": {**costs, "device": device_name()}, "log": []}
                results.record({"stage": "train", **unknown, **error.result, "diverged": error.step})
                result["diverged"] = error.step
            results.record(result)
        if not run.compare.keep_models:
            checkpoints = [*folder.glob("train/checkpoint-*"), *folder.glob("adapt/*")]
            for place in (folder / "model", folder / "heads", *checkpoints):
                shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Within the block no other process makes this run. A lock ends with its process, however that ends."""
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


def _train(run: Recipe, arm: RunArm, heads: Path | None) -> str:
    """Write the heads of an arm that has its own, and train, unless that is done. Returns the model's folder."""
    save_recipe(Path(run.output, "recipe.yaml"), run.model_dump())
    own, model = Path(run.output, "heads"), Path(run.output, "model")
    if arm == "no_pretraining" and not (own / DESCRIPTION_FILE).is_file():
        base, config = BaseModel.of(run.model), HeadsConfig(run.heads.count, run.heads.kind)
        write_untrained_heads(base.load(), base.tokenizer(), config, own, revision=base.revision)
        free_memory()
    elif arm in ("random_heads", "shuffled_horizons") and heads is not None:
        write_control_heads(arm, heads, own, seed=run.seed)  # again: their source may have changed
    folder = RunFolder(run.output)
    if folder.is_begun("train"):  # all arms train for the same length, so no run may change its length
        Run.open(run).train_stage().refuse_other()
    if not (folder.is_done("train") and (model / "config.json").is_file()):
        finetune.finetune_model(run)
        free_memory()
    return str(model)


def _study(run: Recipe, model: str) -> int:
    """Write how well a model predicts whole concepts of data.eval to the run's concepts.jsonl; returns their number."""
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


def print_comparison(console: Console, found: Comparison) -> None:
    """The primary measure of each task, by arm; the verdict; the remarks."""
    primary = {task.name: task.primary for task in found.tasks}
    shown = [measure for measure in found.by_measure if primary.get(measure.task, measure.name) == measure.name]
    table = Table(title=f"{len(found.seeds)} seed{'s' * (len(found.seeds) != 1)} per arm")
    table.add_column("arm")
    for measure in shown:
        table.add_column(f"{measure.task}: {measure.heading.removeprefix('★ ')}", justify="right")
    for arm in (BASE, *found.arms):
        table.add_row(arm, *(measure.mean(arm) for measure in shown))
    if shown:
        console.print(table)
    console.print(found.verdict, style="bold", highlight=False)
    for remark in found.remarks:
        console.print(remark, highlight=False)
