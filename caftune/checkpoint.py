"""Heads on disk, ordinary checkpoints without them, and the record of how a run was made.

A heads folder holds `heads.safetensors` and `heads.json`. The JSON names the base (configuration, unembedding and last
layer as fingerprints), the tokenizer, the horizons, the fork point and how the heads were trained; loading refuses heads
of another base. Nothing is pickled.
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
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from caftune.backbone import Backbone
from caftune.heads import ATTRIBUTE, FORK_POINTS, AuxiliaryHeads, HeadsConfig

FORMAT = 1
WEIGHTS_FILE, DESCRIPTION_FILE = "heads.safetensors", "heads.json"
_WAITING_DESCRIPTION = f".{DESCRIPTION_FILE}.waiting"
_SAMPLED_ROWS = 64
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MODULES_TO_SAVE = re.compile(r"\.modules_to_save\.[^.]+\.")
# What a configuration holds besides the architecture: where it came from, and what trainers are free to set.
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
    *(
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "output_router_logits",
        "router_aux_loss_coef",
        "id2label",
        "label2id",
    ),
}


class HeadsError(ValueError):
    """A heads folder cannot be used with this model; the message says why and what to do."""


def save_heads(
    folder: str | os.PathLike[str],
    heads: AuxiliaryHeads,
    backbone: Backbone,
    tokenizer: Any = None,
    *,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write `heads` and what they belong to. A crash leaves the old folder or the new one, never half of each."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().contiguous().cpu() for name, tensor in heads.state_dict().items()}
    partial = target / f".{WEIGHTS_FILE}.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    description = {
        "format": FORMAT,
        "kind": heads.config.kind,
        "horizons": heads.config.horizons,
        "fork_point": FORK_POINTS[heads.config.kind],
        "base": {"name": getattr(backbone.model.config, "_name_or_path", ""), **base_fingerprint(backbone)},
        "tokenizer": tokenizer_fingerprint(tokenizer) if tokenizer is not None else None,
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
        folder: what `save_heads` wrote.
        tokenizer: compared with the tokenizer the heads were trained with, where both are known.
        force: accept heads of another base whose weights have the right shapes.

    Raises:
        HeadsError: no such folder, a pickle, a damaged file, or heads of another base or tokenizer.
    """
    description = describe_heads(folder)
    if not force:
        _refuse_other_base(Path(folder), description, backbone, tokenizer)
    weights = read_heads(folder)
    heads = AuxiliaryHeads.build(backbone, HeadsConfig(len(description["horizons"]), description["kind"]))
    expected = {name: tensor.shape for name, tensor in heads.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    if expected != found:
        odd = sorted(set(expected) ^ set(found)) or sorted(name for name in expected if expected[name] != found[name])
        raise HeadsError(
            f"The heads in {folder} do not fit {type(backbone.model).__name__}: {odd[0]} and {len(odd) - 1} more tensors "
            "differ in name or shape. Train heads for this model."
        )
    heads.load_state_dict(weights)
    return heads


def describe_heads(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of a folder's heads.json."""
    path = Path(folder)
    _finish_save(path)
    if not (path / DESCRIPTION_FILE).is_file():
        pickles = [item.name for suffix in ("*.pth", "*.pt", "*.bin", "*.pkl") for item in path.glob(suffix)]
        if pickles:
            raise HeadsError(
                f"{path} holds {pickles[0]}, a pickle, which can run code when opened. caftune reads only {WEIGHTS_FILE} "
                f"with {DESCRIPTION_FILE}; train heads with `caftune pretrain-heads`."
            )
        raise HeadsError(
            f"{path} must be a folder with {DESCRIPTION_FILE} and {WEIGHTS_FILE}, and is not. "
            "Train heads with `caftune pretrain-heads`."
        )
    try:
        description = json.loads((path / DESCRIPTION_FILE).read_text())
        found = description["format"]
        if found == FORMAT:
            _check_description(description)
    except (ValueError, KeyError, TypeError) as error:
        raise HeadsError(f"{path / DESCRIPTION_FILE} is damaged ({error}). Copy or train the heads again.") from error
    if found != FORMAT:
        raise HeadsError(
            f"{path} has heads of format {found}, and this caftune reads format {FORMAT}. "
            "Update caftune or train the heads again."
        )
    return description


def _check_description(description: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError where a description lacks what loading needs."""
    config = HeadsConfig(len(description["horizons"]), description["kind"])
    if description["horizons"] != config.horizons:
        raise ValueError(f"horizons must be {config.horizons}, got {description['horizons']}")
    for key in ("weights_sha256", "tokenizer"):
        description[key]
    for key in ("name", "model_type", "config", "unembedding", "last_layer"):
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
    path = Path(folder) / WEIGHTS_FILE
    description = describe_heads(folder)
    if not path.is_file():
        raise HeadsError(f"{folder} has {DESCRIPTION_FILE} but no {WEIGHTS_FILE}. Copy or train the heads again.")
    if file_sha256(path) != description["weights_sha256"]:
        raise HeadsError(
            f"{path} is damaged: its SHA-256 differs from {DESCRIPTION_FILE}. Copy or train the heads again."
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise HeadsError(f"{path} is not a safetensors file ({error}). Copy or train the heads again.") from error


def export_model(
    model: Any, folder: str | os.PathLike[str], tokenizer: Any = None, *, base_name: str | None = None
) -> None:
    """Write `model` as an ordinary checkpoint: the base's keys, shapes and dtypes, no trace of heads or adapters.

    Adapters (PEFT) are merged layer by layer on the way to the file; the model itself is left as it is. Weights are written in
    the dtype the base was published in (float32 master weights of a bfloat16 base become bfloat16 again).

    Args:
        base_name: folder or hub id of the base, where the model was loaded from somewhere else (a checkpoint).
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    name = base_name or str(getattr(base.config, "_name_or_path", ""))
    published = _published_config(name)
    dtype = getattr(published, "dtype", None)
    base.save_pretrained(folder, state_dict=_cast(_merged_state(base), dtype, _published_dtypes(name)))
    # save_pretrained describes the model in memory, whose dtype and cache are those of training.
    path = Path(folder, "config.json")
    described = json.loads(path.read_text())
    described |= {"dtype": str(dtype).removeprefix("torch.")} if dtype is not None else {}
    described["use_cache"] = getattr(published, "use_cache", True)
    write_json(path, described)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _cast(
    state: Mapping[str, Tensor], default: torch.dtype | None, dtypes: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    """Tensors on the CPU in the dtype of their name, else the default; tensors that share memory (tied) still do."""
    cast: dict[tuple[Any, ...], Tensor] = {}
    result = {}
    for name, tensor in state.items():
        dtype = dtypes.get(name, default or tensor.dtype) if tensor.is_floating_point() else tensor.dtype
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), dtype)
        result[name] = cast.setdefault(identity, tensor.to("cpu", dtype))
    return result


def _merged_state(base: Any) -> dict[str, Tensor]:
    """The state dict of a causal LM without heads, adapters merged into the layers they adapt (PEFT's layer interface)."""
    layers = {name: module for name, module in base.named_modules() if hasattr(module, "base_layer")}
    adapted = tuple(f"{name}.{part}." for name, layer in layers.items() for part in layer.adapter_layer_names)
    state = {}
    for name, tensor in base.state_dict().items():
        if not name.startswith((f"{ATTRIBUTE}.", *adapted)) and ".original_module." not in name:
            state[_MODULES_TO_SAVE.sub(".", name.replace(".base_layer.", "."))] = tensor
    for name, layer in layers.items():
        original = {part: weight.detach().clone() for part, weight in layer.base_layer.named_parameters()}
        layer.merge()
        with torch.no_grad():
            for part, weight in layer.base_layer.named_parameters():
                state[f"{name}.{part}"] = weight.detach().to("cpu", copy=True)
            layer.unmerge()
            for part, weight in layer.base_layer.named_parameters():
                weight.copy_(original[part])  # unmerging subtracts, and rounds
    return state


def base_fingerprint(backbone: Backbone) -> dict[str, Any]:
    """What ties heads to a base: its architecture, and samples of the weights they share or were copied from.

    Weights are sampled after rounding to bfloat16, so a base loaded in float32 and in bfloat16 gives one fingerprint.
    """
    config = backbone.model.config
    architecture = _without_volatile(config.to_dict())
    weights = backbone.layer.state_dict()
    layer = {name.replace(".base_layer.", "."): weights[name] for name in weights if "lora_" not in name}
    return {
        "model_type": config.model_type,
        "config": _sha256(json.dumps(architecture, sort_keys=True, default=str).encode()),
        "unembedding": _sampled_sha256({"weight": backbone.unembedding().weight}),
        "last_layer": _sampled_sha256(layer),
    }


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_volatile(item) for key, item in value.items() if key not in _VOLATILE}
    return value


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of the vocabulary and its ids."""
    return _sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())


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


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader finds the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


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


def _published_config(name: str) -> Any:
    """The base's own configuration, None where there is none to be found without a network."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, local_files_only=True) if name else None
    except (OSError, ValueError):
        return None


def _published_dtypes(name: str) -> dict[str, torch.dtype]:
    """The dtype of each tensor in the base's own safetensors files, as far as they are on this machine."""
    from transformers.utils import cached_file

    try:
        config = cached_file(name, "config.json", local_files_only=True) if name else None
    except (OSError, ValueError):
        return {}
    dtypes: dict[str, torch.dtype] = {}
    for path in Path(str(config)).parent.glob("*.safetensors") if config else ():
        with safe_open(path, "pt") as file:
            kinds = {key: file.get_slice(key).get_dtype() for key in list(file.keys())}
        dtypes |= {key: _DTYPES[kind] for key, kind in kinds.items() if kind in _DTYPES}
    return dtypes


def _refuse_other_base(folder: Path, description: Mapping[str, Any], backbone: Backbone, tokenizer: Any) -> None:
    expected, found = description["base"], base_fingerprint(backbone)
    differing = [key for key in found if found[key] != expected[key]]
    if tokenizer is not None and description["tokenizer"] not in (None, tokenizer_fingerprint(tokenizer)):
        differing.append("tokenizer")
    if differing:
        this = getattr(backbone.model.config, "_name_or_path", "") or type(backbone.model).__name__
        raise HeadsError(
            f"The heads in {folder} were trained for {expected['name'] or expected['model_type']}, and {this} differs in its "
            f"{', '.join(differing)}. Use heads of this model, or force=True (recipe: heads.force) if it is a close relative."
        )


def _sampled_sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
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
