"""Heads on disk, and the record of how a run was made.

A heads folder holds `heads.safetensors` and `heads.json`. The JSON names the base (its configuration, and fingerprints of
its unembedding and last layer), the tokenizer, the horizons, the fork point and how the heads were trained; loading refuses
heads of another base. Nothing is pickled.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils.hub import cached_file, extract_commit_hash

from caftune.core.adapters import original_state
from caftune.core.backbone import Backbone, whole
from caftune.core.heads import FORK_POINTS, AuxiliaryHeads, HeadsConfig
from caftune.errors import CaftuneError

FORMAT = 1
WEIGHTS_FILE, DESCRIPTION_FILE = "heads.safetensors", "heads.json"
# What of a heads folder is fetched from a hub and pushed to it, beside the card.
QUALITY_FILE, PICTURE_FILE = "quality.json", "quality.png"
SHARED_FILES = (WEIGHTS_FILE, DESCRIPTION_FILE, QUALITY_FILE, PICTURE_FILE)
# What huggingface_hub raises where the hub cannot be reached or refuses: its own errors and its HTTP library's.
HUB_ERRORS = (ValueError, RuntimeError, *HfHubHTTPError.__bases__)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_WAITING_DESCRIPTION = f".{DESCRIPTION_FILE}.waiting"
_SAMPLED_ROWS = 64
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# What a configuration holds besides the architecture: where it came from, what trainers are free to set, and the size of
# the vocabulary, which the heads never see.
_VOLATILE = {
    *(
        "_name_or_path",
        "architectures",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
        "quantization_config",
    ),
    *("pad_token_id", "bos_token_id", "eos_token_id", "output_router_logits", "router_aux_loss_coef"),
    *("id2label", "label2id", "vocab_size"),
    *("attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout"),
}


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
    """Write `heads` and what they belong to. A crash leaves the old folder or the new one, never half of each.

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
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    found = heads.state_dict() if state is None else state
    weights = {name: tensor.detach().contiguous().cpu() for name, tensor in found.items()}
    partial = target / f".{WEIGHTS_FILE}.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    description = {
        "format": FORMAT,
        "kind": heads.config.kind,
        "horizons": heads.config.horizons,
        "fork_point": FORK_POINTS[heads.config.kind],
        "base": base,
        "tokenizer": tokenizer_fingerprint(tokenizer) if tokenizer is not None else None,
        "vocabulary": len(tokenizer.get_vocab()) if tokenizer is not None else None,
        "training": dict(training or {}),
        "weights_sha256": file_sha256(partial),
        "caftune": package_version("caftune"),
    }
    waiting = target / _WAITING_DESCRIPTION
    write_json(waiting, description)
    partial.replace(target / WEIGHTS_FILE)  # from here on `waiting` describes the weights: see _finish_save
    waiting.replace(target / DESCRIPTION_FILE)


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
    heads = AuxiliaryHeads.copied(backbone, HeadsConfig(len(description["horizons"]), description["kind"]))
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
    """The folder `name`, or this machine's copy of the heads `owner/name[@revision]` on the hub, fetched where it is missing.

    Raises:
        CaftuneError: it is neither a folder nor to be had from the hub.
    """
    if Path(name).is_dir() or not _HUB_ID.fullmatch(str(name)):
        return Path(name)
    repository, _, revision = str(name).partition("@")
    try:
        files = [*SHARED_FILES, "README.md"]
        folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))
    except HUB_ERRORS as error:
        raise CaftuneError(
            f"{name} is no folder, and the hub gave no such heads ({hub_reason(error)}). Check the name; private heads need "
            "`hf auth login`."
        ) from error
    if not (folder / DESCRIPTION_FILE).is_file():
        raise CaftuneError(
            f"{name} on the hub holds no heads of caftune: it has no {DESCRIPTION_FILE}. Check the name."
        )
    return folder


def hub_reason(error: Exception) -> str:
    """Why the hub refused, in a few words."""
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository is there for you"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")


