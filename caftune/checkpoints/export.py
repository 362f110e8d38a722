"""The result: an ordinary checkpoint with the base's keys, shapes and dtypes, no trace of heads or adapters."""

import copy
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
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

from caftune.core.attach import ATTRIBUTE
from caftune.core.finite import refuse_not_finite
from caftune.errors import CaftuneError
from caftune.files import read_json, write_json

_logger = logging.getLogger(__name__)
_LAYER_KEY = re.compile(r"^(?:model|backbone)\.(?:language_model\.)?layers\.(\d+)\.")
_MTP_KEY = re.compile(r"(?:^|\.)(?:mtp|nextn)\w*\.")
_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # PEFT's
_EXPORTED = (*("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"), *_ADAPTER)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_NOTHING_WRITTEN = "Nothing was written. Training diverged, or values overflow the dtype: export an earlier checkpoint."
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def export_saved(
    checkpoint: str | os.PathLike[str],
    folder: Path,
    tokenizer: Any,
    *,
    base_name: str,
    base_revision: str | None = None,
    merged: bool = True,
    vocab_size: int | None = None,
    trust_remote_code: bool = False,
    opening: AbstractContextManager[None] | None = None,
) -> list[str]:
    """Export a checkpoint of stage 2 (a model, or an adapter) as `export_model` does, or its adapter alone (`merged` False).

    Args:
        vocab_size: rows of the embeddings, where the base's were resized before training.
        trust_remote_code: as in `from_pretrained`.
        opening: the context in which the model is loaded.
    """
    if not merged:
        copy_adapter(checkpoint, folder, tokenizer, base_name=base_name)
        return []
    trust = trust_remote_code
    with opening or nullcontext():
        model = load_trained(
            checkpoint, base_name, base_revision, vocab_size=vocab_size, tokenizer=tokenizer, trust_remote_code=trust
        )
    if hasattr(model, "peft_config"):  # it is no one else's: no copy, which would take its memory again
        refuse_tied_adapters(model)
        model = model.merge_and_unload()
    return export_model(model, folder, tokenizer, base_name=base_name, base_revision=base_revision)


