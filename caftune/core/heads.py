"""Auxiliary heads: what they are, how they are built, and how their losses are computed."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FSDPModule

from caftune.core.adapters import strip_adapters
from caftune.core.backbone import Backbone, UnsupportedModelError, is_partitioned
from caftune.core.cross_entropy import Unembedding, log_likelihood, summed_loss
from caftune.core.finite import is_packed
from caftune.core.objective import HorizonTargets, Sample
from caftune.core.replay import LayerCall, at_positions, run_at
from caftune.core.sequential_heads import weighted_sum
from caftune.core.soft_targets import Teacher
from caftune.errors import CaftuneError

# Where each kind of head leaves the trunk, in stage 1 and stage 2 alike.
FORK_POINTS: dict[str, str] = {"decoder": "input of the last layer", "mlp": "output of the last layer"}
_HALF = (torch.bfloat16, torch.float16)
_NOT_QUANTISED = (*_HALF, torch.float32, torch.float64)


@dataclass(frozen=True)
class HeadsConfig:
    """The number of heads and their kind. Head i (from 0) predicts horizon i + 2.

    `decoder`: a copy of the last decoder layer. `mlp`: a residual two-layer perceptron, for models whose last layer is
    expensive to copy (mixtures of experts) or cannot be called twice.

    `final_norm`: whether a head's output goes through the model's final norm before the unembedding, as the last layer's does.
    It does not in the paper's reference implementation, whose decoder heads can be imported.
    """

    count: int = 4
    kind: str = "decoder"
    final_norm: bool = True

    def __post_init__(self) -> None:
        if self.count < 1:
            raise CaftuneError(f"count must be at least 1, got {self.count}.")
        if self.kind not in FORK_POINTS:
            raise CaftuneError(f"kind must be one of {', '.join(FORK_POINTS)}, got {self.kind!r}.")
        if self.kind == "mlp" and not self.final_norm:
            raise CaftuneError("final_norm must be true for MLP heads, which begin as the model's own prediction.")

    @property
    def horizons(self) -> list[int]:
        """The horizons of the heads: 2 .. count + 1."""
        return list(range(2, self.count + 2))


class MLPHead(nn.Module):
    """hidden + down(silu(up(norm(hidden)))), `down` starting at zero: at first the head repeats the model's own output."""

    def __init__(self, width: int, like: Float[Tensor, "vocabulary normed_width"], *, seed: int) -> None:
        super().__init__()
        normed_width = like.shape[1]
        self.up = nn.utils.skip_init(nn.Linear, normed_width, width, bias=False, dtype=like.dtype, device=like.device)
        self.down = nn.utils.skip_init(nn.Linear, width, width, bias=False, dtype=like.dtype, device=like.device)
        # Not torch's global generator: building heads must not change the random numbers of a run.
        initial = torch.randn(width, normed_width, generator=torch.Generator().manual_seed(seed)) / normed_width**0.5
        with torch.no_grad():
            self.up.weight.copy_(initial)
            self.down.weight.zero_()

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens *streams width"],
        normed: Float[Tensor, "batch tokens normed_width"],
    ) -> Float[Tensor, "batch tokens *streams width"]:
        """Hidden states that replace the last layer's output; of several streams, each gets the same change."""
        change = self.down(nn.functional.silu(self.up(normed)))
        return hidden + (change if hidden.dim() == change.dim() else change.unsqueeze(-2))


