"""Floating-point operations of a training step, counted from the shapes of a model before it is loaded.

Only matrix products count: two operations for a multiplication with an addition. Assumptions:

- Attention covers half of an example on average (causal kernels compute no more). Its backward pass costs twice its forward
  pass, whatever is trained: both factors of its products are activations.
- The backward pass of a matrix product costs one product for the gradient of its input and one for that of its weight. A frozen
  weight has no gradient, and below the lowest trained weight there is no backward pass.
- Gradient checkpointing computes the trunk's layers once more, TRL's loss the logits. Heads compute nothing twice.
- Norms, activations, rotary phases, softmax and the optimizer are left out: less than 1% in a model of a billion weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

# The projections of attention's input, as transformers names them.
_ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj", "c_attn", "qkv_proj", "query_key_value", "Wqkv", "in_proj")
# Experts per token, as configurations name it.
_EXPERTS_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk")

Positions = Literal["labelled", "all"]


@dataclass(frozen=True)
class Anatomy:
    """Numbers of weights in matrix products (of a mixture of experts: those that one token uses)."""

    trunk: int  # P_t, of all decoder layers
    layer: int  # P_l, of the last one
    mixing: int  # of these, projections to queries, keys and values
    first_inputs: int  # of the first layer, those applied to the embeddings themselves
    unembedding: int  # P_u
    attention: int  # attention heads times their size, summed over the layers
    layer_attention: int  # the same of the last layer


@dataclass(frozen=True)
class Step:
    """What a training step computes per position. Shares and lengths are means over the data.

    A head's layer runs attention everywhere, its output projection and what follows at the head's targets.
    """

    length: float  # tokens of an example
    labelled: float = 1.0  # share of the positions that have a next token to be trained on
    heads: int = 0  # K
    head_layer: int | None = None  # weights of a head without the unembedding; None: P_l, a decoder head
    target_share: float = 1.0  # of its targets that a head is trained on
    main_positions: Positions = "labelled"  # where the model's own logits are computed
    trains: Literal["all", "adapters", "none"] = "all"  # weights of the trunk; "none" in stage 1
    trains_unembedding: bool = True
    trains_heads: bool = False  # all their weights
    adapters: int = 0  # weights of the trunk's adapters
    head_adapters: int = 0  # weights of one head's adapters
    checkpointing: bool = False  # the trunk is computed once more in the backward pass
    recomputes_logits: bool = False  # the model's own logits are
    attention_share: float = 0.5  # part of an example that a token attends to; 1 in plain products

    def targets(self, horizon: int) -> float:
        """The share of positions at which a horizon's head is trained; the last `horizon` of an example have no target."""
        return self.target_share * max(min(self.labelled, 1 - horizon / self.length), 0.0)


@dataclass(frozen=True)
class Flops:
    """Operations per token of a step's parts."""

    forward: float  # of trunk, unembedding and heads
    trunk: float  # forward and backward, like the next two
    unembedding: float
    heads: float
    recomputation: float

    @property
    def total(self) -> float:
        """Operations of a step, per token."""
        return self.trunk + self.unembedding + self.heads + self.recomputation

    def times(self, factor: float) -> "Flops":
        """All parts multiplied by `factor`."""
        return Flops(*(factor * part for part in vars(self).values()))


def anatomy_of(model: Any, layers: list[nn.Module]) -> Anatomy:
    """Count the weights of a model, which may be on the meta device, without adapters. `layers`: its decoder layers."""
    config = model.config.get_text_config()
    chosen = next(filter(None, (getattr(config, name, None) for name in _EXPERTS_CHOSEN)), 1)
    products = [list(_products(layer, chosen)) for layer in layers]
    sizes = [sum(size for _, size in found) for found in products]
    first_inputs, mixing = (
        sum(size for name, size in found if name in _ATTENTION_INPUTS) for found in (products[0], products[-1])
    )
    widths = [_attention_width(layer, config) for layer in layers]
    return Anatomy(
        trunk=sum(sizes),
        layer=sizes[-1],
        mixing=mixing,
        first_inputs=first_inputs,
        unembedding=model.get_output_embeddings().weight.numel(),
        attention=sum(widths),
        layer_attention=widths[-1],
    )


def _products(layer: nn.Module, chosen: int) -> Iterator[tuple[str, int]]:
    """Last name and size of every weight in a matrix product; of experts, the share that a token uses."""
    for name, module in layer.named_modules():
        name = name.removesuffix(".base_layer")  # PEFT's wrapping
        if isinstance(module, nn.Linear | Conv1D) and "lora_" not in name:
            yield name.rpartition(".")[2], module.weight.numel() * chosen // max(_experts_around(layer, name), chosen)
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 3 and "lora_" not in name:  # all experts in one tensor
            yield name.rpartition(".")[2], parameter.numel() * chosen // max(parameter.shape[0], chosen)


