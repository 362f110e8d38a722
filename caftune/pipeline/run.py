"""A run: its recipe with hub ids pinned to commits, its base, heads and folder. Commands begin with `Run.open`."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from caftune.checkpoints.fingerprint import commit_of
from caftune.checkpoints.heads_folder import DESCRIPTION_FILE
from caftune.checkpoints.opening import opening
from caftune.data.readers import HubSource, data_commit, hub_source
from caftune.files import read_json, write_json
from caftune.pipeline.base_model import BaseModel
from caftune.pipeline.folder import RunFolder, Stage, is_main_process
from caftune.pipeline.heads_choice import HeadsRef, pretrained_heads
from caftune.pipeline.lm_eval_tasks import PREFIX
from caftune.pipeline.schema import DataSection, HeadsSection, LabelsSection, ModelSection, Recipe
from caftune.training.prepare import Prepared

_Sources = TypeVar("_Sources", DataSection, HeadsSection, LabelsSection)


@dataclass(frozen=True)
class Run:
    """What a command works on."""

    recipe: Recipe
    base: BaseModel
    folder: RunFolder
    prepared: dict[Any, Prepared] = field(default_factory=dict)  # rows that several trainings use: see `task_rows`

    @classmethod
    def open(cls, recipe: Recipe) -> "Run":
        """The run of a recipe. Models and data on the hub stay at the commits of its first command, as `main` may move.

        The base's commit is kept in output/base.json, until the recipe names another base or revision; those of the data
        are kept in output/data.json, by repository and revision, and become part of the sources' names.

        Raises:
            CaftuneError: the base is not on the hub.
        """
        folder = RunFolder(recipe.output)
        model = _pinned_base(recipe.model, folder)
        commits = _DataCommits(folder)
        data = commits.pin(recipe.data, "train", "eval")
        labels, heads = commits.pin(recipe.labels, "prompts"), commits.pin(recipe.heads, "text")
        tasks = {
            task: source if task.startswith(PREFIX) else commits.pinned(source)
            for task, source in recipe.eval.data.items()
        }
        commits.keep()
        evaluation = recipe.eval.model_copy(update={"data": tasks})
        sections = {"model": model, "data": data, "labels": labels, "heads": heads, "eval": evaluation}
        return cls(recipe.model_copy(update=sections), BaseModel.of(model), folder)

    @cached_property
    def heads(self) -> HeadsRef:
        """The pretrained heads: see `pretrained_heads`."""
        return pretrained_heads(self.recipe.heads, self.folder)

    @property
    def stage_two_heads(self) -> Path | None:
        """The folder of the heads that stage 2 starts from, after `adapt` where the recipe has it; None without heads."""
        if self.recipe.loss.weight == 0 and self.recipe.heads.path is None:
            return None
        if self.recipe.loss.weight > 0 and self.recipe.adapt is not None:
            return self.folder.adapted_heads
        return self.heads.folder

    def train_stage(self) -> Stage:
        """Stage 2, and what its result depends on."""
        data, heads = self.recipe.data, self.stage_two_heads
        files = {"train": data.train, "eval": data.eval, "heads": heads and heads / DESCRIPTION_FILE}
        return Stage(self.recipe, "train", files)


def _pinned_base(section: ModelSection, folder: RunFolder) -> ModelSection:
    """The section with the commit that this run uses as its revision."""
    name, revision = section.name, section.revision
    path = folder.path / "base.json"
    kept = read_json(path)
    if Path(name).is_dir() or (revision is not None and revision == kept.get("commit")):
        return section
    if [name, revision] != [kept.get("name"), kept.get("revision")]:
        with opening(name, revision=revision):
            kept = {"name": name, "revision": revision, "commit": commit_of(name, revision, fetch=True)}
            if is_main_process():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, kept)
    return section.model_copy(update={"revision": kept.get("commit") or revision})


class _DataCommits:
    """The commits of a run's data on the hub, by repository and revision; kept in output/data.json."""

    def __init__(self, folder: RunFolder) -> None:
        self._path = folder.path / "data.json"
        self._kept = read_json(self._path)
        self._known = dict(self._kept)

    def pinned(self, source: str) -> str:
        """The source with its commit, where it is on the hub; unchanged where the commit is not known."""
        found = hub_source(source)
        if found is None or found.commit is not None:
            return source
        key = str(HubSource(found.repository, found.revision))
        commit = self._known.get(key) or data_commit(found)
        if commit is None:
            return source  # reading the rows raises the error
        self._known[key] = commit
        return str(replace(found, revision=commit))

    def pin(self, section: _Sources, *keys: str) -> _Sources:
        """The section with its sources pinned."""
        given = {key: source for key in keys if (source := getattr(section, key)) is not None}
        changes = {key: new for key, source in given.items() if (new := self.pinned(source)) != source}
        return section.model_copy(update=changes)

    def keep(self) -> None:
        """Write new commits to data.json."""
        if self._known != self._kept and is_main_process():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, self._known)
