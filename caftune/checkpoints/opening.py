"""One-sentence errors for models that cannot be opened: errors of the hub and of libraries, checked against the files."""

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers import __version__ as _transformers_version

from caftune.errors import CaftuneError, first_line

_JSON = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "model.safetensors.index.json", "pytorch_model.bin.index.json", "adapter_config.json"),
)
_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "merges.txt", "tekken.json")


@contextmanager
def opening(
    name: str, place: str = "model.name", *, revision: str | None = None, trust: bool = False
) -> Iterator[None]:
    """Turn errors of opening the model `name` within the block into one sentence about its name, its files or the hub.

    Other errors pass, among them the operating system's own (a full disk).

    Args:
        place: where the name was given.
        revision: of the model on the hub.
        trust: whether the model's own code may run.

    Raises:
        CaftuneError: no such model, no access to it, a damaged or missing file of it, or a model of an unknown kind.
    """
    refuse_missing_model(name, place)
    try:
        yield
    except CaftuneError:
        raise
    except Exception as error:
        reason = _reason(error, name, place, revision, trust=trust)
        if reason is None:
            raise
        raise CaftuneError(reason) from error


@contextmanager
def opening_tokenizer(name: str, place: str) -> Iterator[None]:
    """As `opening`, for a tokenizer alone: its folder needs no model."""
    folder = Path(name)
    if _is_path(name) and not _any(folder, _TOKENIZERS):
        what = "has no tokenizer" if folder.is_dir() else "does not exist"
        raise CaftuneError(
            f"{place} must be a folder with a tokenizer (tokenizer.json) or a hub id, got {name}, which {what}. Check the name."
        )
    try:
        yield
    except Exception as error:
        reason = _damaged(folder, place) if folder.is_dir() else _refused_by_hub(error, name, place, None)
        if reason is None:
            raise
        raise CaftuneError(reason) from error


def refuse_missing_model(name: str, place: str = "model.name") -> None:
    """Raise CaftuneError for a path that is not a folder with a model; hub ids are not checked."""
    if _is_path(name) and not Path(name, "config.json").is_file():
        what = "has no config.json" if Path(name).is_dir() else "does not exist"
        raise CaftuneError(
            f"{place} must be a folder with a config.json or a hub id, got {name}, which {what}. Check the name."
        )


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def _reason(error: Exception, name: str, place: str, revision: str | None, *, trust: bool) -> str | None:
    """What is wrong with a model; None where the error is about something else."""
    if isinstance(error, OSError) and error.errno is not None:
        return None
    if Path(name).is_dir():
        found = _damaged(Path(name), place) or _lacking(Path(name), place, error)
    else:
        found = _refused_by_hub(error, name, place, revision)
    if found is None and isinstance(error, ValueError):
        found = _unknown_kind(error, name, place, revision, trust=trust)
    if found is None and isinstance(error, OSError):
        reason = first_line(error)
        return f"{place} must be a model that can be opened, got {name} ({reason}). Check its name and files."
    return found


def _damaged(folder: Path, place: str) -> str | None:
    """The first file of a model that cannot be read."""
    for check, names in ((_check_json, _JSON), (_check_safetensors, ("*.safetensors",)), (_check_archive, ("*.bin",))):
        for path in sorted(path for name in names for path in folder.glob(name) if path.is_file()):
            why = check(path)
            if why is not None:
                return f"{place}: {path} is damaged or cut off ({why}). Copy or download it again (from Git: `git lfs pull`)."
    return None


def _check_json(path: Path) -> str | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return str(error)
    return None if isinstance(found, dict) else f"it must hold a JSON object, got {type(found).__name__}"


def _check_safetensors(path: Path) -> str | None:
    try:
        with safe_open(path, "pt"):
            return None
    except SafetensorError as error:
        return str(error)


def _check_archive(path: Path) -> str | None:
    """PyTorch's files are zip archives, whose table of contents is at the end."""
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
    return "the end of the archive is missing" if is_archive and not zipfile.is_zipfile(path) else None


def _lacking(folder: Path, place: str, error: Exception) -> str | None:
    """What a model folder lacks: weights, one of their files, or a tokenizer."""
    for index in folder.glob("*.index.json"):
        for name in sorted(set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())):
            if not (folder / name).is_file():
                return f"{place}: {folder} must hold {name}, which {index.name} names, got none. Copy or download it again."
    if isinstance(error, OSError) and not _any(folder, _WEIGHTS):
        return f"{place}: {folder} must hold the weights of a model (model.safetensors), got none. Copy them there."
    if not isinstance(error, OSError) and not _any(folder, _TOKENIZERS):
        return f"{place}: {folder} must hold a tokenizer (tokenizer.json), got none. Copy that of its base there."
    return None


def _any(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(any(folder.glob(pattern)) for pattern in patterns)


def _refused_by_hub(error: BaseException, name: str, place: str, revision: str | None) -> str | None:
    """Why the hub gave no model, from huggingface_hub's error in the chain of causes."""
    login = "log in with `hf auth login`"
    offline = "HF_HUB_OFFLINE is set. Check the name, or unset HF_HUB_OFFLINE."
    unreachable = (
        offline if constants.HF_HUB_OFFLINE else "the hub cannot be reached. Check the name and the connection."
    )
    reasons: dict[type[BaseException], str] = {
        GatedRepoError: f"{place}: {name} is gated on the hub. Accept its terms on https://huggingface.co/{name}, and {login}.",
        RevisionNotFoundError: f"{place}: {name} on the hub has no revision {revision}. Name one of its branches, tags or "
        "commits.",
        RepositoryNotFoundError: f"{place} must be a folder or a hub id, got {name}: there is no such folder, and no "
        f"such model on the hub that you can access. Check the name; for a private model {login}.",
        LocalEntryNotFoundError: f"{place}: {name} must be a folder or a model in the local cache, got neither; "
        f"{unreachable}",
    }
    chain = []
    link: BaseException | None = error
    while link is not None:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return next((text for kind, text in reasons.items() if any(isinstance(link, kind) for link in chain)), None)


def _unknown_kind(error: ValueError, name: str, place: str, revision: str | None, *, trust: bool) -> str | None:
    """What is wrong with the model type in the configuration; None where transformers knows it."""
    try:
        described: dict[str, Any] = PreTrainedConfig.get_config_dict(name, revision=revision)[0]
    except OSError:
        return None
    kind, has_code = described.get("model_type"), bool(described.get("auto_map"))
    if has_code and not trust and "trust_remote_code" in str(error):
        return f"{place}: {name} has its own code, which runs only with model.trust_remote_code=true. Read it, then set that."
    if kind is None:
        return f"{place}: the config.json of {name} must name a model_type, got none. Copy the model again."
    if kind not in CONFIG_MAPPING and not has_code:
        return (
            f"{place} must be a model that transformers {_transformers_version} knows, got {name} of type {kind}. Update "
            "transformers."
        )
    if "Unrecognized configuration class" in str(error):
        return f"{place} must be a causal language model, got {name} of type {kind}. Name another."
    return None