def _experts_around(layer: nn.Module, name: str) -> int:
    """The number of experts of which a module is one; 1 outside experts."""
    path = name.split(".")
    if "experts" not in path[:-1]:
        return 1
    experts = layer.get_submodule(".".join(path[: path.index("experts") + 1]))
    return len(experts) if isinstance(experts, nn.ModuleList) else 1


def _attention_width(layer: nn.Module, config: Any) -> int:
    """Attention heads times their size. Sizes may differ between layers, and between queries and values."""
    parts: list[Any] = list(layer.modules())
    heads = getattr(config, "num_attention_heads", 0)  # none in RWKV, whose mixing is called attention
    if not heads or not any("attention" in type(part).__name__.lower() for part in parts):
        return 0
    for part in parts:
        if isinstance(getattr(part, "head_dim", None), int):
            return heads * part.head_dim
        if hasattr(part, "qk_head_dim"):
            return heads * (part.qk_head_dim + part.v_head_dim) // 2
    return config.hidden_size


def flops(anatomy: Anatomy, step: Step) -> Flops:
    """Operations per token of a training step.

        forward = 2 P_t + 4 s S A + 2 f P_u + sum over heads of (2 (M + r (P_l - M)) + 4 s S A_l + 2 r P_u)

    with S tokens in an example, s the share of it that attention covers, A the width of attention, f the labelled share,
    r that of a head's targets, M the weights of its layer's projections to queries, keys and values.
    """
    covered = 4 * step.attention_share * step.length
    trunk, attention = 2.0 * anatomy.trunk, covered * anatomy.attention
    main = 0.0  # stage 1 has no next-token loss
    if step.trains != "none":
        main = 2.0 * anatomy.unembedding * (step.labelled if step.main_positions == "labelled" else 1.0)
    layers, heads_attention, logits = _heads_forward(anatomy, step, covered)
    head_layer = anatomy.layer if step.head_layer is None else step.head_layer
    head_passes = 2 + step.trains_heads + 3 * step.head_adapters / max(head_layer, 1)
    recomputation = main * step.recomputes_logits
    if step.checkpointing and step.trains != "none":
        recomputation += trunk + attention
    return Flops(
        forward=trunk + attention + main + layers + heads_attention + logits,
        trunk=_trunk(anatomy, step, trunk, attention),
        unembedding=main * (2 + step.trains_unembedding),
        heads=layers * head_passes + heads_attention * 3 + logits * (2 + step.trains_unembedding),
        recomputation=recomputation,
    )


def _trunk(anatomy: Anatomy, step: Step, products: float, attention: float) -> float:
    """Forward and backward of the decoder layers."""
    if step.trains == "none":
        return products + attention
    passes = 3 if step.trains == "all" else 2
    spared = 0.0
    if step.trains == "adapters" and not step.checkpointing:  # checkpointing needs gradients of the embeddings
        spared = 2.0 * anatomy.first_inputs
    return products * passes - spared + attention * 3 + 6.0 * step.adapters


def _heads_forward(anatomy: Anatomy, step: Step, covered: float) -> tuple[float, float, float]:
    """Operations of all heads per token: products of their layers, attention, logits."""
    layers = attention = logits = 0.0
    for horizon in range(2, step.heads + 2):
        targets = step.targets(horizon)
        products, width = _head_layer_at(anatomy, step, targets)
        layers += 2 * products
        attention += covered * width
        logits += 2 * anatomy.unembedding * targets
    return layers, attention, logits


def _head_layer_at(anatomy: Anatomy, step: Step, targets: float) -> tuple[float, float]:
    """Weights of a head's layer, and width of its attention, each times the share of the positions at which it runs."""
    if step.head_layer is not None:  # a perceptron, which sees every position
        return step.head_layer, 0
    return anatomy.mixing + targets * (anatomy.layer - anatomy.mixing), anatomy.layer_attention


def overhead(anatomy: Anatomy, step: Step, *, plain_positions: Positions = "labelled") -> float:
    """Operations of a step over those of plain fine-tuning of the same weights (stage 1: of all weights) in the same way.

    `plain_positions`: the `main_positions` of plain fine-tuning, whatever the step's are.
    """
    plain = replace(step, heads=0, main_positions=plain_positions)
    if step.trains == "none":
        plain = replace(plain, trains="all", trains_unembedding=True)
    return flops(anatomy, step).total / flops(anatomy, plain).total
