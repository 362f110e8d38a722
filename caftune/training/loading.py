"""Loading what a run starts from: the base, its tokenizer and its heads."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel
from transformers import AutoProcessor, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from caftune.checkpoints.fingerprint import base_fingerprint
from caftune.checkpoints.heads_folder import describe_heads, find_heads, load_heads
from caftune.core.backbone import Backbone
from caftune.core.heads import AuxiliaryHeads, HeadsConfig
from caftune.errors import CaftuneError

if TYPE_CHECKING:
    from caftune.training.config import CAFTConfig

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """The heads of a run and their place in the model; all None in a run without heads."""

    heads: AuxiliaryHeads | None = None
    backbone: Backbone | None = None
    description: dict[str, Any] | None = None  # heads.json of the heads that were loaded
    fingerprint: dict[str, Any] | None = None  # stage 1: the base's, before SFTTrainer adds tokens
    tokenizer: Any = None  # the base's, where it is known


def name_of(model: Any) -> str:
    """The folder or hub id that a model was loaded from; empty where there is none."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", ""))


def load_processing_class(name: str, args: "CAFTConfig") -> Any:
    """The tokenizer or processor of a model, as SFTTrainer would load it."""
    options: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    trust = options.get("trust_remote_code", args.trust_remote_code)
    return AutoProcessor.from_pretrained(name, revision=options.get("revision"), trust_remote_code=trust)


def text_tokenizer(processing_class: Any) -> Any:
    """The tokenizer itself, or that inside the processor of a multimodal model."""
    return processing_class if hasattr(processing_class, "get_vocab") else processing_class.tokenizer


def load_or_build_heads(model: PreTrainedModel | PeftModel, args: Any, tokenizer: Any) -> Start:
    """The heads in the folder `args.heads`; in stage 1 without a folder, new heads."""
    if not args.has_heads:
        return Start()
    backbone = Backbone.of(model.get_base_model() if isinstance(model, PeftModel) else model)
    fingerprint = base_fingerprint(backbone) if args.pretrain_heads else None
    if args.heads is None:
        built = AuxiliaryHeads.build(backbone, HeadsConfig(args.num_heads, args.head_kind))
        return Start(built, backbone, None, fingerprint, tokenizer)
    folder = find_heads(args.heads)
    heads = load_heads(folder, backbone, tokenizer, force=args.force_heads)
    return Start(heads, backbone, describe_heads(folder), fingerprint, tokenizer)


def load_base(name: str, args: "CAFTConfig", quantization_config: Any) -> PreTrainedModel | PeftModel:
    """The base as SFTTrainer would load it. For a folder with an adapter: its base with the adapter, to be trained further."""
    from caftune.training._trl import create_model_from_path  # here, because CAFTMixin does without TRL

    options: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    if quantization_config is not None:
        if "quantization_config" in options:
            raise CaftuneError("quantization_config must be given once, got it in model_init_kwargs too. Remove one.")
        options["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    options.setdefault("trust_remote_code", args.trust_remote_code)
    if not holds_adapter(name):
        return create_model_from_path(name, **options)
    base = PeftConfig.from_pretrained(name)
    options.setdefault("revision", base.revision)
    model = create_model_from_path(str(base.base_model_name_or_path), **options)
    return PeftModel.from_pretrained(model, name, is_trainable=True)


def holds_adapter(name: str) -> bool:
    """Whether `name` is a folder with a PEFT adapter and no whole model."""
    folder = Path(name)
    has_weights = any((folder / file).is_file() for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    return (folder / "adapter_config.json").is_file() and not has_weights


def holds_tokenizer(name: str) -> bool:
    """Whether `name` is a folder with a tokenizer."""
    return Path(name, "tokenizer_config.json").is_file()


def freeze_unembedding(model: Any) -> None:
    """Exclude the output layer from training, and with it the embeddings where both are one matrix (a warning says so).

    Raises:
        CaftuneError: it is not trained anyway, as next to adapters.
    """
    weights = list(model.get_output_embeddings().parameters())
    if hasattr(model, "peft_config") or not any(weight.requires_grad for weight in weights):
        raise CaftuneError(
            "freeze_unembedding must be False where the output layer is not trained anyway, as next to adapters. Leave it out."
        )
    for weight in weights:
        weight.requires_grad_(False)
    if model.get_input_embeddings().weight is model.get_output_embeddings().weight:
        _logger.warning(
            "freeze_unembedding also freezes the embeddings: in this model they are the output layer's matrix."
        )
