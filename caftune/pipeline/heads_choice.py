"""Which heads a stage starts from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caftune.checkpoints.heads_folder import DESCRIPTION_FILE, config_of, describe_heads, find_heads
from caftune.core.heads import HeadsConfig
from caftune.errors import CaftuneError
from caftune.pipeline.folder import RunFolder
from caftune.pipeline.schema import HeadsSection


@dataclass(frozen=True)
class HeadsRef:
    """Heads in a local folder."""

    folder: Path
    description: dict[str, Any]  # the contents of heads.json

    @classmethod
    def find(cls, name: str | Path) -> "HeadsRef":
        """Heads in a folder or on the hub (owner/name[@revision]), which is queried once.

        Raises:
            CaftuneError: it is neither a folder with heads nor heads on the hub.
        """
        folder = find_heads(name)
        return cls(folder, describe_heads(folder))

    @property
    def file(self) -> Path:
        """Its heads.json."""
        return self.folder / DESCRIPTION_FILE

    @property
    def sha256(self) -> str:
        """The hash of the weights."""
        return str(self.description["weights_sha256"])

    @property
    def config(self) -> HeadsConfig:
        """How many heads of which kind."""
        return config_of(self.description)


def pretrained_heads(section: HeadsSection, folder: RunFolder) -> HeadsRef:
    """The heads of heads.path (downloaded if that is a hub id), or those that stage 1 made in this run.

    Raises:
        CaftuneError: there are no heads, or they are not those of the recipe.
    """
    if section.path is not None:
        name, keys, remedy = section.path, section.model_fields_set & {"count", "kind"}, "Remove it."
    else:
        name, keys = str(folder.heads), {"count", "kind"}
        remedy = "Set it back, or run `caftune pretrain-heads` with it."
        if not folder.heads.is_dir():
            raise CaftuneError(
                f"{name} is missing. Run `caftune pretrain-heads` first, name other heads in heads.path, or set loss.weight=0."
            )
    found = HeadsRef.find(name)
    for key in ("count", "kind"):
        given, actual = getattr(section, key), getattr(found.config, key)
        if key in keys and given != actual:
            raise CaftuneError(f"heads.{key} must be {actual!r}, as in {name}, got {given!r}. {remedy}")
    return found
