"""The folder of a run: which stage is in it, made from what, and what came out.

A stage folder holds `recipe.yaml`, the sections of the recipe and the hashes of the files the stage was made from, and
`provenance.json`. The same command on the same recipe and files goes on where it stopped; on others it refuses.
"""

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from caftune.checkpoints.fingerprint import commit_of
from caftune.checkpoints.heads_folder import DESCRIPTION_FILE
from caftune.checkpoints.opening import opening
from caftune.checkpoints.provenance import package_version, provenance
from caftune.data.readers import HubSource, data_commit, hub_source
from caftune.errors import CaftuneError
from caftune.files import file_sha256, read_json, write_json, write_text
from caftune.pipeline.recipe import Recipe, first_difference, parse_recipe, save_recipe
from caftune.pipeline.recipe_text import read_yaml
from caftune.training.resumption import Changes, refuse_checkpoint, remove_allowed_changes

_RESULTS = {"pretrain": "pretrain-heads"}  # names of results, where they are not those of the folders
# How a kept recipe writes `data.max_length: null`; null in a kept recipe of an older version means today's `auto`.
_NOT_CUT = "not cut"
_COMMIT = re.compile(r"[0-9a-f]{40}")
# The sections of the recipe that each stage's result depends on.
_DEPENDS_ON: dict[str, Sequence[str]] = {
    "labels": ("seed", "model.name", "model.revision", "labels"),
    "pretrain": (
        *("seed", "model.name", "model.revision", "loss.decay", "pretrain"),
        *(f"heads.{key}" for key in ("count", "kind", "targets", "top_k", "text", "held_out")),
        *("labels.keep_truncated", "labels.columns", "labels.limit"),
    ),
    "adapt": ("seed", "model.name", "model.revision", "heads.path", "heads.force", "loss.decay", "data", "adapt"),
    "train": ("seed", "model", "heads", "loss", "data", "adapt", "trainer"),
    "compare": (
        *("seed", "model", "heads", "loss", "data", "adapt", "trainer", "compare.concepts"),
        *(f"eval.{key}" for key in ("tasks", "data", "columns", "limit", "runs", "temperature", "top_p", "top_k")),
        *("eval.max_new_tokens", "eval.chat", "eval.structures", "eval.backend", "eval.vllm"),
    ),
}


def with_commit(recipe: Recipe) -> Recipe:
    """The recipe with its base and data on the hub pinned to the commits of this output's first command, as `main` may move.

    The base's is kept in output/base.json, until the recipe names another base or revision; those of the data are kept in
    output/data.json, by repository and revision, and become part of the sources' names.
    """
    return _with_data_commits(_with_base_commit(recipe))


def _with_base_commit(recipe: Recipe) -> Recipe:
    name, revision = recipe.model.name, recipe.model.revision
    path = Path(recipe.output, "base.json")
    kept = read_json(path)
    if Path(name).is_dir() or (revision is not None and revision == kept.get("commit")):
        return recipe
    if [name, revision] != [kept.get("name"), kept.get("revision")]:
        with opening(name, revision=revision):
            kept = {"name": name, "revision": revision, "commit": commit_of(name, revision, fetch=True)}
            if is_main_process():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, kept)
    commit = kept.get("commit") if kept.get("name") == name else None
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": commit or revision})})


def _with_data_commits(recipe: Recipe) -> Recipe:
    path = Path(recipe.output, "data.json")
    kept = read_json(path)
    known = dict(kept)

    def pinned(source: str | None) -> str | None:
        found = hub_source(source) if source is not None else None
        if found is None or found.commit is not None:
            return source
        key = str(HubSource(found.repository, found.revision))
        commit = known.get(key) or data_commit(found)
        if commit is None:
            return source  # reading the rows says why
        known[key] = commit
        return str(replace(found, revision=commit))

    sections = {"data": ("train", "eval"), "labels": ("prompts",), "heads": ("text",)}
    changes: dict[str, Any] = {}
    for name, keys in sections.items():
        section = getattr(recipe, name)
        found = {key: pinned(getattr(section, key)) for key in keys}
        changed = {key: source for key, source in found.items() if source != getattr(section, key)}
        changes |= {name: section.model_copy(update=changed)} if changed else {}
    tasks = {task: pinned(source) for task, source in recipe.eval.data.items()}
    changes |= {"eval": recipe.eval.model_copy(update={"data": tasks})} if tasks != recipe.eval.data else {}
    if known != kept and is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, known)
    return recipe.model_copy(update=changes) if changes else recipe


