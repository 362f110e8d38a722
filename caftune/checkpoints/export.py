"""The result: an ordinary checkpoint with the base's keys, shapes and dtypes, no trace of heads or adapters."""

import copy
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import cached_file

from caftune.checkpoints.heads_folder import write_json
from caftune.core.attach import ATTRIBUTE
from caftune.core.finite import refuse_not_finite
from caftune.errors import CaftuneError

_logger = logging.getLogger(__name__)
_LAYER_KEY = re.compile(r"^(?:model|backbone)\.(?:language_model\.)?layers\.(\d+)\.")
_MTP_KEY = re.compile(r"(?:^|\.)(?:mtp|nextn)\w*\.")
_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # PEFT's
_EXPORTED = (*("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"), *_ADAPTER)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_NOTHING_WRITTEN = "Nothing was written. Training diverged, or values overflow the dtype: export an earlier checkpoint."
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def export_model(
    model: Any,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    base_name: str | None = None,
    base_revision: str | None = None,
) -> list[str]:
    """Write `model` as an ordinary checkpoint: the base's keys, shapes and dtypes, no trace of heads or adapters.

    Adapters are merged by PEFT in a copy (on the CPU), so that training can go on afterwards. Weights are written in the
    dtype the base was published in (float32 master weights of a bfloat16 base become bfloat16 again). The files are written
    aside and moved into `folder` when all are there, the configuration last; an earlier export is removed before.

    Multi-token modules that the base brought along (DeepSeek, GLM, Qwen3-Next), which transformers does not load for
    training, are copied from the base unchanged, and a warning says so.

    Args:
        base_name: folder or hub id of the base, where the model was loaded from somewhere else (a checkpoint).
        base_revision: the base's revision on the hub.

    Returns:
        The names of the base's own multi-token tensors that were copied.

    Raises:
        RuntimeError: the merged weights are not those of a plain model of this class.
        CaftuneError: adapters that cannot be merged (see `refuse_tied_adapters`).
        CaftuneError: weights that are not finite, or are not in the dtype the base was published in.
    """
    plain = _merged_copy(model) if hasattr(model, "peft_config") else model
    name = base_name or str(getattr(plain.config, "_name_or_path", ""))
    published = _published_config(name, base_revision)
    files = _published_files(name, base_revision)
    dtype = getattr(torch, str(published.get("dtype") or published.get("torch_dtype")), None)
    native = _native_modules(plain, files, published)
    state = {key: tensor for key, tensor in plain.state_dict().items() if not key.startswith(f"{ATTRIBUTE}.")}
    _refuse_strange_state(plain, state)
    cast = _cast(state, dtype, _dtypes(files))
    weights = {name: cast[name] for name, _ in plain.named_parameters() if name in cast}
    refuse_not_finite(weights, "The weights to export", _NOTHING_WRITTEN)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target, prefix=".export-") as aside:
        plain.save_pretrained(aside, state_dict=cast | native)
        # save_pretrained describes the model in memory, whose dtype and cache are those of training.
        path = Path(aside, "config.json")
        described = json.loads(path.read_text())
        described |= {"dtype": str(dtype).removeprefix("torch.")} if dtype is not None else {}
        described["use_cache"] = published.get("use_cache", True)
        if _is_untied(plain):
            described["tie_word_embeddings"] = False
        write_json(path, described)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        if "text_config" in published:
            _copy_processors(name, base_revision, Path(aside))
        clear_export(target, name)
        if tokenizer is not None:
            _clear_template(target, name)
        for file in sorted(Path(aside).iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(target / file.name)
    if native:
        _logger.warning(
            "The base's own multi-token modules (%d tensors, such as %s) are in %s as they were: the training left them "
            "out, so as drafts for speculative decoding they may be accepted less often than on the base.",
            len(native),
            next(iter(native)),
            folder,
        )
    return list(native)


def clear_export(folder: Path, base_name: str) -> None:
    """Remove an earlier export's configuration and weights; every other file, and the base itself, stays.

    transformers would apply a leftover adapter to a whole model in the same folder.

    Raises:
        CaftuneError: a folder has the name of a file that an export writes.
    """
    if not folder.is_dir() or folder.resolve() == Path(base_name).resolve():
        return
    found = [path for path in folder.iterdir() if path.name in _EXPORTED or _SHARD.fullmatch(path.name)]
    blocked = next((path for path in found if path.is_dir() and not path.is_symlink()), None)
    if blocked is not None:
        raise CaftuneError(f"{blocked} must be a file of an earlier export or not exist, got a folder. Move it away.")
    for path in found:
        path.unlink()


def _clear_template(folder: Path, base_name: str) -> None:
    """Remove an earlier export's chat template, which would be loaded with a tokenizer that has none."""
    if folder.resolve() != Path(base_name).resolve():
        (folder / "chat_template.jinja").unlink(missing_ok=True)


def _copy_processors(base_name: str, revision: str | None, folder: Path) -> None:
    """A base of several media has processors beside its tokenizer, without which it cannot be loaded as what it is."""
    for name in _PROCESSORS:
        if not (folder / name).is_file() and (found := _published_file(base_name, revision, name, fetch=True)):
            shutil.copy(found, folder)


def copy_adapter(checkpoint: str | os.PathLike[str], folder: Path, tokenizer: Any, *, base_name: str) -> None:
    """Export the adapter of a checkpoint as it is."""
    for weights in Path(checkpoint).glob("adapter_model.safetensors"):
        refuse_not_finite(load_file(weights), f"The weights of {checkpoint}", _NOTHING_WRITTEN)
    folder.mkdir(parents=True, exist_ok=True)
    clear_export(folder, base_name)
    _clear_template(folder, base_name)
    for name in _ADAPTER:
        shutil.copy(Path(checkpoint, name), folder)
    tokenizer.save_pretrained(folder)


def load_trained(
    folder: str | os.PathLike[str],
    base_name: str,
    base_revision: str | None = None,
    *,
    vocab_size: int | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> Any:
    """A checkpoint of stage 2 on the CPU in float32: a whole model, or an adapter on the unquantised base.

    Args:
        vocab_size: rows of the embeddings, where the base's were resized before training.
        tokenizer: the one trained with: the base of an adapter gets its special tokens, as in training.
        trust_remote_code: as in `from_pretrained`.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
    if not Path(folder, "adapter_config.json").is_file():
        return _class_of(_published_config(str(folder), None)).from_pretrained(folder, **options)
    from peft import PeftModel
    from transformers.trainer_utils import align_special_tokens

    kind = _class_of(_published_config(base_name, base_revision))
    base = kind.from_pretrained(base_name, revision=base_revision or "main", **options)
    if vocab_size is not None and vocab_size != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(vocab_size)
    if tokenizer is not None:
        align_special_tokens(base, tokenizer)
    return PeftModel.from_pretrained(base, folder)


def _class_of(published: Mapping[str, Any]) -> Any:
    """The class a model was published as: for some families it is not the one AutoModelForCausalLM picks."""
    return getattr(transformers, (published.get("architectures") or [""])[0], AutoModelForCausalLM)


def _merged_copy(model: Any) -> Any:
    """A copy of a PEFT model with its adapters merged, on the CPU where the model is on one device."""
    refuse_tied_adapters(model)
    device = next(model.parameters()).device
    movable = not hasattr(model.get_base_model(), "hf_device_map")
    if movable:
        model.to("cpu")
    heads = model.get_base_model()._modules.pop(ATTRIBUTE, None)
    # Recurrent layers keep their last state, with its graph, which cannot be copied (RecurrentGemma).
    kept = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    memo = {id(value): value.detach() for value in kept if value.grad_fn is not None}
    try:
        return copy.deepcopy(model, memo).merge_and_unload()
    finally:
        if heads is not None:
            setattr(model.get_base_model(), ATTRIBUTE, heads)
        if movable:
            model.to(device)


def refuse_tied_adapters(model: Any) -> None:
    """An adapter merged into a weight that another layer shares (tied embeddings, Zamba's block) would change that one too."""
    adapted = {name: module for name, module in model.named_modules() if _is_adapted(module)}
    for name, module in adapted.items():
        weight = getattr(module.get_base_layer(), "weight", None)
        for other, part in model.named_modules():
            if not other.startswith(name) and part._parameters.get("weight") is weight is not None:
                raise CaftuneError(
                    f"The adapter of {name} cannot be merged: {other} shares its weight, and would change too. Nothing was "
                    "written. Export the adapter alone (recipe: model.lora.merge=false), or adapt other layers."
                )


def _is_adapted(module: Any) -> bool:
    return hasattr(module, "merge") and hasattr(module, "get_base_layer")


def _refuse_strange_state(plain: Any, state: Mapping[str, Tensor]) -> None:
    """Compare with a plain model of the same class and configuration, built without memory."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        expected = set(type(plain)(plain.config).state_dict())
    if expected != set(state):
        odd = sorted(expected ^ set(state))
        raise RuntimeError(
            f"The merged model has other weights than a plain {type(plain).__name__} ({odd[0]} and {len(odd) - 1} more). "
            "Nothing was written; the checkpoints are untouched. Load the adapter with PEFT instead of exporting it."
        )


def _is_untied(model: Any) -> bool:
    """Whether the configuration says that input and output embeddings are one, and they are not (any more)."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return False
    return not torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


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


def _published_config(name: str, revision: str | None) -> dict[str, Any]:
    """The base's own configuration as it was published, empty where there is none to be found without a network."""
    path = _published_file(name, revision, "config.json")
    return json.loads(path.read_text(encoding="utf-8")) if path else {}


def _published_file(name: str, revision: str | None, file: str, *, fetch: bool = False) -> Path | None:
    """A file of the base, None where it has none, or (without `fetch`) none that is on this machine."""
    with suppress(OSError, ValueError):
        path = cached_file(name, file, revision=revision, local_files_only=not fetch) if name else None
        return Path(path) if path else None
    return None


def _published_files(name: str, revision: str | None) -> list[Path]:
    """The base's own safetensors files, as far as they are on this machine."""
    config = _published_file(name, revision, "config.json")
    return sorted(config.parent.glob("*.safetensors")) if config else []


def _dtypes(files: list[Path]) -> dict[str, torch.dtype]:
    dtypes: dict[str, torch.dtype] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            kinds = {key: file.get_slice(key).get_dtype() for key in list(file.keys())}
        dtypes |= {key: _DTYPES[kind] for key, kind in kinds.items() if kind in _DTYPES}
    return dtypes


def _native_modules(plain: Any, files: list[Path], published: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of the base's files that belong to multi-token modules: named mtp, or layers past the last decoder layer."""
    text = published.get("text_config", published)
    depth = text.get("num_hidden_layers") or plain.config.get_text_config().num_hidden_layers
    found = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for key in list(file.keys()):
                layer = _LAYER_KEY.search(key)
                if _MTP_KEY.search(key) or (layer and int(layer[1]) >= depth):
                    found[key] = file.get_tensor(key)
    loaded = set(plain.state_dict())
    return {key: tensor for key, tensor in found.items() if key not in loaded}
