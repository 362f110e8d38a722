"""Heads on disk: a folder with `heads.safetensors` and `heads.json`.

The JSON names the base (its configuration, and fingerprints of its unembedding and last layer), the tokenizer, the horizons,
the fork point and how the heads were trained. Heads of another base are refused. Nothing is pickled.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from caftune.checkpoints.fingerprint import base_fingerprint, commit_of, differences, tokenizer_fingerprint
from caftune.checkpoints.provenance import package_version
from caftune.core.backbone import Backbone
from caftune.core.heads import FORK_POINTS, AuxiliaryHeads, HeadsConfig
from caftune.errors import CaftuneError, first_line
from caftune.files import file_sha256, replacing, write_json

FORMAT = 1
WEIGHTS_FILE, DESCRIPTION_FILE = "heads.safetensors", "heads.json"
# The files of a heads folder that are pushed to a hub and pulled from it, besides the card.
QUALITY_FILE, PICTURE_FILE = "quality.json", "quality.png"
SHARED_FILES = (WEIGHTS_FILE, DESCRIPTION_FILE, QUALITY_FILE, PICTURE_FILE)
# What huggingface_hub raises where the hub cannot be reached or refuses: its own errors and its HTTP library's.
HUB_ERRORS = (ValueError, RuntimeError, *HfHubHTTPError.__bases__)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_WAITING_DESCRIPTION = f".{DESCRIPTION_FILE}.waiting"
_PICKLES = (".pth", ".pt", ".bin", ".pkl")
# The keys that loading needs: of a description, and of its entry `base`.
_NEEDED = ("weights_sha256", "tokenizer", "vocabulary")
_NEEDED_OF_BASE = ("name", "model_type", "architecture", "unembedding", "last_layer")


def save_heads(
    folder: str | os.PathLike[str],
    heads: AuxiliaryHeads,
    backbone: Backbone,
    tokenizer: Any = None,
    *,
    training: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
    revision: str | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    write: bool = True,
) -> None:
    """Write `heads` and the description of their base. After a crash the folder holds the old heads or the new ones.

    Args:
        training: how they were trained, for the record.
        state: the heads' weights, where these are not `heads.state_dict()` (sharded, or with a LoRA to merge).
        revision: of the base on the hub, where that is not `main`. Its commit is recorded.
        fingerprint: the base's, where it was taken before the model got more tokens.
        write: False on the ranks that only take part in gathering a sharded model.
    """
    base = fingerprint or base_fingerprint(backbone)
    if not write:
        return
    name = str(getattr(backbone.model.config, "_name_or_path", ""))
    base = {"name": file_name(name), "revision": commit_of(name, revision, fetch=False), **base}
    found = heads.state_dict() if state is None else state
    description = {
        "format": FORMAT,
        "kind": heads.config.kind,
        "horizons": heads.config.horizons,
        "fork_point": FORK_POINTS[heads.config.kind],
        "final_norm": heads.config.final_norm,
        "base": base,
        "tokenizer": tokenizer_fingerprint(tokenizer) if tokenizer is not None else None,
        "vocabulary": len(tokenizer.get_vocab()) if tokenizer is not None else None,
        "training": dict(training or {}),
        "caftune": package_version("caftune"),
    }
    weights = {name: tensor.detach().contiguous().cpu() for name, tensor in found.items()}
    write_heads(Path(folder), weights, description)


def write_heads(folder: Path, weights: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write both files of a heads folder, adding the weights' hash to the description."""
    waiting = folder / _WAITING_DESCRIPTION
    with replacing(folder / WEIGHTS_FILE) as partial:
        save_file(dict(weights), partial, metadata={"format": "pt"})
        write_json(waiting, {**description, "weights_sha256": file_sha256(partial)})
    # From here on `waiting` describes the weights: after a crash `_finish_save` renames it.
    waiting.replace(folder / DESCRIPTION_FILE)


def load_heads(
    folder: str | os.PathLike[str], backbone: Backbone, tokenizer: Any = None, *, force: bool = False
) -> AuxiliaryHeads:
    """Read heads for the model of `backbone`, in that model's dtype and on its device.

    Args:
        folder: what `save_heads` wrote, or a hub id: see `find_heads`.
        tokenizer: compared with the tokenizer the heads were trained with, where both are known.
        force: accept heads of a relative: a base of the same architecture and tokenizer with other weights (the parent of
            a fine-tuned model), also where tokens were added to it.

    Raises:
        CaftuneError: no such folder, a pickle, a damaged file, or heads of another base or tokenizer.
    """
    folder = find_heads(folder)
    description = describe_heads(folder)
    _refuse_other_base(folder, description, backbone, tokenizer, force=force)
    weights = read_heads(folder)
    heads = AuxiliaryHeads.copied(backbone, config_of(description))
    expected = {name: tensor.shape for name, tensor in heads.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    if expected != found:
        odd = sorted(set(expected) ^ set(found)) or sorted(name for name in expected if expected[name] != found[name])
        raise CaftuneError(
            f"The heads in {folder} do not fit {type(backbone.model).__name__}: {odd[0]} and {len(odd) - 1} more tensors "
            "differ in name or shape. Train heads for this model."
        )
    heads.load_state_dict(weights)
    return heads


def find_heads(name: str | os.PathLike[str]) -> Path:
    """The folder `name`, or a local copy of the heads `owner/name[@revision]` on the hub, downloaded if needed.

    Raises:
        CaftuneError: it is neither a folder nor heads on the hub.
    """
    if Path(name).is_dir() or not HUB_ID.fullmatch(str(name)):
        return Path(name)
    repository, _, revision = str(name).partition("@")
    try:
        files = [*SHARED_FILES, "README.md"]
        folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))
    except HUB_ERRORS as error:
        raise CaftuneError(
            f"{name} must be a folder or heads on the hub, got neither ({hub_reason(error)}). Check the name; private heads "
            "need `hf auth login`."
        ) from error
    if not (folder / DESCRIPTION_FILE).is_file():
        raise CaftuneError(
            f"{name} on the hub must hold heads of caftune, got a repository without {DESCRIPTION_FILE}. Check the name; "
            "convert heads of CAFT's reference implementation with `caftune heads import`."
        )
    return folder


