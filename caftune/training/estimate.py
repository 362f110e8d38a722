"""What a run costs, from the configuration of its model: parameters, memory and operations. No weight is loaded."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from caftune.core.backbone import Backbone, last_layer
from caftune.core.heads import AuxiliaryHeads, HeadsConfig
from caftune.training.flops import Flops, Step, anatomy_of, flops, overhead
from caftune.training.loading import freeze_unembedding
from caftune.training.memory import Memory, step_memory
from caftune.training.run_setup import Setup
from caftune.training.trained_heads import make_trainable

# The part of its example that a token attends to, on average: causal kernels compute no more.
ATTENTION_SHARE = 0.5


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights. Tied embeddings count once, as embeddings; `total` is without heads and adapters."""

    total: int
    embeddings: int
    trunk: int  # P_t and the final norm
    unembedding: int  # P_u, tied or not
    layer: int  # P_l
    heads: int
    trained: int  # of model, adapters and heads
    trained_heads: int


@dataclass(frozen=True)
class Estimate:
    """What a run costs. Each overhead is the operations of a step over those of plain fine-tuning."""

    parameters: Parameters
    memory: Memory
    flops: Flops  # per token without padding, as the code computes them
    overhead: float  # where both next-token losses skip unlabelled positions and compute nothing twice
    # With TRL's loss: it computes logits twice, and plain fine-tuning skips positions on GPUs only.
    overhead_here: float


def estimate(config: Any, setup: Setup, adapter: Any = None) -> Estimate:
    """Parameters, memory and operations of a run.

    Args:
        config: the model's transformers configuration.
        adapter: its LoraConfig, for lora and qlora.

    Raises:
        UnsupportedModelError: no decoder layers are found, or its last layer cannot be copied.
    """
    backbone, heads = meta_model(config, setup, adapter)
    parameters = _parameters(backbone, heads)
    anatomy = anatomy_of(backbone.model, list(backbone.model.get_submodule(backbone.layer_name.rpartition(".")[0])))
    step = step_of(setup, backbone, heads)
    ideal = replace(step, main_positions="labelled", recomputes_logits=False)
    return Estimate(
        parameters=parameters,
        memory=step_memory(backbone, heads, setup),
        flops=flops(anatomy, step).times(setup.padding),
        overhead=overhead(anatomy, ideal),
        overhead_here=overhead(anatomy, step, plain_positions="labelled" if setup.on_gpu else "all"),
    )


def meta_model(config: Any, setup: Setup, adapter: Any = None) -> tuple[Backbone, AuxiliaryHeads | None]:
    """The model on the meta device, with adapters and frozen weights as in the trainer, and its heads."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=setup.dtype)
    model.train()
    # Backbone.of would compare values, which a meta model does not have.
    backbone = Backbone(model, last_layer(model), (), model.config.get_text_config().hidden_size, 1.0, None)
    heads = None
    if setup.heads > 0:
        heads = AuxiliaryHeads.build(backbone, HeadsConfig(setup.heads, setup.head_kind)).requires_grad_(False)
        if setup.stage == "heads" or setup.trains_heads:
            with torch.device("meta"):
                rank = None if setup.stage == "heads" else setup.heads_lora_rank
                make_trainable(heads, lora_rank=rank, adapters={} if adapter is None else {"default": adapter})
    if setup.stage == "heads":
        model.requires_grad_(False)
    elif adapter is not None:
        _add_adapter(model, adapter, setup.tuning)
    elif setup.freezes_unembedding:
        freeze_unembedding(model)
    if setup.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        if adapter is not None:
            model.enable_input_require_grads()
    return backbone, heads


def _add_adapter(model: Any, adapter: Any, tuning: str) -> None:
    from peft import get_peft_model

    with torch.device("meta"):
        get_peft_model(model, adapter, low_cpu_mem_usage=True)
    if tuning == "qlora":  # SFTTrainer (TRL 1.16) casts the adapters
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)


def step_of(setup: Setup, backbone: Backbone, heads: AuxiliaryHeads | None) -> Step:
    """What a step of the run computes, per position: padding is computed like any token."""
    adapters = sum(p.numel() for name, p in backbone.model.named_parameters() if "lora_" in name and p.dim() == 2)
    one = heads.heads[0] if heads is not None else nn.Identity()
    trains: Literal["all", "adapters", "none"] = "all" if setup.tuning == "full" else "adapters"
    return Step(
        length=setup.mean_length * setup.padding,
        labelled=setup.labelled / setup.padding,
        heads=setup.heads,
        head_layer=sum(p.numel() for p in one.parameters()) if setup.head_kind == "mlp" and heads else None,
        target_share=setup.target_share,
        trains="none" if setup.stage == "heads" else trains,
        trains_unembedding=bool(backbone.model.get_output_embeddings().weight.requires_grad),
        trains_heads=heads is not None and all(p.requires_grad for p in heads.parameters()),  # in full
        adapters=adapters,
        head_adapters=sum(p.numel() for name, p in one.named_parameters() if "lora_" in name),
        checkpointing=setup.checkpointing,
        main_positions="labelled" if setup.skips_unlabelled else "all",
        recomputes_logits=True,
        attention_share=ATTENTION_SHARE,
    )


def _parameters(backbone: Backbone, heads: AuxiliaryHeads | None) -> Parameters:
    model = backbone.model
    total = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    embeddings, unembedding = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    untied = unembedding.numel() if unembedding is not embeddings else 0
    of_heads = list(heads.named_parameters()) if heads is not None else []
    trained_heads = sum(p.numel() for _, p in of_heads if p.requires_grad)
    return Parameters(
        total=total,
        embeddings=embeddings.numel(),
        trunk=total - embeddings.numel() - untied,
        unembedding=unembedding.numel(),
        layer=sum(p.numel() for name, p in backbone.layer.named_parameters() if "lora_" not in name),
        heads=sum(p.numel() for name, p in of_heads if "lora_" not in name),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad) + trained_heads,
        trained_heads=trained_heads,
    )
