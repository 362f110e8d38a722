"""The folder of a run, and of each stage in it: what the stage was made from, and its result.

    output/
      labels/         labels.jsonl, cache.jsonl      the base's own answers
      pretrain/       checkpoints of stage 1
      heads/          heads.safetensors, heads.json, quality.json
      adapt/          heads/ and checkpoints         the same heads after an epoch on the task's data, with `adapt`
      train/          checkpoints of stage 2 (ordinary ones)
      model/          the result: an ordinary checkpoint
      model-heads/    heads that can draft for it, with heads.keep
      eval/           answers and their scores
      results.jsonl   base.json   data.json          a line per finished stage; the commits of a base and of data on the hub

A stage folder holds `recipe.yaml`, the sections of the recipe and the hashes of the files the stage was made from, and
`provenance.json`. The same command on the same recipe and files resumes; with others it stops with an error.
"""

import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from caftune.checkpoints.heads_folder import DESCRIPTION_FILE
from caftune.checkpoints.provenance import package_version, provenance
from caftune.data.readers import hub_source
from caftune.errors import CaftuneError
from caftune.files import file_sha256, is_json, read_json, write_json, write_text
from caftune.pipeline.recipe import first_difference, parse_recipe, save_recipe
from caftune.pipeline.recipe_text import read_yaml
from caftune.pipeline.schema import Recipe
from caftune.training.resumption import Changes, refuse_checkpoint, remove_allowed_changes