def hub_reason(error: Exception) -> str:
    """The hub's reason for a refusal, in a few words."""
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or you have no access to it"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision"
    return first_line(error)


def describe_heads(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of the heads.json of a folder or hub id."""
    folder = find_heads(folder)
    _finish_save(folder)
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        raise _no_heads(folder)
    try:
        description = json.loads(path.read_text())
        found = description["format"]
        if found == FORMAT:
            _check_description(description)
    except (ValueError, KeyError, TypeError) as error:
        raise CaftuneError(f"{path} is damaged ({error}). Copy or train the heads again.") from error
    if found != FORMAT:
        raise CaftuneError(
            f"{folder} must hold heads of format {FORMAT}, got format {found}. Update caftune or train the heads again."
        )
    return description


def config_of(description: Mapping[str, Any]) -> HeadsConfig:
    """What the heads of a heads.json are."""
    final_norm = description.get("final_norm", True)  # not in folders of older versions
    if not isinstance(final_norm, bool):
        raise TypeError(f"final_norm must be true or false, got {final_norm!r}")
    return HeadsConfig(len(description["horizons"]), description["kind"], final_norm=final_norm)


def _no_heads(folder: Path) -> CaftuneError:
    """The error for a folder without a description."""
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLES)
    if pickles:
        return CaftuneError(
            f"{folder} must hold {WEIGHTS_FILE} and {DESCRIPTION_FILE}, got {pickles[0]}, a pickle, which can run code when "
            "opened. Convert heads of CAFT's reference implementation with `caftune heads import`, or train heads."
        )
    found = f"no {DESCRIPTION_FILE} there" if Path(folder).is_dir() else "no such folder"
    return CaftuneError(
        f"{folder} must be a folder with {DESCRIPTION_FILE} and {WEIGHTS_FILE}, got {found}. "
        "Train heads with `caftune pretrain-heads` (pretrain_heads=True), or name heads on the hub (owner/name)."
    )


def _check_description(description: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError where a description lacks what loading needs."""
    config = config_of(description)
    if description["horizons"] != config.horizons:
        raise CaftuneError(f"horizons must be {config.horizons}, got {description['horizons']}")
    for place, keys in ((description, _NEEDED), (description["base"], _NEEDED_OF_BASE)):
        for key in keys:
            place[key]


def _finish_save(folder: Path) -> None:
    """Finish a save that was cut off between its two renames."""
    waiting, weights = folder / _WAITING_DESCRIPTION, folder / WEIGHTS_FILE
    if waiting.is_file() and weights.is_file():
        description = json.loads(waiting.read_text())
        if description["weights_sha256"] == file_sha256(weights):
            waiting.replace(folder / DESCRIPTION_FILE)


def read_heads(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The heads' weights, on the CPU, after checking that the file is whole."""
    path = find_heads(folder) / WEIGHTS_FILE
    description = describe_heads(path.parent)
    if not path.is_file():
        raise CaftuneError(f"{folder} has {DESCRIPTION_FILE} but no {WEIGHTS_FILE}. Copy or train the heads again.")
    if file_sha256(path) != description["weights_sha256"]:
        raise CaftuneError(
            f"{path.resolve()} is damaged: its SHA-256 differs from {DESCRIPTION_FILE}. Delete it, and copy, pull or train "
            "the heads again."
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CaftuneError(f"{path} is not a safetensors file ({error}). Copy or train the heads again.") from error


def file_name(source: str) -> str:
    """A hub id, or the last name of a path, so that shared files hold no paths of this machine."""
    return Path(source).name if Path(source).exists() or Path(source).is_absolute() else source


def _refuse_other_base(
    folder: Path, description: Mapping[str, Any], backbone: Backbone, tokenizer: Any, *, force: bool
) -> None:
    expected, found = description["base"], base_fingerprint(backbone)
    kind = differences(expected["architecture"], found["architecture"])
    if expected["model_type"] != found["model_type"]:
        kind = [f"model_type ({expected['model_type']} -> {found['model_type']})"]
    known = [key for key in ("unembedding", "last_layer") if None not in (expected[key], found[key])]
    weights = [key for key in known if expected[key] != found[key]]
    if tokenizer is not None and description["tokenizer"] not in (None, tokenizer_fingerprint(tokenizer)):
        is_extended = tokenizer_fingerprint(tokenizer, size=description["vocabulary"]) == description["tokenizer"]
        (weights if is_extended else kind).append("tokenizer (tokens were added)" if is_extended else "tokenizer")
    if not kind and (force or not weights):
        return
    this = getattr(backbone.model.config, "_name_or_path", "") or type(backbone.model).__name__
    remedy = (
        "Train heads for this model; only heads of the same architecture and tokenizer can be carried over."
        if kind
        else "Use heads of this model, or force_heads=True (recipe: heads.force; load_heads: force=True) if one is a "
        "fine-tuned version of the other."
    )
    raise CaftuneError(
        f"The heads in {folder} were trained for {expected['name'] or expected['model_type']}, and {this} differs in its "
        f"{', '.join(kind + weights)}. {remedy}"
    )
