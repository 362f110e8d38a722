"""What a run costs, from the configuration of its model: parameters, memory and operations. No weight is loaded."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from caftune.core.backbone import Backbone, last_layer
from caftune.core.heads import AuxiliaryHeads, HeadsConfig
from caftune.training.flops import Flops, Step, anatomy_of, flops, overhead, skipping
from caftune.training.memory import Batch, Memory, kept_activations, logits_bytes, peak_memory
from caftune.training.trained_heads import make_trainable

# The part of a row that attention looks back over, on average: a causal kernel computes no more.
ATTENTION_SHARE = 0.5


@dataclass(frozen=True)
class Setup:
    """All that a run's cost depends on, beside its model.

    Args:
        stage: "heads": stage 1, "train": stage 2.
        heads: K; 0 for plain fine-tuning.
        rows: share of its targets that each head is trained on (sampled mode).
        leaves_out_heads: whether steps may come that run no head (`loss.min_weight`), and so are plain fine-tuning's.
        length: tokens of the longest row, to which a batch is padded; `mean_length` those of the mean row.
        labelled: share of the positions that have a next token to be trained on.
        is_packed: whether documents fill rows of `length` together: `mean_length` is then that of a document.
        is_padded: whether rows differ in length.
        padding: positions that a batch has for each token, 1 without padding.
        dtype: what the weights are loaded in; `half`: whether products run in half precision around it (bf16, fp16).
        on_gpu: kernels and optimizers of a GPU.
    """

    stage: Literal["heads", "train"] = "train"
    tuning: Literal["full", "lora", "qlora"] = "full"
    heads: int = 4
    head_kind: str = "decoder"
    trains_heads: bool = False
    heads_lora_rank: int | None = None
    rows: float = 1.0
    leaves_out_heads: bool = False
    batch_size: int = 8
    accumulation: int = 1
    length: int = 1024
    mean_length: float = 1024.0
    labelled: float = 1.0
    is_packed: bool = False
    is_padded: bool = False
    padding: float = 1.0
    checkpointing: bool = True
    optimizer: str = "adamw_torch_fused"
    dtype: torch.dtype = torch.float32
    half: bool = False
    on_gpu: bool = False

    @property
    def fill(self) -> float:
        """The share of a batch's positions that holds tokens."""
        return 1.0 if self.is_packed else self.mean_length / self.length


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights. Tied embeddings count once, as embeddings; `total` is without heads and adapters."""

    total: int
    embeddings: int
    trunk: int  # P_t and the final norm
    unembedding: int  # P_u, whether it is tied or not
    layer: int  # P_l
    heads: int
    trained: int  # of model, adapters and heads
    trained_heads: int


@dataclass(frozen=True)
class Estimate:
    """What a run costs."""

    parameters: Parameters
    memory: Memory
    flops: Flops  # per token that is no padding, as the code computes them
    overhead: (
        float  # operations of a step over plain fine-tuning's, both with a next-token loss that skips unlabelled rows
    )
    least_overhead: float  # the same, did heads ask for queries at labelled rows alone
    overhead_here: (
        float  # the same with TRL's kernel: it computes logits twice; plain fine-tuning skips rows on GPUs only
    )


def estimate(config: Any, setup: Setup, adapter: Any = None) -> Estimate:
    """Parameters, memory and operations of a run.

    Args:
        config: the model's transformers configuration.
        adapter: its LoraConfig, for lora and qlora.

    Raises:
        UnsupportedModelError: no decoder layers are found, or its last layer cannot be copied.
    """
    backbone, heads = meta_model(config, setup, adapter)
    model = backbone.model
    layers = list(model.get_submodule(backbone.layer_name.rpartition(".")[0]))
    plain = [(name, p) for name, p in model.named_parameters() if "lora_" not in name]
    parameters = _parameters(backbone, heads, plain)
    anatomy = anatomy_of(model, layers)
    step = step_of(setup, backbone, heads)
    batch = Batch(setup.batch_size, setup.length, setup.labelled * setup.fill, setup.is_padded, setup.rows)
    itemsize = 2 if setup.half else setup.dtype.itemsize
    weight = model.get_output_embeddings().weight
    skips = step.main_rows == "labelled" and (setup.on_gpu or not setup.leaves_out_heads)
    work = logits_bytes(batch, *weight.shape, has_triton=setup.on_gpu, skips=skips, itemsize=itemsize)
    memory = peak_memory(
        backbone,
        heads,
        kept=kept_activations(
            backbone,
            heads,
            batch,
            autocast=torch.bfloat16 if setup.half else None,
            trains_trunk=setup.stage == "train",
        ),
        batch=batch,
        logits=(work[0] if setup.stage == "train" else 0, work[1] if heads is not None else 0),
        optimizer=setup.optimizer,
        accumulates=setup.accumulation > 1,
        four_bits=setup.tuning == "qlora",
        checkpointing=setup.checkpointing,
        casts=setup.half and setup.dtype == torch.float32,
        on_gpu=setup.on_gpu,
    )
    ideal = skipping(step)
    return Estimate(
        parameters=parameters,
        memory=memory,
        flops=flops(anatomy, step).times(setup.padding),
        overhead=overhead(anatomy, ideal),
        least_overhead=overhead(anatomy, replace(ideal, layer_rows="needed")),
        overhead_here=overhead(anatomy, step, plain_rows=_rows_of_trl(heads=0, on_gpu=setup.on_gpu)),
    )


def meta_model(config: Any, setup: Setup, adapter: Any = None) -> tuple[Backbone, AuxiliaryHeads | None]:
    """The model on the meta device as the trainer would have it: adapters put in, frozen what is frozen; and its heads."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=setup.dtype)
    model.train()
    # Not Backbone.of, which compares numbers.
    backbone = Backbone(model, last_layer(model), (), model.config.get_text_config().hidden_size, 1.0, None)
    heads = None
    if setup.heads > 0:
        heads = AuxiliaryHeads.build(backbone, HeadsConfig(setup.heads, setup.head_kind)).requires_grad_(False)
        if setup.stage == "heads" or setup.trains_heads:
            with torch.device("meta"):
                make_trainable(heads, lora_rank=None if setup.stage == "heads" else setup.heads_lora_rank)
    if setup.stage == "heads":
        model.requires_grad_(False)
    elif adapter is not None:
        _put_in(model, adapter, setup)
    if setup.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        if adapter is not None:
            model.enable_input_require_grads()
    return backbone, heads


