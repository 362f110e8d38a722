"""The stages of a run, each read top to bottom: label, pretrain_heads, measure, finetune, adapt_heads, export; and preview.

    output/
      labels/         labels.jsonl, cache.jsonl      the base's own answers
      pretrain/       checkpoints of stage 1
      heads/          heads.safetensors, heads.json, quality.json
      adapt/          heads/ and checkpoints         the same heads after an epoch on the task's data, where asked for
      train/          checkpoints of stage 2 (ordinary ones)
      model/          the result: an ordinary checkpoint
      model-heads/    heads that can draft for it, where heads.keep asks for them
      results.jsonl   base.json   data.json          a line per finished stage; the commits of a base and of data on the hub

What keeps two runs apart is in run_folder.py.
"""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from caftune.checkpoints.cards import write_model_card
from caftune.checkpoints.export import copy_adapter, export_model, load_trained, refuse_tied_adapters
from caftune.checkpoints.heads_folder import (
    PICTURE_FILE,
    QUALITY_FILE,
    describe_heads,
    file_name,
    load_heads,
    model_fingerprint,
    read_heads,
    save_heads,
    write_json,
)
from caftune.core.backbone import Backbone
from caftune.core.finite import refuse_not_finite
from caftune.core.heads import AuxiliaryHeads, HeadsConfig
from caftune.core.objective import IGNORED, horizon_targets
from caftune.data.forms import load_rows
from caftune.data.prompts import conversations, is_in_conversation, refuse_long_prompts, report_second_bos
from caftune.errors import CaftuneError
from caftune.generation.backends import Sampling, end_tokens
from caftune.generation.labels import AnswerCache, Labelling, generate_labels, write_labels
from caftune.pipeline.folder import (
    is_begun,
    is_done,
    is_main_process,
    last_checkpoint,
    open_stage,
    record,
    refuse_other_stage,
    whole_checkpoint,
    with_commit,
)
from caftune.pipeline.head_quality import measure_heads
from caftune.pipeline.plan import plan_of_run
from caftune.pipeline.recipe import Recipe
from caftune.pipeline.stage_config import (
    adapt_config,
    adapted_heads,
    answer_backend,
    context_length,
    for_prepared_rows,
    free_memory,
    load_model,
    load_tokenizer,
    lora_config,
    opening_model,
    pretrained_heads,
    quantization,
    refuse_quantised_base,
    stage_one_config,
    stage_two_config,
    stage_two_heads,
    stop_tokens,
    trained_tokenizer,
    who_answers,
    with_inherited_options,
)
from caftune.pipeline.stage_rows import describe_head_source, head_rows, head_source, prepared_task_rows
from caftune.training.config import CAFTConfig
from caftune.training.divergence import DivergedError
from caftune.training.measured_cost import Costs, memory_bytes
from caftune.training.progress import run, show_progress
from caftune.training.trained_heads import merged_state, training_record
from caftune.training.trainer import CAFTTrainer

_MEASURED_ROWS = 256