def open_stage(recipe: Recipe, stage: str, files: Mapping[str, str | Path | None]) -> Path:
    """The folder of a stage, made ready: it is new, or it belongs to this very recipe and these very files.

    Options that do not affect the steps so far may differ (see resumption.py): they are reported and recorded.
    A folder in which nothing was done yet (its stage was refused, say) takes on the recipe it is given, and so does that of
    the labels, whose answers are kept by what was asked. With several
    processes the main one makes it, and the others find it made.

    Raises:
        CaftuneError: the folder holds a stage of another recipe, or other files; or the training is to be longer and has no
            checkpoint.
    """
    from accelerate import PartialState

    _refuse_unfinished_heads(recipe, files.get("heads"))
    with PartialState().main_process_first():
        folder = Path(recipe.output, stage)
        if stage != "labels" and is_begun(recipe, stage):  # labels are kept by what was asked
            changes = refuse_other_stage(recipe, stage, files, may_resume=True)
            _adopt_changes(recipe, stage, files, changes)
        elif (
            not (folder / "recipe.yaml").is_file()
            and folder.exists()
            and any(not file.name.startswith(".") for file in folder.iterdir())
        ):
            raise CaftuneError(
                f"{folder} must be empty or a folder of caftune, and holds other files. Use another output."
            )
        elif is_main_process():
            folder.mkdir(parents=True, exist_ok=True)
            _replace_result(recipe, _RESULTS.get(stage, stage), [])  # of a folder that was removed
            _keep_identity(folder, _identity(recipe, stage, files))  # first: it makes the folder ours
            (folder / "provenance.json").unlink(missing_ok=True)  # of the recipe before, if there was one
        if is_main_process() and not (folder / "provenance.json").is_file():
            made = provenance(_present(files)) | _heads_used(files.get("heads"))
            made["data"] |= {name: str(path) for name, path in files.items() if path and hub_source(str(path))}
            write_json(folder / "provenance.json", made)
    return folder


def _refuse_unfinished_heads(recipe: Recipe, description: str | Path | None) -> None:
    """Heads of before, where stage 1 was begun anew since, and has not come to its end."""
    stage, own = Path(recipe.output, "pretrain"), Path(recipe.output, "heads", DESCRIPTION_FILE)
    is_own = description is not None and Path(description) == own
    if is_own and (stage / "recipe.yaml").is_file() and not is_done(recipe, "pretrain"):
        raise CaftuneError(
            f"{stage} is not finished, so {own.parent} is of another recipe. Run `caftune pretrain-heads` first."
        )


def _heads_used(description: str | Path | None) -> dict[str, Any]:
    """Which heads a stage starts from, in words that can be checked: the hash of their weights."""
    if description is None or not Path(description).is_file():
        return {}
    found = json.loads(Path(description).read_text(encoding="utf-8"))
    return {"heads": {"folder": str(Path(description).parent), **{k: found[k] for k in ("weights_sha256", "training")}}}


def is_begun(recipe: Recipe, stage: str) -> bool:
    """Whether something was done in the folder of a stage: a checkpoint, or its result."""
    folder = Path(recipe.output, stage)
    work = any(folder.glob("checkpoint-*")) or (folder / "heads").is_dir()
    return (folder / "recipe.yaml").is_file() and (is_done(recipe, stage) or work)


def is_done(recipe: Recipe, stage: str) -> bool:
    """Whether the stage has a result, and its folder is still there."""
    results = Path(recipe.output, "results.jsonl")
    done = {json.loads(line)["stage"] for line in results.read_text().splitlines()} if results.is_file() else set()
    return _RESULTS.get(stage, stage) in done and Path(recipe.output, stage, "recipe.yaml").is_file()