def _put_in(model: Any, adapter: Any, setup: Setup) -> None:
    from peft import get_peft_model

    with torch.device("meta"):
        get_peft_model(model, adapter, low_cpu_mem_usage=True)
    if setup.tuning == "qlora":  # as SFTTrainer has them (TRL 1.16)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)


def step_of(setup: Setup, backbone: Backbone, heads: AuxiliaryHeads | None) -> Step:
    """What a step of the run computes: its padding is computed like any token."""
    adapters = sum(p.numel() for name, p in backbone.model.named_parameters() if "lora_" in name and p.dim() == 2)
    one = heads.heads[0] if heads is not None else nn.Identity()
    head_adapters = sum(p.numel() for name, p in one.named_parameters() if "lora_" in name)
    trains: Literal["all", "adapters", "none"] = "all" if setup.tuning == "full" else "adapters"
    return Step(
        length=setup.mean_length * setup.padding,
        labelled=setup.labelled / setup.padding,
        heads=setup.heads,
        head_layer=sum(p.numel() for p in one.parameters()) if setup.head_kind == "mlp" and heads else None,
        rows=setup.rows,
        trains="none" if setup.stage == "heads" else trains,
        trains_unembedding=bool(backbone.model.get_output_embeddings().weight.requires_grad),
        trains_heads=setup.stage == "heads" or (setup.trains_heads and setup.heads_lora_rank is None),
        adapters=adapters,
        head_adapters=head_adapters,
        checkpointing=setup.checkpointing,
        main_rows=_rows_of_trl(setup.heads, on_gpu=setup.on_gpu),
        recomputes_logits=True,
        attention_share=ATTENTION_SHARE,
    )


def _rows_of_trl(heads: int, *, on_gpu: bool) -> Literal["labelled", "all"]:
    """Of which positions TRL's kernel (1.16) computes logits: beside heads it is given the labelled ones alone."""
    return "labelled" if on_gpu or heads > 0 else "all"


def _parameters(backbone: Backbone, heads: AuxiliaryHeads | None, plain: list[tuple[str, nn.Parameter]]) -> Parameters:
    model = backbone.model
    total = sum(p.numel() for _, p in plain)
    embeddings, unembedding = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    own = unembedding.numel() if unembedding is not embeddings else 0
    of_heads = list(heads.named_parameters()) if heads is not None else []
    trained_heads = sum(p.numel() for _, p in of_heads if p.requires_grad)
    layer = sum(p.numel() for name, p in backbone.layer.named_parameters() if "lora_" not in name)
    return Parameters(
        total=total,
        embeddings=embeddings.numel(),
        trunk=total - embeddings.numel() - own,
        unembedding=unembedding.numel(),
        layer=layer,
        heads=sum(p.numel() for name, p in of_heads if "lora_" not in name),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad) + trained_heads,
        trained_heads=trained_heads,
    )