class AuxiliaryHeads(nn.Module):
    """The heads of one model: a hidden layer per head; all share the model's final norm (if any) and unembedding."""

    def __init__(self, config: HeadsConfig, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.heads = nn.ModuleList(modules)

    @classmethod
    def build(cls, backbone: Backbone, config: HeadsConfig) -> "AuxiliaryHeads":
        """Untrained heads for a model: each starts as a working next-token predictor.

        Call it before PEFT wraps the model: a copy made later would carry adapters.

        Raises:
            UnsupportedModelError: the model is already wrapped by PEFT, or its last layer cannot be copied.
        """
        if any("lora_" in name for name, _ in backbone.model.named_parameters()):
            raise UnsupportedModelError(
                "The model already carries LoRA weights, which its heads would copy. Build the heads on the plain model, "
                "or give CAFTTrainer the plain model and a peft_config."
            )
        return cls.copied(backbone, config)

    @classmethod
    def copied(cls, backbone: Backbone, config: HeadsConfig) -> "AuxiliaryHeads":
        """As `build`, of a model that PEFT may have wrapped, without its adapters. Use it where the weights are then loaded."""
        if config.kind == "decoder":
            if backbone.copy_refusal is not None:
                raise UnsupportedModelError(
                    f"{backbone.copy_refusal}, so it cannot carry decoder heads. Use MLP heads: "
                    "head_kind='mlp' (recipe: heads.kind)."
                )
            return cls(config, [_copy_of(backbone.layer) for _ in config.horizons])
        return cls(config, [MLPHead(backbone.width, backbone.unembedding().weight, seed=h) for h in config.horizons])

    def hidden(self, index: int, backbone: Backbone, call: LayerCall) -> Float[Tensor, "batch tokens width"]:
        """Head `index`'s hidden states at every position, ready for the unembedding."""
        head = self.heads[index]
        if self.config.kind == "decoder":
            return self.close(call.replay(head), backbone)
        return self.close(head(call.hidden, backbone.close(call.hidden)), backbone)

    def close(self, hidden: Float[Tensor, "... width"], backbone: Backbone) -> Float[Tensor, "... unembedding_width"]:
        """What the unembedding is given of a head's output."""
        return backbone.close(hidden) if self.config.final_norm else hidden

    def hidden_at(
        self, index: int, backbone: Backbone, call: LayerCall, positions: Int[Tensor, " positions"]
    ) -> Float[Tensor, "positions width"]:
        """`hidden` at `positions` only, counted through the batch. The head's attention still sees all positions."""
        head = self.heads[index]
        is_everywhere = len(positions) == call.hidden.shape[:2].numel()
        if self.config.kind == "mlp":
            hidden = at_positions(call.hidden, positions)
            hidden = head(hidden, backbone.close(hidden))
        elif backbone.mixer is None or len(positions) == 0 or is_everywhere or _is_checkpointed(head):
            hidden = at_positions(call.replay(head), positions)
        else:
            hidden = run_at(head, backbone.mixer, call, positions)
        return self.close(hidden, backbone)[0]

    # torch.compile would guard on the closures below, which are new in every call, and on every count of targets. The model
    # around the heads is compiled.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        backbone: Backbone,
        call: LayerCall,
        targets: HorizonTargets,
        *,
        soft: bool = False,
        soft_top_k: int | None = None,
        weights: Float[Tensor, " scored"] | None = None,
        sample: Sample | None = None,
    ) -> dict[str, Tensor]:
        """Score the horizons of a batch, one head after another.

        Args:
            targets: of the heads' horizons, and of horizon 1 where `soft`.
            soft: the target of horizon h at position t is the model's own next-token distribution at t + h - 1, where token
                t + h is a target, instead of that token.
            soft_top_k: number of most likely tokens to keep of these distributions; None: all.
            weights: of the first `scored` horizons in `loss`; the others are not scored. None: all are, without a `loss`.
            sample: score a share of the targets, and estimate the sums over all of them; None: score all.

        Returns:
            `nll`: sum of -log p over the horizon's targets (soft: of KL divergences), in nats, shape [heads];
            `count`: number of targets, shape [heads]; `correct`: targets that were the most likely token (soft: positions
            where model and head agree on it), shape [heads]. With `weights` also `loss`, the sum of weights * nll. It has the
            gradient and nll has none, because each head's is computed with its loss (`sequential_heads`) where possible.
        """
        horizons = self.config.horizons[: None if weights is None else len(weights)]
        device = call.hidden.device
        counts = targets.counts_of(horizons).to(device, non_blocking=True)
        targets = targets.to(device)
        unembedding = backbone.unembedding()
        teacher = Teacher.of(call.hidden, targets.at(1)[0], backbone, soft_top_k) if soft else None
        scored, factors = (targets, [1.0] * len(horizons)) if sample is None else targets.drawn(sample, horizons)

        def score(index: int, call: LayerCall, loss_of: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
            horizon = horizons[index]
            positions, tokens = scored.at(horizon)
            with autocast_like(call.hidden):
                hidden = self.hidden_at(index, backbone, call, positions)
                if teacher is not None:
                    loss, hits = teacher.distance(hidden, unembedding, positions, horizon)
                else:
                    loss, hits = loss_of(hidden, unembedding, tokens)
            return loss * factors[index], hits * factors[index]

        given = call.differentiable()
        own = [self._trained(index, backbone, unembedding) for index in range(len(horizons))]
        has_gradients = torch.is_grad_enabled() and any((given, *own))
        if weights is None or not has_gradients or not call.all_tensors_visible or self._is_sharded(backbone):
            # One graph for all heads.
            with _own_random_numbers(device):
                parts = [score(index, call, _loss_in_graph) for index in range(len(horizons))]
            nll, correct = (torch.stack(part) for part in zip(*parts, strict=True))
            loss = {} if weights is None else {"loss": (weights.to(nll.dtype) * nll).sum()}
            return {"nll": nll, "correct": correct, "count": counts, **loss}

        def score_alone(index: int, instead: list[Tensor]) -> tuple[Tensor, Tensor]:
            return score(index, call.with_tensors(given, instead), summed_loss)

        with _keeping_activations(self.heads), _own_random_numbers(device):
            total, nll, correct = weighted_sum(score_alone, weights, given, own)
        return {"nll": nll, "correct": correct, "count": counts, "loss": total}

    def _trained(self, index: int, backbone: Backbone, unembedding: Unembedding) -> list[Tensor]:
        """The trained weights between the fork point and head `index`'s loss."""
        names = backbone.closing_names if self.config.final_norm else ()
        closing = (backbone.model.get_submodule(name) for name in names)
        parameters = [p for module in (self.heads[index], *closing) for p in module.parameters()]
        return [p for p in (*parameters, unembedding.weight, unembedding.bias) if p is not None and p.requires_grad]

    def _is_sharded(self, backbone: Backbone) -> bool:
        """Whether FSDP2 or ZeRO-3 shards parts: a gradient in the forward pass would count for the step's backward pass."""
        head = backbone.model.get_output_embeddings()
        parts = (backbone.model, backbone.layer, head, *self.heads)
        return is_partitioned(head.weight) or any(isinstance(part, FSDPModule) for part in parts)


def _loss_in_graph(hidden: Tensor, unembedding: Unembedding, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`summed_loss`, but without holding a gradient of the weight for each head."""
    if not unembedding.weight.requires_grad or is_partitioned(unembedding.weight):  # empty in the backward pass
        return summed_loss(hidden, unembedding, targets)
    likelihood, hits = log_likelihood(hidden, unembedding, targets)
    return -likelihood.sum(), hits.sum()


def _is_checkpointed(head: nn.Module) -> bool:
    """Whether it is computed again in the backward pass, where the hooks of `run_at` are gone."""
    is_own = head.training and getattr(head, "gradient_checkpointing", False)
    return torch.is_grad_enabled() and bool(is_own or isinstance(head, ActivationWrapper))


def _own_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """What heads draw (dropout) leaves the model's random numbers as they are, so that arms of a comparison share them."""
    is_accelerator = device.type in ("cuda", "xpu")
    return torch.random.fork_rng(
        [device] if is_accelerator else [], device_type=device.type if is_accelerator else "cuda"
    )


@contextmanager
def _keeping_activations(heads: nn.ModuleList) -> Iterator[None]:
    """Within the block no head checkpoints: its backward pass follows immediately, so nothing would be saved."""
    checkpointed = [part for part in heads.modules() if getattr(part, "gradient_checkpointing", False)]
    for part in checkpointed:
        part.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for part in checkpointed:
            part.gradient_checkpointing = True  # type: ignore[assignment]


def _copy_of(layer: nn.Module) -> nn.Module:
    """A deep copy without hooks (placement and capture hooks belong to the original) and with trainable weights."""
    twin = copy.deepcopy(layer)
    for module in twin.modules():
        for name, value in vars(module).items():
            if name.endswith("_hooks") or "_hooks_" in name:
                value.clear()
        if module.__dict__.pop("_hf_hook", None) is not None:  # accelerate's placement wraps forward on the instance
            module.__dict__.pop("forward", None)
            module.__dict__.pop("_old_forward", None)
    twin = strip_adapters(twin)
    _dequantise(twin)
    return twin.requires_grad_(True)


def _dequantise(layer: nn.Module) -> None:
    """Replace bitsandbytes' 4-bit and 8-bit linear layers by plain ones in the dtype of the layer's norms."""
    quantised = {name: module for name, module in layer.named_modules() if _is_quantised(module)}
    # Not the quantised layers' biases: bitsandbytes casts them to its own compute dtype in a forward pass.
    others = (module for module in layer.modules() if not _is_quantised(module))
    dtypes = (p.dtype for module in others for p in module.parameters(recurse=False))
    plain = next(dtypes, torch.get_default_dtype())
    for name, module in quantised.items():
        weight: Any = module.weight
        if not isinstance(module, nn.Linear) or not is_packed(weight):
            raise UnsupportedModelError(
                f"A decoder head is a copy of the last layer, whose weights are {weight.dtype} here, a quantisation that "
                "caftune cannot undo. Use head kind mlp, or load the base in 4 bits with bitsandbytes, or unquantised."
            )
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # it needs bitsandbytes

        values = dequantize_bnb_weight(weight, getattr(module, "state", None))
        linear = nn.utils.skip_init(
            nn.Linear, module.in_features, module.out_features, bias=module.bias is not None, device=weight.device
        ).to(plain)
        with torch.no_grad():
            linear.weight.copy_(values)
            if module.bias is not None:
                linear.bias.copy_(module.bias)
        layer.set_submodule(name, linear)


def _is_quantised(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and (is_packed(weight) or weight.dtype not in _NOT_QUANTISED)


def autocast_like(hidden: Tensor) -> AbstractContextManager[Any]:
    """Run float32 master heads in the precision of a half-precision trunk."""
    return torch.autocast(hidden.device.type, dtype=hidden.dtype) if hidden.dtype in _HALF else nullcontext()