def _adopt_changes(recipe: Recipe, stage: str, files: Mapping[str, str | Path | None], changes: Changes) -> None:
    """Resume a stage with changed options: report them, and record them in provenance.json."""
    folder = Path(recipe.output, stage)
    if changes.length and last_checkpoint(folder) is None:
        raise CaftuneError(
            f"{folder} must hold a checkpoint to resume from ({', '.join(changes.length)}), and holds none. Remove {folder} to "
            "train from the start."
        )
    if changes.length:
        refuse_checkpoint(Path(str(last_checkpoint(folder))), _options_of(recipe, stage))
    if not list(changes) or not is_main_process():
        return
    tqdm.write(f"Changed since {folder} was begun: {', '.join(changes)}.", file=sys.stderr)
    if changes.length:
        _replace_result(recipe, _RESULTS.get(stage, stage), [])  # it counts as unfinished again
    _keep_identity(folder, _identity(recipe, stage, files))
    path = folder / "provenance.json"
    made = read_json(path) or provenance(_present(files))
    now = provenance()
    entry = {"changes": list(changes), **{key: now[key] for key in ("command", "time", "versions")}}
    write_json(path, {**made, "went_on": [*made.get("went_on", []), entry]})


def _options_of(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The trainer options of a stage (`adapt` has one epoch by default)."""
    options = getattr(recipe, "trainer" if stage == "train" else stage) or {}
    return {"num_train_epochs": 1, **options} if stage == "adapt" else options


def refuse_other_stage(
    recipe: Recipe, stage: str, files: Mapping[str, str | Path | None], *, may_resume: bool = False
) -> Changes:
    """Raise CaftuneError where the folder of a stage was made from another recipe or other files.

    Returns:
        The allowed changes; with `may_resume` also changes of the training's length.
    """
    folder, name = Path(recipe.output, stage), _RESULTS.get(stage, stage)
    if not (folder / "recipe.yaml").is_file():
        raise CaftuneError(f"{folder} is missing. Run `caftune {name}` first.")
    kept, wanted = kept_identity(folder, stage), _identity(recipe, stage, files)
    forget_unknown_commit(kept, wanted)
    if "data.max_length" not in kept:  # the folder is older than this being kept
        wanted.pop("data.max_length", None)
    changes = remove_allowed_changes(kept, wanted, stage)
    difference = first_difference(kept, wanted)
    if difference and difference.startswith("files."):
        difference = f"the contents of {difference.partition(':')[0].removeprefix('files.')} changed"
    if difference:
        raise CaftuneError(
            f"{folder} holds the {stage} stage of another recipe ({difference}). Remove {folder}, or use another output "
            "(heads made here serve there: heads.path)."
        )
    if changes.length and not may_resume:
        raise CaftuneError(
            f"{folder} holds the {stage} stage of another recipe ({changes.length[0]}). Run `caftune {name}` to continue to "
            "that length, or set it back."
        )
    return changes


def kept_identity(folder: Path, stage: str) -> dict[str, Any]:
    """The recipe's sections and the files that a stage folder was made from. Keys newer than the folder have their defaults.

    Raises:
        CaftuneError: a key or a value that this version does not know.
    """
    file = folder / "recipe.yaml"
    kept = read_yaml(file)
    nested: dict[str, Any] = {"output": str(folder.parent)}
    for place, value in kept.items():
        *sections, key = place.split(".")
        if place != "files":
            _section(nested, sections)[key] = value
    _replace_length(nested.get("data"), {None: "auto", _NOT_CUT: None})
    try:
        recipe = parse_recipe(nested)
    except CaftuneError as error:
        raise CaftuneError(
            f"{file} must be a recipe that caftune {package_version('caftune')} can read: {error} If a newer version wrote it, "
            "update caftune; else use another output."
        ) from error
    found = {**_sections(recipe, stage), "files": kept.get("files") or {}}
    if "data.max_length" not in kept:
        found.pop("data.max_length", None)
    return found


def _keep_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Write the identity of a stage folder, to be read by `kept_identity`."""
    kept = {key: dict(value) if key == "data" else value for key, value in identity.items()}
    _replace_length(kept.get("data"), {None: _NOT_CUT})
    _replace_length(kept, {None: _NOT_CUT}, "data.max_length")
    save_recipe(folder / "recipe.yaml", kept)


def _replace_length(section: Any, values: Mapping[Any, Any], key: str = "max_length") -> None:
    if isinstance(section, dict) and section.get(key, "") in [*values]:
        section[key] = values[section[key]]


def _section(values: dict[str, Any], place: Sequence[str]) -> dict[str, Any]:
    for key in place:
        values = values.setdefault(key, {})
    return values


def forget_unknown_commit(kept: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Folders made before commits were kept have a branch or nothing in their place, which says nothing of the weights.

    A hub id without a commit is taken to be the same as one with a commit.
    """
    _forget_unknown_data(kept, wanted)
    for one, other, key in (
        (kept, wanted, "model.revision"),
        (kept.get("model", {}), wanted.get("model", {}), "revision"),
    ):
        if _COMMIT.fullmatch(str(other.get(key))) and not _COMMIT.fullmatch(str(one.get(key))):
            one.pop(key, None)
            other.pop(key, None)


def _forget_unknown_data(kept: Any, wanted: Any) -> None:
    for key in kept.keys() & wanted.keys():
        if isinstance(kept[key], dict) and isinstance(wanted[key], dict):
            _forget_unknown_data(kept[key], wanted[key])
        elif isinstance(kept[key], str) and isinstance(wanted[key], str) and kept[key] != wanted[key]:
            one, other = hub_source(kept[key]), hub_source(wanted[key])
            if one and other and not one.commit and replace(other, revision=one.revision) == one:
                wanted[key] = kept[key]


def record(recipe: Recipe, result: Mapping[str, Any]) -> None:
    """Write a stage's result to results.jsonl, in the place of an earlier one of the same stage."""
    if is_main_process():
        _replace_result(recipe, result["stage"], [json.dumps(result)])


def _replace_result(recipe: Recipe, stage: str, new: Sequence[str]) -> None:
    path = Path(recipe.output, "results.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = [line for line in lines if json.loads(line)["stage"] != stage]
    if [*kept, *new] != lines:
        write_text(path, "".join(f"{line}\n" for line in [*kept, *new]))


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint: one whose `trainer_state.json`, which is written last, is there and can be read."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def whole_checkpoint(recipe: Recipe, folder: Path, named: str | None) -> str:
    """The checkpoint that is exported, `named` or the one `train` would export: a model or an adapter in one piece."""
    source = named or _chosen_checkpoint(recipe, folder)
    if source is not None and Path(source, "pytorch_model_fsdp_0").is_dir():
        raise CaftuneError(
            f"{source} must hold whole weights, got FSDP's pieces of them (SHARDED_STATE_DICT). Run `caftune train` again, as "
            "before: it goes on from the last checkpoint and writes the model at its end."
        )
    if source is None or not any(Path(source, name).is_file() for name in ("config.json", "adapter_config.json")):
        raise CaftuneError(
            f"{named or folder} holds no checkpoint. Run `caftune train` first, or name one of {folder}/checkpoint-*."
        )
    return source


def _chosen_checkpoint(recipe: Recipe, folder: Path) -> str | None:
    """The best checkpoint where the recipe asks for it, else the last."""
    last = last_checkpoint(folder)
    if last is None or not recipe.trainer.get("load_best_model_at_end"):
        return last
    best = json.loads(Path(last, "trainer_state.json").read_text())["best_model_checkpoint"]
    return str(folder / Path(best).name) if best else last


def is_main_process() -> bool:
    """Whether this process is the one that writes, under torchrun and accelerate."""
    return int(os.environ.get("RANK", "0")) == 0


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _identity(recipe: Recipe, stage: str, files: Mapping[str, str | Path | None]) -> dict[str, Any]:
    return {
        **_sections(recipe, stage),
        "files": {name: _digest(Path(path)) for name, path in _present(files).items()},
    }


def _sections(recipe: Recipe, stage: str) -> dict[str, Any]:
    everything = recipe.model_dump()
    more = ["data.max_length"] if stage == "pretrain" and recipe.cuts_stage_one else []
    return {key: _at(everything, key) for key in [*_DEPENDS_ON[stage], *more]}


def _digest(path: Path) -> str:
    """What a file's contents are told apart by: of heads their weights, not how and when these were made."""
    if path.name == DESCRIPTION_FILE:
        return json.loads(path.read_text(encoding="utf-8"))["weights_sha256"]
    return file_sha256(path)


def _present(files: Mapping[str, str | Path | None]) -> dict[str, str | Path]:
    return {name: path for name, path in files.items() if path is not None and Path(path).is_file()}


def _at(values: Mapping[str, Any], place: str) -> Any:
    for key in place.split("."):
        values = values[key]
    return values
