"""Heads of the paper's reference implementation (caft-llm) as a heads folder, with the same outputs.

It saves `heads.pth`: a pickled dict of tensors, key `I.layers.0.NAME` for tensor NAME of head I (from 0), which predicts the
token I + 2 ahead. A head is one Llama decoder layer that reads the input of the base's last layer; its output goes to the
base's unembedding without a norm. The pickle is read by torch's restricted reader, which runs none of its code.
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.hub import extract_commit_hash

from caftune.checkpoints.heads_folder import HUB_ERRORS, HUB_ID, file_name, hub_reason, save_heads
from caftune.checkpoints.opening import opening
from caftune.core.backbone import Backbone
from caftune.core.finite import refuse_not_finite
from caftune.core.heads import AuxiliaryHeads, HeadsConfig
from caftune.errors import CaftuneError
from caftune.files import file_sha256, refuse_filled_folder

FILE = "heads.pth"
_KEY = re.compile(r"(\d+)\.layers\.(\d+)\.(.+)")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def import_heads(source: str, base: str, folder: str | Path, *, revision: str | None = None) -> Path:
    """Write the reference's heads as a heads folder for `base`. Returns the folder.

    Args:
        source: a heads.pth, a folder with one, or a hub id owner/name[@revision] (only that file is downloaded).
        base: the model that they were trained for, a folder or a hub id. Their file does not name it: only shapes are compared.
        folder: new or empty.
        revision: of the base on the hub.

    Raises:
        CaftuneError: no such file, one that holds anything but the tensors of such heads, or a base of other shapes.
    """
    target = Path(folder)
    refuse_filled_folder(target)
    file, commit = _find(source)
    heads = _by_head(_read(file), file)
    with opening(base, "BASE", revision=revision):
        tokenizer: Any = AutoTokenizer.from_pretrained(base, revision=revision or "main")
        model: Any = AutoModelForCausalLM.from_pretrained(base, revision=revision or "main", dtype="auto")
    backbone = Backbone.of(model)
    _refuse_other_shapes(heads, backbone, file, base)
    state = {f"heads.{index}.{name}": tensor for index, head in enumerate(heads) for name, tensor in head.items()}
    origin = {"file": file_name(source), "commit": commit, "sha256": file_sha256(file)}
    config = HeadsConfig(len(heads), final_norm=False)
    save_heads(
        target,
        AuxiliaryHeads(config, []),  # `state` has the weights
        backbone,
        tokenizer,
        training={"imported_from": origin},
        state=state,
        revision=revision,
    )
    return target


def _find(source: str) -> tuple[Path, str | None]:
    """The file, and its commit on the hub."""
    path = Path(source)
    if path.is_file():
        return path, None
    if path.is_dir() or not HUB_ID.fullmatch(source):
        if not (path / FILE).is_file():
            what = f"a folder without {FILE}" if path.is_dir() else "neither"
            raise CaftuneError(
                f"{source} must be a file, a folder with {FILE} or a hub id, got {what}. Check the name."
            )
        return path / FILE, None
    repository, _, revision = source.partition("@")
    try:
        file = hf_hub_download(repository, FILE, revision=revision or None)
    except HUB_ERRORS as error:
        raise CaftuneError(
            f"{source} must be a file, a folder or a repository on the hub with {FILE}, got neither ({hub_reason(error)}). "
            "Check the name; private heads need `hf auth login`."
        ) from error
    return Path(file), extract_commit_hash(file, None)


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a state dict that torch.save wrote. No code of the pickle runs."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises errors of any kind
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"a pickle that calls {refused[1]}" if refused else "another or a damaged file"
        raise CaftuneError(
            f"{file} must hold a dict of tensors that torch.save wrote, got {what}. No code of it was run. Copy or download it "
            "again (from Git: `git lfs pull`)."
        ) from error
    if not isinstance(found, dict):
        raise CaftuneError(f"{file} must hold a dict of tensors, got {type(found).__name__}. Name another file.")
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
            got = f"{tensor.dtype}, {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CaftuneError(
                f"{file}: {name} must be a tensor of floating-point numbers, got {got}. Name another file."
            )
    refuse_not_finite(found, str(file), "Copy or download it again.")
    return found


def _by_head(state: Mapping[str, Tensor], file: Path) -> list[dict[str, Tensor]]:
    """The tensors of each head, by their names in its layer."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _KEY.fullmatch(str(key))
        if match is None:
            remedy = "Heads with an own unembedding (separate_unembedding) or of another program cannot be imported."
            raise CaftuneError(f"{file} must hold keys like 0.layers.0.self_attn.q_proj.weight, got {key!r}. {remedy}")
        if match[2] != "0":
            raise CaftuneError(
                f"{file} must hold one layer for each head, got another one in {key}. Heads of several layers cannot be "
                "imported."
            )
        # Tensors may share memory, which safetensors refuses.
        found.setdefault(int(match[1]), {})[match[3]] = tensor.clone()
    if sorted(found) != list(range(len(found))) or not found:
        raise CaftuneError(
            f"{file} must hold heads numbered from 0 without a gap, got {sorted(found) or 'none'}. Copy it again."
        )
    return [found[index] for index in range(len(found))]


def _refuse_other_shapes(heads: list[dict[str, Tensor]], backbone: Backbone, file: Path, base: str) -> None:
    """Raise CaftuneError where a head is not a layer as the base's last one, or no head can branch off before that."""
    width, unembedding = backbone.width, backbone.unembedding().weight.shape[1]
    if backbone.copy_refusal is not None or width != unembedding:
        reason = (
            backbone.copy_refusal or f"Its unembedding reads vectors of {unembedding} numbers, its layers write {width}"
        )
        raise CaftuneError(f"{base} must be able to carry the decoder heads of {file}. {reason}. Name another base.")
    expected = {name: tuple(tensor.shape) for name, tensor in backbone.layer.state_dict().items()}
    for index, head in enumerate(heads):
        found = {name: tuple(tensor.shape) for name, tensor in head.items()}
        odd = next((name for name in (*found, *expected) if found.get(name) != expected.get(name)), None)
        if odd is not None:
            got, own = (shapes.get(odd, "none") for shapes in (found, expected))
            raise CaftuneError(
                f"{file} must hold layers as the last one of {base}: {index}.layers.0.{odd} has the shape {got}, in the base "
                f"{own}. Name the base that the heads were trained for."
            )
