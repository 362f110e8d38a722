"""What a training step computes, in floating-point operations: counted from the shapes of a model, before it is loaded.

Only matrix products count: two operations for a multiplication with an addition. What is assumed:

- Attention looks back over half a row on average (a causal kernel computes no more), and costs in the backward pass twice what
  it costs in the forward pass, whatever is trained: both factors of its products are activations.
- A backward pass costs a matrix product once for the gradient of its input and once more for that of its weight; a frozen
  weight has none, and below the lowest trained weight there is no backward pass.
- Gradient checkpointing computes the trunk's layers once more, TRL's kernel the logits of the next-token loss. Heads compute
  nothing twice.
- Norms, activations, rotary phases, softmax and the optimizer are left out: less than 1% in a model of a billion weights.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

_KEYS_AND_VALUES = ("k_proj", "v_proj")
# What attention makes of its input, by the names that transformers gives it.
_ATTENTION_INPUTS = ("q_proj", *_KEYS_AND_VALUES, "c_attn", "qkv_proj", "query_key_value", "Wqkv", "in_proj")
# How many experts a token meets, by the names in configurations.
_EXPERTS_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk")


@dataclass(frozen=True)
class Anatomy:
    """How many weights take part in matrix products (of a mixture of experts: those that one token meets).

    Args:
        layers: number of decoder layers.
        trunk: P_t, the weights of all of them.
        layer: P_l, of the last one.
        mixing: of these, the ones that attention makes queries, keys and values with.
        keys_values: of these, the ones for keys and values; None where the layer does not tell them apart.
        first_inputs: weights of the first layer that meet the embeddings themselves.
        unembedding: P_u.
        attention: heads times their size, added up over the layers.
        layer_attention: that of the last layer.
    """

    layers: int
    trunk: int
    layer: int
    mixing: int
    keys_values: int | None
    first_inputs: int
    unembedding: int
    attention: int
    layer_attention: int


@dataclass(frozen=True)
class Step:
    """What a training step does with a token. Shares and lengths are means over the data.

    Args:
        length: tokens of a row.
        labelled: share of the positions that have a next token to be trained on.
        heads: K.
        head_layer: weights of a head without the unembedding; None: P_l, a decoder head.
        rows: share of its targets that a head is trained on.
        layer_rows: where a head's layer runs. "needed": keys and values everywhere, the rest at its targets alone, which is the
            least possible; "mixed": attention everywhere, its output projection and all after it at the targets; "all".
        logit_rows: "labelled": logits of targets alone; "all": of every position (the textbook's stacked logits).
        main_rows: the same, of the model's own output.
        trains: which weights of the trunk are trained: all, adapters or (stage 1) none.
        trains_unembedding: whether the unembedding is trained.
        trains_heads: whether the heads are, in full.
        adapters: weights of the trunk's adapters.
        head_adapters: weights of the adapters of one head.
        checkpointing: whether the trunk is computed once more in the backward pass.
        recomputes_logits: whether the logits of the next-token loss are.
        attention_share: the part of a row that attention looks back over: 0.5 for a causal kernel, 1 for plain products.
    """

    length: float
    labelled: float = 1.0
    heads: int = 0
    head_layer: int | None = None
    rows: float = 1.0
    layer_rows: Literal["needed", "mixed", "all"] = "mixed"
    logit_rows: Literal["labelled", "all"] = "labelled"
    main_rows: Literal["labelled", "all"] = "labelled"
    trains: Literal["all", "adapters", "none"] = "all"
    trains_unembedding: bool = True
    trains_heads: bool = False
    adapters: int = 0
    head_adapters: int = 0
    checkpointing: bool = False
    recomputes_logits: bool = False
    attention_share: float = 0.5

    def targets(self, horizon: int) -> float:
        """The share of positions at which the head of a horizon is trained: at most all but the last of a row."""
        return self.rows * max(min(self.labelled, 1 - horizon / self.length), 0.0)


@dataclass(frozen=True)
class Flops:
    """Operations per token of a step's parts."""

    forward: float  # of trunk, unembedding and heads
    trunk: float  # forward and backward, as are the next two
    unembedding: float
    heads: float
    recomputation: float

    @property
    def total(self) -> float:
        """Operations of a step, per token."""
        return self.trunk + self.unembedding + self.heads + self.recomputation

    def times(self, factor: float) -> "Flops":
        """As many of each."""
        return Flops(*(factor * part for part in astuple(self)))


def anatomy_of(model: Any, layers: list[nn.Module]) -> Anatomy:
    """Count the weights of a model, which may be on the meta device, adapters left out. `layers`: its decoder layers."""
    config = model.config.get_text_config()
    chosen = next(filter(None, (getattr(config, name, None) for name in _EXPERTS_CHOSEN)), 1)
    sizes = [sum(size for _, size in _products(layer, chosen)) for layer in layers]
    widths = [_attention_width(layer, config) if _has_attention(layer) else 0 for layer in layers]
    weight = model.get_output_embeddings().weight
    return Anatomy(
        layers=len(layers),
        trunk=sum(sizes),
        layer=sizes[-1],
        mixing=_attention_inputs(layers[-1], chosen),
        keys_values=_keys_values(layers[-1]),
        first_inputs=_attention_inputs(layers[0], chosen),
        unembedding=weight.shape[0] * weight.shape[1],
        attention=sum(widths),
        layer_attention=widths[-1],
    )


def _products(layer: nn.Module, chosen: int) -> Iterator[tuple[str, int]]:
    """Last name and size of every weight that takes part in a matrix product; of experts, the share that a token meets."""
    for name, module in layer.named_modules():
        name = name.removesuffix(".base_layer")  # PEFT's wrapping
        if isinstance(module, nn.Linear | Conv1D) and "lora_" not in name:
            experts = _experts_around(layer, name)
            yield name.rpartition(".")[2], module.weight.numel() * chosen // max(experts, chosen)
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 3 and "lora_" not in name:  # experts in one tensor, one of them a row
            yield name.rpartition(".")[2], parameter.numel() * chosen // max(parameter.shape[0], chosen)


def _attention_inputs(layer: nn.Module, chosen: int) -> int:
    return sum(size for name, size in _products(layer, chosen) if name in _ATTENTION_INPUTS)


def _experts_around(layer: nn.Module, name: str) -> int:
    """The number of experts that a module is one of; 1 where it is of none."""
    path = name.split(".")
    if "experts" not in path[:-1]:
        return 1
    experts = layer.get_submodule(".".join(path[: path.index("experts") + 1]))
    return len(experts) if isinstance(experts, nn.ModuleList) else 1


def _keys_values(layer: nn.Module) -> int | None:
    sizes = dict(_products(layer, 1))
    return sum(sizes[name] for name in _KEYS_AND_VALUES) if {*_KEYS_AND_VALUES} <= sizes.keys() else None


def _has_attention(layer: nn.Module) -> bool:
    return any("attention" in type(module).__name__.lower() for module in layer.modules())


def _attention_width(layer: nn.Module, config: Any) -> int:
    """Heads times their size as the layer has it: sizes may differ between layers, and between queries and values."""
    heads = getattr(config, "num_attention_heads", 0)  # none in RWKV, whose mixing is called attention
    parts: Iterator[Any] = layer.modules()
    for part in parts:
        if isinstance(getattr(part, "head_dim", None), int):
            return heads * part.head_dim
        if hasattr(part, "qk_head_dim"):
            return heads * (part.qk_head_dim + part.v_head_dim) // 2
    return config.hidden_size if heads else 0


def flops(anatomy: Anatomy, step: Step) -> Flops:
    """Operations per token of a training step.

        forward = 2 P_t + 4 s S A + 2 f P_u + sum over heads of (2 r_l P_l' + 4 s S A_l r_l + 2 r P_u)

    with S tokens in a row, s the share of it that attention looks back over, A the width of attention, f the labelled share,
    r that of a head's targets, r_l that of the positions at which its layer runs (keys and values: all).
    """
    looks = 4 * step.attention_share * step.length
    trunk, attention = 2.0 * anatomy.trunk, looks * anatomy.attention
    main = 2.0 * anatomy.unembedding * _share(step.main_rows, step.labelled)
    if step.trains == "none":
        main = 0.0  # stage 1 has no next-token loss
    layers, heads_attention, logits = _heads_forward(anatomy, step, looks)
    head_passes = 2 + step.trains_heads + 3 * step.head_adapters / max(_head_layer(anatomy, step), 1)
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


def _share(rows: str, labelled: float) -> float:
    return labelled if rows == "labelled" else 1.0


def _head_layer(anatomy: Anatomy, step: Step) -> int:
    return anatomy.layer if step.head_layer is None else step.head_layer


def _trunk(anatomy: Anatomy, step: Step, products: float, attention: float) -> float:
    """Forward and backward of the decoder layers."""
    if step.trains == "none":
        return products + attention
    passes = 3 if step.trains == "all" else 2
    spared = 0.0
    if step.trains == "adapters" and not step.checkpointing:  # checkpointing asks for gradients of the embeddings
        spared = 2.0 * anatomy.first_inputs
    return products * passes - spared + attention * 3 + 6.0 * step.adapters


def _heads_forward(anatomy: Anatomy, step: Step, looks: float) -> tuple[float, float, float]:
    """Operations of all heads per token: their layers' products, their attention, their logits."""
    layers = attention = logits = 0.0
    for horizon in range(2, step.heads + 2):
        targets = step.targets(horizon)
        products, scores = _head_rows(anatomy, step, targets)
        layers += 2 * products
        attention += looks * scores
        logits += 2 * anatomy.unembedding * (targets if step.logit_rows == "labelled" else 1.0)
    return layers, attention, logits


def _head_rows(anatomy: Anatomy, step: Step, targets: float) -> tuple[float, float]:
    """Weights of a head's layer, and width of its attention, each times the share of the positions at which it runs."""
    if step.head_layer is not None:  # a perceptron, which sees every row
        return step.head_layer, 0
    if step.layer_rows == "all":
        return anatomy.layer, anatomy.layer_attention
    if step.layer_rows == "mixed" or anatomy.keys_values is None:
        return anatomy.mixing + targets * (anatomy.layer - anatomy.mixing), anatomy.layer_attention
    everywhere = anatomy.keys_values
    return everywhere + targets * (anatomy.layer - everywhere), anatomy.layer_attention * targets


def overhead(anatomy: Anatomy, step: Step, *, plain_rows: Literal["labelled", "all"] = "labelled") -> float:
    """Operations of a step over those of plain fine-tuning of the same weights (stage 1: of all of them) in the same way.

    `plain_rows` are the `main_rows` of plain fine-tuning, whatever the step's are.
    """
    plain = replace(step, heads=0, main_rows=plain_rows)
    if step.trains == "none":
        plain = replace(plain, trains="all", trains_unembedding=True)
    return flops(anatomy, step).total / flops(anatomy, plain).total


def skipping(step: Step) -> Step:
    """The same step with a next-token loss that skips unlabelled rows and computes nothing twice."""
    return replace(step, main_rows="labelled", recomputes_logits=False)