def describe_heads(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of the heads.json of a folder or hub id."""
    path = find_heads(folder)
    _finish_save(path)
    if not (path / DESCRIPTION_FILE).is_file():
        pickles = [item.name for suffix in ("*.pth", "*.pt", "*.bin", "*.pkl") for item in path.glob(suffix)]
        if pickles:
            raise CaftuneError(
                f"{path} holds {pickles[0]}, a pickle, which can run code when opened. caftune reads only {WEIGHTS_FILE} "
                f"with {DESCRIPTION_FILE}; train heads with `caftune pretrain-heads`."
            )
        raise CaftuneError(
            f"{path} must be a folder with {DESCRIPTION_FILE} and {WEIGHTS_FILE}, and is not. "
            "Train heads with `caftune pretrain-heads`, or name some on the hub (owner/name)."
        )
    try:
        description = json.loads((path / DESCRIPTION_FILE).read_text())
        found = description["format"]
        if found == FORMAT:
            _check_description(description)
    except (ValueError, KeyError, TypeError) as error:
        raise CaftuneError(f"{path / DESCRIPTION_FILE} is damaged ({error}). Copy or train the heads again.") from error
    if found != FORMAT:
        raise CaftuneError(
            f"{path} has heads of format {found}, and this caftune reads format {FORMAT}. "
            "Update caftune or train the heads again."
        )
    return description


def _check_description(description: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError where a description lacks what loading needs."""
    config = HeadsConfig(len(description["horizons"]), description["kind"])
    if description["horizons"] != config.horizons:
        raise CaftuneError(f"horizons must be {config.horizons}, got {description['horizons']}")
    for key in ("weights_sha256", "tokenizer", "vocabulary"):
        description[key]
    for key in ("name", "model_type", "architecture", "unembedding", "last_layer"):
        description["base"][key]


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


def base_fingerprint(backbone: Backbone) -> dict[str, Any]:
    """What ties heads to a base: its architecture, and samples of the weights they share or were copied from.

    Weights are sampled after rounding to bfloat16, so a base loaded in float32 and in bfloat16 gives one fingerprint. The
    last layer of a quantised base has none (None).
    """
    config = backbone.model.config
    layer, unembedding = original_state(backbone.layer), original_state(backbone.model.get_output_embeddings())
    is_plain = all(parameter.dtype in _PLAIN for parameter in backbone.layer.parameters())
    return {
        "model_type": config.model_type,
        "architecture": json.loads(json.dumps(_without_volatile(config.to_dict()), default=str)),
        "unembedding": _sampled_sha256({"weight": unembedding["weight"]}),
        "last_layer": _sampled_sha256(layer) if is_plain else None,
    }


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_volatile(item) for key, item in value.items() if key not in _VOLATILE}
    return value


def model_fingerprint(name: str, revision: str | None = None) -> str:
    """What tells one published model from another: its commit on the hub, or a hash of a folder's files."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{commit_of(name, revision, fetch=True)}"
    configs = [folder / file for file in ("config.json", "generation_config.json")]
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return _sha256("".join(file_sha256(path) for path in [*configs, *weights] if path.is_file()).encode())


def commit_of(name: str, revision: str | None, *, fetch: bool) -> str | None:
    """The commit of a model on the hub: now (`fetch`), or when this machine last loaded it. None where it is not known."""
    with nullcontext() if fetch else suppress(OSError, ValueError):
        file = cached_file(name, "config.json", revision=revision or "main", local_files_only=not fetch)
        return extract_commit_hash(file, None)
    return None


def tokenizer_fingerprint(tokenizer: Any, *, size: int | None = None) -> str:
    """A hash of the vocabulary and its ids; with `size`, of the `size` tokens with the lowest ids."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))[:size]
    return _sha256(json.dumps(sorted(tokens)).encode())


def provenance(data_files: Mapping[str, str | os.PathLike[str]] | None = None) -> dict[str, Any]:
    """Command, time, versions, git commit of the working folder, device, and the hashes of the data files read."""
    packages = ("caftune", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors")
    return {
        "command": shlex.join(sys.argv),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {name: package_version(name) for name in packages},
        "git": _git_commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "data": {name: file_sha256(path) for name, path in (data_files or {}).items() if Path(path).is_file()},
    }


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader finds the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # others may be writing it, too
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


def file_name(source: str) -> str:
    """A hub id, or the name of a file or folder: what is shared holds no paths of this machine."""
    return Path(source).name if Path(source).exists() or Path(source).is_absolute() else source


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def package_version(name: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _refuse_other_base(
    folder: Path, description: Mapping[str, Any], backbone: Backbone, tokenizer: Any, *, force: bool
) -> None:
    expected, found = description["base"], base_fingerprint(backbone)
    kind = _differences(expected["architecture"], found["architecture"])
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
        else "Use heads of this model, or force=True (recipe: heads.force) if one is a fine-tuned version of the other."
    )
    raise CaftuneError(
        f"The heads in {folder} were trained for {expected['name'] or expected['model_type']}, and {this} differs in its "
        f"{', '.join(kind + weights)}. {remedy}"
    )


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], place: str = "") -> list[str]:
    """Where two configurations differ, as `key (one -> other)`; keys that only one of two library versions knows are not."""
    found = []
    for key in sorted(set(one) & set(other)):
        if isinstance(one[key], dict) and isinstance(other[key], dict):
            found += _differences(one[key], other[key], f"{place}{key}.")
        elif one[key] != other[key]:
            found.append(f"{place}{key} ({one[key]!r} -> {other[key]!r})")
    return found


def _sampled_sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = whole(tensors[name].detach())
        rows = (
            torch.linspace(0, tensor.shape[0] - 1, min(_SAMPLED_ROWS, tensor.shape[0])).long() if tensor.dim() else None
        )
        sample = tensor[rows.to(tensor.device)] if rows is not None else tensor
        digest.update(name.encode())
        digest.update(sample.to(torch.bfloat16).contiguous().cpu().reshape(-1).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
