"""`caftune label`: the base answers prompts, which gives the data that the heads are pretrained on."""

import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from caftune.data.forms import load_rows
from caftune.data.prompts import Conversation, conversations, is_in_conversation, refuse_long_prompts, report_second_bos
from caftune.errors import CaftuneError
from caftune.generation.answers import AnswerCache, Labelling, generate_labels
from caftune.generation.backends import Sampling
from caftune.generation.labels import write_labels
from caftune.pipeline.base_model import BaseModel, answer_backend, who_answers
from caftune.pipeline.folder import Stage
from caftune.pipeline.run import Run
from caftune.pipeline.schema import LabelsSection, Recipe


def label_prompts(recipe: Recipe) -> Path:
    """The base model answers the prompts. Returns the labels file."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CaftuneError("caftune label must run in one process, got several. Start it without a launcher.")
    run = Run.open(recipe)
    section, base = run.recipe.labels, run.base
    if section.prompts is None:
        raise CaftuneError("labels.prompts must name a file or hub id with prompts, got nothing. Add it to the recipe.")
    tokenizer = base.tokenizer()
    every, in_conversation = _read_prompts(section.prompts, section, tokenizer)
    room = _room(section, base)
    kept = _fitting(every, tokenizer, room, refuse=not section.skip_long_prompts)
    folder = Stage(run.recipe, "labels", {"prompts": section.prompts}).open()
    (folder / "labels.jsonl").unlink(missing_ok=True)  # of another recipe, perhaps
    sampling = Sampling(**section.model_dump(include={field.name for field in fields(Sampling)}))
    file = Path(section.cache or folder / "cache.jsonl")
    fingerprint = base.fingerprint + who_answers(section)
    found = generate_labels(
        kept,
        tokenizer,
        AnswerCache(file, sampling, seed=run.recipe.seed, fingerprint=fingerprint),
        lambda: answer_backend(base, section, tokenizer, sampling),
        room=room,
        ends=base.stop_tokens(tokenizer),
    )
    _refuse_failures(found, file, may_skip=section.skip_failed)
    left_out = len(every) - len(kept)
    _report(found, left_out, keeps_truncated=section.keep_truncated)
    run.folder.record(
        {
            "stage": "label",
            "rows": len(kept),
            "chat": in_conversation,
            "answers": len(found.labels),
            "asked": found.queried,
            "left_out": left_out,
            "failed": len(found.failures),
            "dropped_turns": found.dropped_turns,
            "finished_by_the_model": sum(label.finish == "stop" for label in found.labels),
            "tokens_as_chosen": sum(label.exact for label in found.labels),
        }
    )
    write_labels(found.labels, folder / "labels.jsonl")  # last: stage 1 takes them with the record of their form
    return folder / "labels.jsonl"


def _read_prompts(source: str, section: LabelsSection, tokenizer: Any) -> tuple[list[Conversation], bool]:
    """The conversations of the prompts, one a row, and whether the base is queried in a conversation."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    chat = has_template and section.chat is not False
    rows = load_rows(source, section.columns, limit=section.limit, chat=chat, place="labels.columns")
    in_conversation = is_in_conversation(rows, tokenizer, section.chat)
    every = conversations(rows, tokenizer, chat=in_conversation, system=section.system, source=source)
    tqdm.write(
        f"Prompts are given {'in a conversation' if in_conversation else 'as plain text'} (labels.chat).",
        file=sys.stderr,
    )
    report_second_bos([talk.text for talk in every], tokenizer, "labels.prompts")
    return list(every), in_conversation


def _room(section: LabelsSection, base: BaseModel) -> int:
    """The tokens that a prompt may have. A server can need one token more: see server.py."""
    room = (base.context or sys.maxsize) - section.max_new_tokens - (section.backend == "server")
    if room < 1:
        raise CaftuneError(
            f"labels.max_new_tokens must be below the model's context of {base.context} tokens, "
            f"got {section.max_new_tokens}."
        )
    return room


def _fitting(every: list[Conversation], tokenizer: Any, room: int, *, refuse: bool) -> dict[int, Conversation]:
    """The conversations with prompts that fit, by row; with `refuse`, one that does not fit is an error."""
    talks = {row: talk for row, talk in enumerate(every) if talk.turns}  # others have no turn for the model to write
    first = {row: talk.prompt(0, [], tokenizer) for row, talk in talks.items()}
    if refuse:
        refuse_long_prompts(first, room)
    return {row: talk for row, talk in talks.items() if len(first[row].ids) <= room}


def _refuse_failures(found: Labelling, cache: Path, *, may_skip: bool) -> None:
    if not found.failures:
        return
    row, reason = next(iter(sorted(found.failures.items())))
    what = f"{len(found.failures)} prompts have no answer (the first is row {row}, from 0: {reason})."
    if not (may_skip and found.labels):
        raise CaftuneError(
            f"{what} The other answers are kept "
            f"in {cache}; run the command again to query the missing ones, or set labels.skip_failed=true to leave them out."
        )
    tqdm.write(f"{what} They are left out (labels.skip_failed).", file=sys.stderr)


def _report(found: Labelling, left_out: int, *, keeps_truncated: bool) -> None:
    cut = sum(label.finish == "length" for label in found.labels)
    tqdm.write(
        f"{len(found.labels)} answers, {found.queried} of them new; {cut} cut off by labels.max_new_tokens, which the training "
        f"{'keeps' if keeps_truncated else 'leaves out unless labels.keep_truncated'}; "
        f"{found.dropped_turns} later turns dropped, {left_out} rows left out.",
        file=sys.stderr,
    )