def label(recipe: Recipe) -> Path:
    """The base model answers the prompts. Returns the labels file."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CaftuneError("caftune label must run in one process, got several. Start it without a launcher.")
    recipe = with_commit(recipe)
    if recipe.labels.prompts is None:
        raise CaftuneError("labels.prompts must name a file or hub id with prompts, got nothing. Add it to the recipe.")
    tokenizer = load_tokenizer(recipe)
    rows = load_rows(
        recipe.labels.prompts,
        recipe.labels.columns,
        limit=recipe.labels.limit,
        chat=bool(getattr(tokenizer, "chat_template", None)) and recipe.labels.chat is not False,
    )
    in_conversation = is_in_conversation(rows, tokenizer, recipe.labels.chat)
    every = conversations(
        rows, tokenizer, chat=in_conversation, system=recipe.labels.system, source=recipe.labels.prompts
    )
    tqdm.write(
        f"Prompts are given {'in a conversation' if in_conversation else 'as plain text'} (labels.chat).",
        file=sys.stderr,
    )
    report_second_bos([talk.text for talk in every], tokenizer, "labels.prompts")
    talks = {row: talk for row, talk in enumerate(every) if talk.turns}  # others leave the model nothing to say
    first = {row: talk.prompt(0, [], tokenizer) for row, talk in talks.items()}
    # A server can need one token more: see server.py.
    room = (context_length(recipe) or sys.maxsize) - recipe.labels.max_new_tokens - (recipe.labels.backend == "server")
    if room < 1:
        raise CaftuneError(
            f"labels.max_new_tokens must be below the model's context of {context_length(recipe)} tokens, "
            f"got {recipe.labels.max_new_tokens}."
        )
    if not recipe.labels.skip_long_prompts:
        refuse_long_prompts(first, room)
    kept = {row: talk for row, talk in talks.items() if len(first[row].ids) <= room}
    folder = open_stage(recipe, "labels", {"prompts": recipe.labels.prompts})
    (folder / "labels.jsonl").unlink(missing_ok=True)  # of another recipe, perhaps
    sampling = Sampling(**recipe.labels.model_dump(include={field.name for field in fields(Sampling)}))
    fingerprint = model_fingerprint(recipe.model.name, recipe.model.revision) + who_answers(recipe.labels)
    file = Path(recipe.labels.cache or folder / "cache.jsonl")
    cache = AnswerCache(file, sampling, seed=recipe.seed, fingerprint=fingerprint)
    found = generate_labels(
        kept,
        tokenizer,
        cache,
        lambda: answer_backend(recipe, recipe.labels, tokenizer, sampling),
        room=room,
        ends=stop_tokens(recipe, tokenizer),
    )
    _refuse_failures(recipe, found, file)
    write_labels(found.labels, folder / "labels.jsonl")
    cut = sum(label.finish == "length" for label in found.labels)
    tqdm.write(
        f"{len(found.labels)} answers, {found.asked} of them new; {cut} cut off by labels.max_new_tokens, which the training "
        f"{'keeps' if recipe.labels.keep_truncated else 'leaves out unless labels.keep_truncated'}; "
        f"{found.dropped_turns} later turns dropped, {len(every) - len(kept)} rows left out.",
        file=sys.stderr,
    )
    record(
        recipe,
        {
            "stage": "label",
            "rows": len(kept),
            "chat": in_conversation,
            "answers": len(found.labels),
            "asked": found.asked,
            "left_out": len(every) - len(kept),
            "failed": len(found.failures),
            "dropped_turns": found.dropped_turns,
            "finished_by_the_model": sum(label.finish == "stop" for label in found.labels),
            "tokens_as_chosen": sum(label.exact for label in found.labels),
        },
    )
    return folder / "labels.jsonl"


def _refuse_failures(recipe: Recipe, found: Labelling, cache: Path) -> None:
    if not found.failures:
        return
    row, reason = next(iter(sorted(found.failures.items())))
    what = f"{len(found.failures)} prompts have no answer (the first is row {row}, from 0: {reason})."
    if recipe.labels.skip_failed and found.labels:
        tqdm.write(f"{what} They are left out (labels.skip_failed).", file=sys.stderr)
        return
    raise CaftuneError(
        f"{what} The other answers are kept "
        f"in {cache}; run the command again to ask for the missing ones, or set labels.skip_failed=true to do without."
    )


def pretrain_heads(recipe: Recipe) -> Path:
    """Stage 1: train the heads, on the labels or on heads.text. Returns the heads folder."""
    if recipe.heads.path is not None:
        raise CaftuneError(
            f"heads.path names finished heads ({recipe.heads.path}), which `caftune train` uses as they are. "
            "Remove heads.path to pretrain new ones."
        )
    recipe = with_commit(recipe)
    args = stage_one_config(recipe, Path(recipe.output, "pretrain"))
    rows, held_out, dropped = head_rows(recipe, args)
    folder = open_stage(recipe, "pretrain", {"labels": head_source(recipe)})
    heads = Path(recipe.output, "heads")
    tokenizer = load_tokenizer(recipe)
    trainer = _trainer(recipe, args, tokenizer, rows, held_out)
    show_progress(trainer, "pretrain-heads")
    run(trainer, checkpoint=last_checkpoint(folder))
    if is_main_process():
        for file in (QUALITY_FILE, PICTURE_FILE):  # of heads that were here before
            (heads / file).unlink(missing_ok=True)
    trainer.export(heads, about={"command": _command(), "data": describe_head_source(recipe, rows)})
    metrics = evaluated(trainer)
    result = {"stage": "pretrain-heads", "rows": len(rows), "metrics": metrics, **_left_out(dropped)}
    record(recipe, result)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        del trainer  # the base is loaded anew, as users of the heads will have it
        free_memory()
        record(recipe, {**result, "quality": _measure(recipe, heads, held_out)})
    return heads


def measure(recipe: Recipe) -> dict[str, Any]:
    """Measure the recipe's heads on its held-out labels. Writes quality.json (and a picture, with matplotlib) beside them.

    Heads of heads.path keep their folder as it is: their report goes to the run folder.
    """
    recipe = with_commit(recipe)
    heads = pretrained_heads(recipe)
    args = stage_one_config(recipe, Path(recipe.output, "pretrain"))
    held_out = head_rows(recipe, args).held_out
    if recipe.heads.path is None:  # what is held out must be what was
        refuse_other_stage(recipe, "pretrain", {"labels": head_source(recipe)})
    return _measure(recipe, heads, held_out)


def _measure(recipe: Recipe, heads: Path, held_out: Dataset) -> dict[str, Any]:
    """Measure heads on the held-out rows, and write quality.json."""
    model, tokenizer = load_model(recipe), load_tokenizer(recipe)
    backbone = Backbone.of(model)
    found = load_heads(heads, backbone, tokenizer, force=recipe.heads.force)
    rows = held_out.select(range(min(_MEASURED_ROWS, len(held_out))))
    eos = end_tokens(model.generation_config, tokenizer)
    quality = measure_heads(backbone, found, rows, eos=eos, seed=recipe.seed)
    quality["weights_sha256"] = describe_heads(heads)["weights_sha256"]
    folder = heads if recipe.heads.path is None else Path(recipe.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / QUALITY_FILE, quality)
    with suppress(ImportError):
        from caftune.checkpoints.quality_card import plot_quality

        plot_quality(quality, folder / PICTURE_FILE)
    return quality


def adapt_heads(recipe: Recipe) -> Path:
    """One more training of the heads, on the task's own data, before stage 2. Returns their folder.

    Raises:
        CaftuneError: under DeepSpeed, which trains one model a process.
    """
    recipe = with_inherited_options(with_commit(recipe))
    source, target = pretrained_heads(recipe), adapted_heads(recipe)
    folder = target.parent
    args = adapt_config(recipe, folder, source)
    sources = {"train": recipe.data.train, "eval": recipe.data.eval}
    open_stage(
        recipe, "adapt", {**sources, "heads": source / "heads.json"}
    )  # with another length it counts as unfinished
    if (target / "heads.json").is_file() and is_done(recipe, "adapt"):
        return target
    if args.deepspeed_plugin is not None:
        raise CaftuneError(
            "adapt cannot run under DeepSpeed. Run `caftune adapt-heads` first, without it or with FSDP2."
        )
    tokenizer = load_tokenizer(recipe)  # a separate one, as TRL changes it
    rows, evaluation, dropped = _task_sets(recipe, tokenizer, args)
    trainer = _trainer(recipe, args, tokenizer, rows, evaluation)
    show_progress(trainer, "adapt")
    run(trainer, checkpoint=last_checkpoint(folder))
    about: dict[str, Any] = {"data": {"task": file_name(str(recipe.data.train)), "rows": len(rows or ())}}
    about["adapted_from"] = describe_heads(source)["weights_sha256"]
    trainer.export(target, about={"command": _command(), **about})
    metrics = evaluated(trainer) if evaluation is not None else {}
    record(recipe, {"stage": "adapt", "rows": len(rows or ()), "metrics": metrics, **_left_out(dropped)})
    del trainer
    free_memory()  # a trainer is part of cycles, and would keep its base in memory next to stage 2's
    return target


def finetune(recipe: Recipe) -> Path:
    """Stage 2: concept-aware fine-tuning, then export. Returns the model folder."""
    recipe = with_commit(recipe)
    tokenizer = load_tokenizer(recipe)
    if recipe.data.train is None:
        raise CaftuneError("data.train must name a file or hub id, got nothing. Add it to the recipe.")
    args = stage_two_config(recipe, Path(recipe.output, "train"))
    adapter, rounding = lora_config(recipe), quantization(recipe)
    sources = {"train": recipe.data.train, "eval": recipe.data.eval}
    files = {**sources, "heads": args.heads and Path(args.heads, "heads.json")}
    if recipe.adapt is not None and recipe.loss.weight > 0:
        if is_begun(recipe, "train") and Path(str(args.heads), "heads.json").is_file():
            refuse_other_stage(recipe, "train", files, may_resume=True)  # before adapt_heads trains these heads further
        adapt_heads(recipe)
        args = stage_two_config(recipe, Path(recipe.output, "train"))  # again: accelerate's state is the last trainer's
    if is_begun(recipe, "train"):
        refuse_other_stage(recipe, "train", files, may_resume=True)  # before the data are prepared
    train, evaluation, dropped = _task_sets(recipe, tokenizer, args)
    folder = open_stage(recipe, "train", files)
    held = memory_bytes()
    trainer = _trainer(recipe, args, tokenizer, train, evaluation, peft_config=adapter, quantization_config=rounding)
    if recipe.model.tuning != "full" and recipe.model.lora.merge:
        refuse_tied_adapters(trainer.model)
    show_progress(trainer, "train")
    with Costs(trainer) as costs:
        try:
            run(trainer, checkpoint=last_checkpoint(folder))
        except DivergedError as error:
            error.result = {"rows": len(train or ()), "costs": costs.total(), "log": trainer.state.log_history}
            raise
    model = Path(recipe.output, "model")
    native = trainer.export(model, merged=recipe.model.lora.merge)
    if recipe.heads.keep and trainer.heads is not None:
        state = merged_state(trainer.heads)
        best = trainer.state.best_global_step if args.load_best_model_at_end else None
        _keep_heads(recipe, trainer.heads.config, state, args, best or trainer.state.global_step)
    metrics = evaluated(trainer) if evaluation is not None else {}  # last: bf16_full_eval rounds the weights
    copied = {"native_multi_token_modules": f"{len(native)} tensors, copied from the base unchanged"} if native else {}
    record(
        recipe,
        {"stage": "train", "rows": len(train or ()), "metrics": metrics, **copied, **_left_out(dropped)}
        | {"costs": {**costs.total(), "memory_before_bytes": held}, "plan": _plan(recipe, args, train)}
        | {"log": trainer.state.log_history},
    )
    return model


def _trainer(
    recipe: Recipe, args: CAFTConfig, tokenizer: Any, train: Any, evaluation: Any, **adaptation: Any
) -> CAFTTrainer:
    """The trainer of a stage on prepared rows; `adaptation` are the configurations of an adapter and of quantization."""
    with opening_model(recipe):
        return CAFTTrainer(
            recipe.model.name,
            for_prepared_rows(args),
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            **adaptation,
        )


def _task_sets(recipe: Recipe, tokenizer: Any, args: CAFTConfig) -> tuple[Any, Any, dict[str, Any]]:
    """The rows of data.train and data.eval (None where none are named), and what results.jsonl records of the rows left out."""
    found = {name: prepared_task_rows(recipe, name, tokenizer, args) for name in ("train", "eval")}
    train, evaluation = (part and part.rows for part in found.values())
    return train, evaluation, {name: part.facts for name, part in found.items() if part and part.dropped}


def _left_out(dropped: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of results.jsonl for rows without a trained token within max_length, by data set; empty if there are none."""
    return {"dropped": dropped} if dropped else {}


