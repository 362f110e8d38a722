"""Fingerprints of models and tokenizers: which base heads belong to, and which model gave an answer."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.hub import cached_file, extract_commit_hash

from caftune.core.adapters import original_state
from caftune.core.backbone import Backbone, gathered, whole
from caftune.core.finite import is_packed
from caftune.files import file_sha256

_SAMPLED_ROWS = 64
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Keys of a configuration that say nothing about the architecture: its origin, what trainers are free to set, and the size of
# the vocabulary, which the heads never see.
_VOLATILE = {
    *("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache"),
    *("quantization_config", "output_router_logits", "router_aux_loss_coef"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id", "vocab_size"),
    *("attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout"),
}


def base_fingerprint(backbone: Backbone) -> dict[str, Any]:
    """The architecture of a base, and hashes of samples of the weights that heads share or were copied from.

    Weights are sampled after rounding to bfloat16, so a base loaded in float32 and in bfloat16 gives one fingerprint. The
    last layer of a quantised base has none (None).
    """
    config, head = backbone.model.config, backbone.model.get_output_embeddings()
    is_plain = all(p.dtype in _PLAIN and not is_packed(p) for p in backbone.layer.parameters())
    with gathered([*head.parameters(), *backbone.layer.parameters()]):
        layer, unembedding = original_state(backbone.layer), original_state(head)
        return {
            "model_type": config.model_type,
            "architecture": json.loads(json.dumps(_without_volatile(config.to_dict()), default=str)),
            "unembedding": _sampled_sha256({"weight": unembedding["weight"]}),
            "last_layer": _sampled_sha256(layer) if is_plain else None,
        }


def differences(one: Mapping[str, Any], other: Mapping[str, Any], place: str = "") -> list[str]:
    """The differences of two configurations, as `key (one -> other)`; keys that only one library version knows are ignored."""
    found = []
    for key in sorted(set(one) & set(other)):
        if isinstance(one[key], dict) and isinstance(other[key], dict):
            found += differences(one[key], other[key], f"{place}{key}.")
        elif one[key] != other[key]:
            found.append(f"{place}{key} ({one[key]!r} -> {other[key]!r})")
    return found


def model_fingerprint(name: str, revision: str | None = None) -> str:
    """An identifier of a published model: its commit on the hub, or a hash of a folder's files."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{commit_of(name, revision, fetch=True)}"
    configs = [folder / file for file in ("config.json", "generation_config.json")]
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return _sha256("".join(file_sha256(path) for path in [*configs, *weights] if path.is_file()))


def commit_of(name: str, revision: str | None, *, fetch: bool) -> str | None:
    """The commit of a model on the hub: now (`fetch`), or when this machine last loaded it. None where it is not known."""
    with nullcontext() if fetch else suppress(OSError, ValueError):
        file = cached_file(name, "config.json", revision=revision or "main", local_files_only=not fetch)
        return extract_commit_hash(file, None)
    return None


def tokenizer_fingerprint(tokenizer: Any, *, size: int | None = None) -> str:
    """A hash of the vocabulary and its ids; with `size`, of the `size` tokens with the lowest ids."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))[:size]
    return _sha256(json.dumps(sorted(tokens)))


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_volatile(item) for key, item in value.items() if key not in _VOLATILE}
    return value


def _sampled_sha256(tensors: Mapping[str, Tensor]) -> str:
    """A hash of up to 64 rows of each tensor, evenly spaced."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        sample = whole(tensors[name].detach())
        if sample.dim():
            rows = torch.linspace(0, sample.shape[0] - 1, min(_SAMPLED_ROWS, sample.shape[0])).long()
            sample = sample[rows.to(sample.device)]
        digest.update(name.encode())
        digest.update(sample.to(torch.bfloat16).contiguous().cpu().reshape(-1).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