_RESULTS = {"pretrain": "pretrain-heads"}  # names of results, where they are not those of the folders
# How a kept recipe writes `data.max_length: null`; null in a kept recipe of an older version means today's `auto`.
_NOT_CUT = "not cut"
_PAUSES_S = (1, 4, 15, 40)  # between looks at files of other hosts: NFS may hide a new one for 30 s
_COMMIT = re.compile(r"[0-9a-f]{40}")
# The sections of the recipe that each stage's result depends on.
_DEPENDS_ON: dict[str, Sequence[str]] = {
    "labels": ("seed", "model.name", "model.revision", "labels"),
    "pretrain": (
        *("seed", "model.name", "model.revision", "loss.decay", "pretrain"),
        *(f"heads.{key}" for key in ("count", "kind", "targets", "top_k", "text", "target_share", "held_out")),
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


class RunFolder:
    """The folder of a run: its places, and the results of its stages."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def labels(self) -> Path:
        """The labels of the heads' pretraining."""
        return self.path / "labels" / "labels.jsonl"

    @property
    def heads(self) -> Path:
        """The heads that stage 1 makes."""
        return self.path / "heads"

    @property
    def adapted_heads(self) -> Path:
        """The heads that `adapt` makes of them."""
        return self.path / "adapt" / "heads"

    @property
    def model(self) -> Path:
        """The model that stage 2 makes."""
        return self.path / "model"

    def results(self) -> dict[str, dict[str, Any]]:
        """The lines of results.jsonl, by stage."""
        return {result["stage"]: result for result in map(json.loads, self._lines())}

    def record(self, result: Mapping[str, Any]) -> None:
        """Write a stage's result to results.jsonl, replacing an earlier one of the same stage."""
        if is_main_process():
            self._replace_result(result["stage"], [json.dumps(result)])

    def forget(self, stage: str) -> None:
        """Remove the result of a stage, which then counts as unfinished."""
        self._replace_result(_RESULTS.get(stage, stage), [])

    def is_done(self, stage: str) -> bool:
        """Whether the stage has a result, and its folder still exists."""
        return _RESULTS.get(stage, stage) in self.results() and (self.path / stage / "recipe.yaml").is_file()

    def is_begun(self, stage: str) -> bool:
        """Whether something was done in the folder of a stage: a checkpoint, or its result."""
        folder = self.path / stage
        work = any(folder.glob("checkpoint-*")) or (folder / "heads").is_dir()
        return (folder / "recipe.yaml").is_file() and (self.is_done(stage) or work)

    def _lines(self) -> list[str]:
        path = self.path / "results.jsonl"
        return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []

    def _replace_result(self, stage: str, new: Sequence[str]) -> None:
        lines = self._lines()
        kept = [line for line in lines if json.loads(line)["stage"] != stage]
        if [*kept, *new] != lines:
            write_text(self.path / "results.jsonl", "".join(f"{line}\n" for line in [*kept, *new]))


class Stage:
    """A stage of a run: its folder, and what its result depends on.

    Args:
        recipe: of which the stage's sections count.
        name: a key of `_DEPENDS_ON`; its folder is called so.
        files: by name; of heads their heads.json. Those that are None or do not exist do not count.
    """

    def __init__(self, recipe: Recipe, name: str, files: Mapping[str, str | Path | None]) -> None:
        self.run, self.name, self.files = RunFolder(recipe.output), name, files
        self.folder = self.run.path / name
        everything = recipe.model_dump()
        more = ["data.max_length"] if name == "pretrain" and recipe.cuts_stage_one else []
        self.sections = {key: _at(everything, key) for key in [*_DEPENDS_ON[name], *more]}

    def open(self) -> Path:
        """Prepare the folder, which is new or belongs to this recipe and these files. Returns the folder.

        Options that do not affect the steps so far may differ (see resumption.py): they are reported and recorded.
        A folder without results (its stage was refused, for example) takes the given recipe. So does that of the labels,
        whose answers are cached by prompt. With several processes the main one prepares it, and all raise the same error.

        Raises:
            CaftuneError: the folder holds a stage of another recipe, or other files; or the training is to be longer and has
                no checkpoint; or the processes do not see the same folder and files.
        """
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        refusal: CaftuneError | None = None
        has_others = PartialState().num_processes > 1
        if is_main_process():
            try:
                self._prepare()
            except CaftuneError as error:
                if not has_others:
                    raise
                refusal = error
        if has_others:
            (refusal,) = broadcast_object_list([refusal])
            if refusal is not None:
                raise refusal
            self._refuse_other_hosts()
        return self.folder

    def _prepare(self) -> None:
        self._refuse_unfinished_heads()
        if self.name != "labels" and self.run.is_begun(self.name):
            self._adopt(self.refuse_other(may_resume=True))
        elif not (self.folder / "recipe.yaml").is_file() and _holds_files(self.folder):
            raise CaftuneError(
                f"{self.folder} must be empty or a folder of caftune, got other files. Use another output."
            )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.run.forget(self.name)  # of a folder that was removed
            _keep_identity(self.folder, self._identity())  # first: it makes the folder ours
            (self.folder / "provenance.json").unlink(missing_ok=True)  # of the recipe before, if there was one
        if not (self.folder / "provenance.json").is_file():
            made = provenance(self._present()) | self._heads_used()
            made["data"] |= {name: str(path) for name, path in self.files.items() if path and hub_source(str(path))}
            write_json(self.folder / "provenance.json", made)

    def _refuse_other_hosts(self) -> None:
        """Raise CaftuneError on every process if they do not have the same recipe, files and folder.

        One would resume where another begins, or they would train on different rows.
        """
        from accelerate.utils import gather_object

        for pause in (*_PAUSES_S, None):
            given = {str(path): _digest(Path(path)) for path in self._present().values()}
            views = gather_object([{**given, "The recipe": self.sections, str(self.folder): self._state()}])
            names = {name for view in views for name in view}
            different = sorted(name for name in names if any(view.get(name) != views[0].get(name) for view in views))
            if not different:
                return
            if pause is not None:  # a network file system shows new files late
                time.sleep(pause)
        raise CaftuneError(
            f"{', '.join(different)} must have the same contents for all processes, got different ones, or none for some. Put "
            "the output on a file system that all hosts share; recipe, base, data and heads may be copies at the same paths."
        )

    def _state(self) -> list[Any]:
        """What decides whether and where this process resumes."""
        file = self.folder / "recipe.yaml"
        kept = file.read_text(encoding="utf-8") if file.is_file() else None
        return [kept, self.run.is_done(self.name), last_checkpoint(self.folder)]

    def refuse_other(self, *, may_resume: bool = False) -> Changes:
        """Raise CaftuneError where the folder was made from another recipe or other files.

        Returns:
            The allowed changes; with `may_resume` also changes of the training's length.
        """
        command = _RESULTS.get(self.name, self.name)
        if not (self.folder / "recipe.yaml").is_file():
            raise CaftuneError(f"{self.folder} is missing. Run `caftune {command}` first.")
        kept, wanted = kept_identity(self.folder), self._identity()
        forget_unknown_commit(kept, wanted)
        if "data.max_length" not in kept:  # the folder is older than this being kept
            wanted.pop("data.max_length", None)
        changes = remove_allowed_changes(kept, wanted, self.name)
        difference = first_difference(kept, wanted)
        if difference and difference.startswith("files."):
            difference = f"the contents of {difference.partition(':')[0].removeprefix('files.')} changed"
        if difference:
            raise CaftuneError(
                f"{self.folder} holds the {self.name} stage of another recipe ({difference}). Remove {self.folder}, or use "
                "another output (heads made here serve there: heads.path)."
            )
        if changes.length and not may_resume:
            raise CaftuneError(
                f"{self.folder} holds the {self.name} stage of another recipe ({changes.length[0]}). Run `caftune {command}` "
                "to continue to that length, or set it back."
            )
        return changes

    def _refuse_unfinished_heads(self) -> None:
        """Raise CaftuneError for heads of an earlier stage 1 if a new one was begun and is not finished."""
        used, stage = self.files.get("heads"), self.run.path / "pretrain"
        is_own = used is not None and Path(used) == self.run.heads / DESCRIPTION_FILE
        if is_own and (stage / "recipe.yaml").is_file() and not self.run.is_done("pretrain"):
            raise CaftuneError(
                f"{stage} is not finished, so {self.run.heads} is of another recipe. Run `caftune pretrain-heads` first."
            )

    def _heads_used(self) -> dict[str, Any]:
        """Which heads the stage starts from: their folder, the hash of their weights and how they were trained."""
        file = self.files.get("heads")
        found = read_json(Path(file)) if file is not None else None
        if not found:
            return {}
        return {
            "heads": {"folder": str(Path(str(file)).parent), **{k: found[k] for k in ("weights_sha256", "training")}}
        }

    def _adopt(self, changes: Changes) -> None:
        """Resume with changed options: report them, and record them in provenance.json."""
        checkpoint = last_checkpoint(self.folder) if changes.length else None
        if changes.length and checkpoint is None:
            raise CaftuneError(
                f"{self.folder} must hold a checkpoint to resume from ({', '.join(changes.length)}), got none. Remove "
                f"{self.folder} to train from the start."
            )
        if checkpoint is not None:
            refuse_checkpoint(Path(checkpoint), self._options())
        if not list(changes):
            return
        tqdm.write(f"Changed since {self.folder} was begun: {', '.join(changes)}.", file=sys.stderr)
        if changes.length:
            self.run.forget(self.name)
        _keep_identity(self.folder, self._identity())
        path = self.folder / "provenance.json"
        made = read_json(path) or provenance(self._present())
        now = provenance()
        entry = {"changes": list(changes), **{key: now[key] for key in ("command", "time", "versions")}}
        write_json(path, {**made, "went_on": [*made.get("went_on", []), entry]})

    def _options(self) -> dict[str, Any]:
        """The trainer options (`adapt` has one epoch by default)."""
        options = self.sections["trainer" if self.name == "train" else self.name] or {}
        return {"num_train_epochs": 1, **options} if self.name == "adapt" else options

    def _identity(self) -> dict[str, Any]:
        return {**self.sections, "files": {name: _digest(Path(path)) for name, path in self._present().items()}}

    def _present(self) -> dict[str, str | Path]:
        return {name: path for name, path in self.files.items() if path is not None and Path(path).is_file()}


def kept_identity(folder: Path) -> dict[str, Any]:
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
    found = {**Stage(recipe, folder.name, {}).sections, "files": kept.get("files") or {}}
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


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint: one whose `trainer_state.json`, which is written last, exists and can be read."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if is_json(path.read_bytes())]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def whole_checkpoint(folder: Path, named: str | None, *, best: bool) -> str:
    """A checkpoint of stage 2 with a model or an adapter in one piece: `named`, or the one `train` would export.

    Args:
        folder: of stage 2.
        best: `train` exports the best checkpoint, not the last one.
    """
    source = named or _chosen_checkpoint(folder, best=best)
    if source is not None and Path(source, "pytorch_model_fsdp_0").is_dir():
        raise CaftuneError(
            f"{source} must hold whole weights, got FSDP's pieces of them (SHARDED_STATE_DICT). Run `caftune train` again, as "
            "before: it resumes from the last checkpoint and writes the model at its end."
        )
    if source is None or not any(Path(source, name).is_file() for name in ("config.json", "adapter_config.json")):
        raise CaftuneError(
            f"{named or folder} holds no checkpoint. Run `caftune train` first, or name one of {folder}/checkpoint-*."
        )
    if Path(source).resolve().parent != folder.resolve():
        raise CaftuneError(f"{source} must be one of {folder}/checkpoint-*: it belongs to another run. Use its recipe.")
    return source


def _chosen_checkpoint(folder: Path, *, best: bool) -> str | None:
    last = last_checkpoint(folder)
    if last is None or not best:
        return last
    found = json.loads(Path(last, "trainer_state.json").read_text())["best_model_checkpoint"]
    return str(folder / Path(found).name) if found else last


def is_main_process() -> bool:
    """Whether this process is the one that writes, under torchrun and accelerate."""
    return int(os.environ.get("RANK", "0")) == 0


def _holds_files(folder: Path) -> bool:
    return folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir())


def _digest(path: Path) -> str:
    """A hash of a file's contents; of heads.json that of the weights, whenever and however they were made."""
    return read_json(path)["weights_sha256"] if path.name == DESCRIPTION_FILE else file_sha256(path)


def _at(values: Mapping[str, Any], place: str) -> Any:
    for key in place.split("."):
        values = values[key]
    return values