def _keep_heads(recipe: Recipe, config: HeadsConfig, state: Mapping[str, Tensor], args: CAFTConfig, steps: int) -> None:
    """Write heads as those of the exported model, for which they can draft."""
    if is_main_process():
        refuse_not_finite(
            state, "The heads to keep", "Train them with a lower heads.learning_rate, or set heads.keep=false."
        )
        model, trust = str(Path(recipe.output, "model")), args.trust_remote_code
        backbone = Backbone.of(load_trained(model, model, trust_remote_code=trust))
        heads = AuxiliaryHeads.build(backbone, config)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust)
        about = {**training_record(args, steps), "command": _command()}
        folder = Path(recipe.output, "model-heads")
        save_heads(folder, heads, backbone, tokenizer, training=about, state=state)
        tqdm.write(f"Heads that draft for it: {folder} (caftune generate {model} {folder} PROMPT)", file=sys.stderr)


def _plan(recipe: Recipe, args: CAFTConfig, rows: Any) -> dict[str, float] | None:
    """What the plan says of this run, to be shown beside what it was. Made at its end, so that nothing waits for it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return None  # neither the plan nor the count of operations is of several processes
    try:
        return plan_of_run(recipe, args, rows)
    except Exception as error:  # whatever a model not planned for brings up, the run is done and must be recorded
        tqdm.write(f"This run has no plan beside its costs: {error}", file=sys.stderr)
        return None


def export(recipe: Recipe, checkpoint: str | None = None) -> Path:
    """Write a checkpoint of stage 2 (by default the one `train` would) as an ordinary model. Returns its folder."""
    recipe = with_commit(recipe)
    folder = Path(recipe.output, "train")
    source = whole_checkpoint(recipe, folder, checkpoint)
    if Path(source).resolve().parent != folder.resolve():
        raise CaftuneError(f"{source} must be one of {folder}/checkpoint-*: it belongs to another run. Use its recipe.")
    heads = stage_two_heads(recipe)
    files = {"train": recipe.data.train, "eval": recipe.data.eval}
    refuse_other_stage(recipe, "train", {**files, "heads": heads and heads / "heads.json"})
    target = Path(recipe.output, "model")
    _write_model(recipe, source, target)
    steps = int(Path(source).name.rpartition("-")[2])
    description = describe_heads(heads) if heads is not None else None
    args = stage_two_config(recipe, folder)
    if recipe.heads.keep and heads is not None and description is not None:
        own = Path(source, "heads")
        state = read_heads(own if own.is_dir() else heads)
        _keep_heads(recipe, HeadsConfig(len(description["horizons"]), description["kind"]), state, args, steps)
    write_model_card(target, recipe.model.name, args, steps, heads=description)
    record(recipe, {"stage": "export", "checkpoint": Path(source).name})
    return target


def _write_model(recipe: Recipe, source: str, target: Path) -> None:
    """A checkpoint as `train` writes its result: a whole model, or the adapter alone where the recipe says so."""
    tokenizer, rows = trained_tokenizer(recipe, source)
    name, revision = recipe.model.name, recipe.model.revision
    if recipe.model.tuning != "full" and not recipe.model.lora.merge:
        copy_adapter(source, target, tokenizer, base_name=name)
        return
    refuse_quantised_base(recipe)
    trust = bool(recipe.model.trust_remote_code)
    is_adapter = Path(source, "adapter_config.json").is_file()
    with opening_model(recipe, None if is_adapter else source):
        model = load_trained(source, name, revision, vocab_size=rows, tokenizer=tokenizer, trust_remote_code=trust)
    export_model(model, target, tokenizer, base_name=name, base_revision=revision)


def preview(recipe: Recipe, count: int = 3) -> Iterator[tuple[list[str], list[bool], dict[int, list[str]]]]:
    """For the first rows of data.train: the tokens, which of them are trained on, and each horizon's target per position."""
    tokenizer = load_tokenizer(recipe)
    args = stage_two_config(recipe, Path(recipe.output, "train"), heads=None, aux_weight=0.0)
    found = prepared_task_rows(recipe, "train", tokenizer, args, limit=count, is_whole=False)
    if found is None:
        raise CaftuneError("data.train must name a file or hub id, got nothing. Add it to the recipe.")
    count = len(describe_heads(recipe.heads.path)["horizons"]) if recipe.heads.path else recipe.heads.count
    horizons = range(1, count + 2)
    for row in found.rows.with_format("torch"):
        labels = row["labels"][None]
        targets = {h: horizon_targets(labels, h)[0].tolist() for h in horizons}
        yield (
            tokenizer.convert_ids_to_tokens(row["input_ids"].tolist()),
            [token != IGNORED for token in row["labels"].tolist()],
            {h: [tokenizer.convert_ids_to_tokens(t) if t != IGNORED else "" for t in targets[h]] for h in horizons},
        )


def _command() -> str:
    """The command line, without the folder that the program lies in and without addresses of servers, which may hold keys."""
    words = [word for word in sys.argv[1:] if not word.startswith("labels.server.")]
    return shlex.join([Path(sys.argv[0]).name, *words])


def evaluated(trainer: CAFTTrainer) -> dict[str, float]:
    """The losses and accuracies of an evaluation, without timings."""
    metrics = trainer.evaluate()
    entry = next(entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry)
    names = [name for name in {**metrics, **entry} if name.endswith(("_loss", "_accuracy"))]
    return {name.removeprefix("eval_"): {**metrics, **entry}[name] for name in names}