def export_model(
    model: Any,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    base_name: str | None = None,
    base_revision: str | None = None,
) -> list[str]:
    """Write `model` as an ordinary checkpoint: the base's keys, shapes and dtypes, no trace of heads or adapters.

    Adapters are merged by PEFT in a copy (on the CPU), so that training can continue. Weights get the dtype the base was
    published in. All files are written to a temporary folder first, then an earlier export is removed and they are moved into
    `folder`, the configuration last. Multi-token modules of the base (DeepSeek, GLM, Qwen3-Next), which transformers does not
    load for training, are copied unchanged, with a warning.

    Args:
        base_name: folder or hub id of the base, where the model was loaded from somewhere else (a checkpoint).
        base_revision: the base's revision on the hub.

    Returns:
        The names of the base's own multi-token tensors that were copied.

    Raises:
        RuntimeError: the merged weights are not those of a plain model of this class.
        CaftuneError: adapters that cannot be merged (see `refuse_tied_adapters`), or weights that are not finite.
    """
    plain = _merged_copy(model) if hasattr(model, "peft_config") else model
    base = _PublishedBase(base_name or str(getattr(plain.config, "_name_or_path", "")), base_revision)
    native = base.native_modules(plain)
    state = {key: tensor for key, tensor in plain.state_dict().items() if not key.startswith(f"{ATTRIBUTE}.")}
    _check_state_dict_keys(plain, state)
    cast = _cast(state, base.dtype, base.dtypes())
    weights = {name: cast[name] for name, _ in plain.named_parameters() if name in cast}
    refuse_not_finite(weights, "The weights to export", _NOTHING_WRITTEN)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target, prefix=".export-") as aside:
        plain.save_pretrained(aside, state_dict=cast | native)
        # save_pretrained describes the model in memory, whose dtype and cache are those of training.
        path = Path(aside, "config.json")
        described = read_json(path)
        described |= {"dtype": str(base.dtype).removeprefix("torch.")} if base.dtype is not None else {}
        described["use_cache"] = base.config.get("use_cache", True)
        if _is_untied(plain):
            described["tie_word_embeddings"] = False
        write_json(path, described)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        base.copy_processors(Path(aside))
        clear_export(target, base.name, template=tokenizer is not None)
        for file in sorted(Path(aside).iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(target / file.name)
    if native:
        _logger.warning(
            "The base's own multi-token modules (%d tensors, such as %s) were copied into %s without training, so in "
            "speculative decoding their drafts may be accepted less often than on the base.",
            len(native),
            next(iter(native)),
            folder,
        )
    return list(native)


def clear_export(folder: Path, base_name: str, *, template: bool = False) -> None:
    """Remove an earlier export's configuration, weights and (`template`) chat template; other files, and the base, stay.

    A leftover adapter would be applied to a whole model in the same folder, a leftover template loaded with a tokenizer that
    has none.

    Raises:
        CaftuneError: a folder has the name of a file that an export writes.
    """
    if not folder.is_dir() or folder.resolve() == Path(base_name).resolve():
        return
    names = {*_EXPORTED, *(["chat_template.jinja"] if template else [])}
    found = [path for path in folder.iterdir() if path.name in names or _SHARD.fullmatch(path.name)]
    blocked = next((path for path in found if path.is_dir() and not path.is_symlink()), None)
    if blocked is not None:
        raise CaftuneError(f"{blocked} must be a file of an earlier export or not exist, got a folder. Move it away.")
    for path in found:
        path.unlink()


def copy_adapter(checkpoint: str | os.PathLike[str], folder: Path, tokenizer: Any, *, base_name: str) -> None:
    """Export the adapter of a checkpoint unchanged. PEFT gives adapters with other names than `default` a folder each.

    Raises:
        CaftuneError: the checkpoint holds no adapter, or its weights are not finite.
    """
    files = [path for name in _ADAPTER for path in sorted(Path(checkpoint).rglob(name))]
    if len(files) < len(_ADAPTER):
        raise CaftuneError(f"{checkpoint} must hold {' and '.join(_ADAPTER)}, got neither or one. Export another one.")
    for weights in (path for path in files if path.suffix == ".safetensors"):
        refuse_not_finite(load_file(weights), f"The weights of {checkpoint}", _NOTHING_WRITTEN)
    folder.mkdir(parents=True, exist_ok=True)
    clear_export(folder, base_name, template=True)
    for path in files:
        target = folder / path.relative_to(checkpoint)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    if tokenizer is not None:
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
        return _PublishedBase(str(folder)).model_class.from_pretrained(folder, **options)
    from peft import PeftModel
    from transformers.trainer_utils import align_special_tokens

    kind = _PublishedBase(base_name, base_revision).model_class
    base = kind.from_pretrained(base_name, revision=base_revision or "main", **options)
    if vocab_size is not None and vocab_size != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(vocab_size)
    if tokenizer is not None:
        align_special_tokens(base, tokenizer)
    return PeftModel.from_pretrained(base, folder)


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
    """Raise CaftuneError for an adapter of a weight that another layer shares (tied embeddings, Zamba's block)."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if not (hasattr(module, "merge") and hasattr(module, "get_base_layer")):
            continue
        weight = getattr(module.get_base_layer(), "weight", None)
        for other, part in modules.items():
            if not other.startswith(name) and part._parameters.get("weight") is weight is not None:
                raise CaftuneError(
                    f"The adapter of {name} cannot be merged: {other} shares its weight, and would change too. Nothing was "
                    "written. Export the adapter alone (recipe: model.lora.merge=false), or adapt other layers."
                )


def _check_state_dict_keys(plain: Any, state: Mapping[str, Tensor]) -> None:
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
    """Whether the configuration ties input and output embeddings, but their weights differ."""
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


class _PublishedBase:
    """A base as it was published: its configuration and its safetensors files, as far as they are on this machine."""

    def __init__(self, name: str, revision: str | None = None) -> None:
        self.name, self.revision = name, revision
        path = self._file("config.json")
        self.config: dict[str, Any] = read_json(path) if path else {}
        self._weights = sorted(path.parent.glob("*.safetensors")) if path else []

    @property
    def model_class(self) -> Any:
        """The class it was published as: for some families not the one that AutoModelForCausalLM picks."""
        return getattr(transformers, (self.config.get("architectures") or [""])[0], AutoModelForCausalLM)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype in the configuration."""
        return getattr(torch, str(self.config.get("dtype") or self.config.get("torch_dtype")), None)

    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of every tensor in the files."""
        kinds = {key: file.get_slice(key).get_dtype() for file, key in self._tensors()}
        return {key: _DTYPES[kind] for key, kind in kinds.items() if kind in _DTYPES}

    def native_modules(self, plain: Any) -> dict[str, Tensor]:
        """Tensors that `plain` does not load and that belong to multi-token modules: named mtp, or past the last layer."""
        text = self.config.get("text_config", self.config)
        depth = text.get("num_hidden_layers") or plain.config.get_text_config().num_hidden_layers
        loaded, found = set(plain.state_dict()), {}
        for file, key in self._tensors():
            layer = _LAYER_KEY.search(key)
            if key not in loaded and (_MTP_KEY.search(key) or (layer and int(layer[1]) >= depth)):
                found[key] = file.get_tensor(key)
        return found

    def copy_processors(self, folder: Path) -> None:
        """Copy the processors of a base for several media, without which its class cannot be loaded."""
        for name in _PROCESSORS if "text_config" in self.config else ():
            if not (folder / name).is_file() and (found := self._file(name, fetch=True)):
                shutil.copy(found, folder)

    def _tensors(self) -> Iterator[tuple[Any, str]]:
        """Each safetensors file, opened, with each key in it."""
        for path in self._weights:
            with safe_open(path, "pt") as file:
                yield from ((file, key) for key in list(file.keys()))

    def _file(self, name: str, *, fetch: bool = False) -> Path | None:
        """A file of the base; None if it does not exist, or (without `fetch`) is not on this machine."""
        with suppress(OSError, ValueError):
            found = (
                cached_file(self.name, name, revision=self.revision, local_files_only=not fetch) if self.name else None
            )
            return Path(found) if found else None
        return None
