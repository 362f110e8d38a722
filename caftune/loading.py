"""What a run of the trainer starts from: the base, and its heads."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel
from trl.trainer.utils import create_model_from_path

from caftune.backbone import Backbone
from caftune.checkpoint import base_fingerprint, describe_heads, find_heads, load_heads
from caftune.config import CAFTConfig
from caftune.heads import AuxiliaryHeads, HeadsConfig


@dataclass(frozen=True)
class Start:
    """The heads of a run and where they go; all None in a run without."""

    heads: AuxiliaryHeads | None = None
    backbone: Backbone | None = None
    description: dict[str, Any] | None = None  # heads.json of the heads that were loaded
    fingerprint: dict[str, Any] | None = None  # stage 1: the base's, before SFTTrainer adds tokens


def load_tokenizer(model: PreTrainedModel, args: CAFTConfig) -> Any:
    """The model's own tokenizer."""
    options: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    trust = options.get("trust_remote_code", args.trust_remote_code)
    name, revision = model.config._name_or_path, options.get("revision")
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust)


def text_tokenizer(processing_class: Any) -> Any:
    """The tokenizer, where a model of several media has a processor around it."""
    return processing_class if hasattr(processing_class, "get_vocab") else processing_class.tokenizer


def load_or_build_heads(model: PreTrainedModel, args: CAFTConfig, tokenizer: Any) -> Start:
    """The heads of `args.heads`, or in stage 1 without these new ones."""
    if args.heads is None and not args.pretrain_heads:
        return Start()
    backbone = Backbone.of(model)
    fingerprint = base_fingerprint(backbone) if args.pretrain_heads else None
    if args.heads is None:
        built = AuxiliaryHeads.build(backbone, HeadsConfig(args.num_heads, args.head_kind))
        return Start(built, backbone, fingerprint=fingerprint)
    folder = find_heads(args.heads)
    heads = load_heads(folder, backbone, tokenizer, force=args.force_heads)
    return Start(heads, backbone, describe_heads(folder), fingerprint)


def load_base(name: str, args: CAFTConfig, quantization_config: Any) -> PreTrainedModel:
    """The base as SFTTrainer would load it."""
    options: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    options.setdefault("trust_remote_code", args.trust_remote_code)
    return create_model_from_path(name, **options)


def keep_trainable_on_cpu(model: Any) -> None:
    """bitsandbytes 0.50 packs 4-bit weights in an evaluation on a CPU, into a layout through which no gradient flows."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
