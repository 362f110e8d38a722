"""Auxiliary heads: what they are, and how they run inside a model's forward pass."""

import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, make_dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FSDPModule

from caftune.core.adapters import strip_adapters
from caftune.core.backbone import Backbone, LayerCall, UnsupportedModelError, evaluating
from caftune.core.cross_entropy import Unembedding, log_likelihood, summed_loss
from caftune.core.objective import IGNORED, horizon_targets
from caftune.core.replay import at_rows, run_at
from caftune.core.sequential_heads import weighted_sum
from caftune.core.targets import Sample, Teacher
from caftune.errors import CaftuneError

# Where each kind of head leaves the trunk, in stage 1 and stage 2 alike.
FORK_POINTS: dict[str, str] = {"decoder": "input of the last layer", "mlp": "output of the last layer"}
# The heads' name inside the model that carries them.
ATTRIBUTE = "auxiliary_heads"
_HALF = (torch.bfloat16, torch.float16)
_PLAIN = (*_HALF, torch.float32, torch.float64)
# Arguments of a causal LM that its trunk does not take.
_OUTPUT_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch", "fused_lm_head", "logits_to_keep")


@dataclass(frozen=True)
class HeadsConfig:
    """How many heads, of which kind. Head i (from 0) predicts horizon i + 2.

    `decoder`: a copy of the last decoder layer. `mlp`: a residual two-layer perceptron, for models whose last layer is
    dear to copy (mixtures of experts) or cannot be called twice.
    """

    count: int = 4
    kind: str = "decoder"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise CaftuneError(f"count must be at least 1, got {self.count}.")
        if self.kind not in FORK_POINTS:
            raise CaftuneError(f"kind must be one of {', '.join(FORK_POINTS)}, got {self.kind!r}.")

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
        # A generator of its own, so that building heads does not move the global random state.
        initial = torch.randn(width, normed_width, generator=torch.Generator().manual_seed(seed)) / normed_width**0.5
        with torch.no_grad():
            self.up.weight.copy_(initial)
            self.down.weight.zero_()

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens *streams width"],
        normed: Float[Tensor, "batch tokens normed_width"],
    ) -> Float[Tensor, "batch tokens *streams width"]:
        """Hidden states in the place of the last layer's output; where that has several streams, each gets the same change."""
        change = self.down(nn.functional.silu(self.up(normed)))
        return hidden + (change if hidden.dim() == change.dim() else change.unsqueeze(-2))


class AuxiliaryHeads(nn.Module):
    """The heads of one model. Each has its own hidden layer; all share the model's final norm and unembedding."""

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
        """As `build`, on a model that PEFT may have wrapped: adapters are left out. The weights are then loaded."""
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
            return backbone.close(call.replay(head))
        return backbone.close(head(call.hidden, backbone.close(call.hidden)))

    def hidden_at(
        self, index: int, backbone: Backbone, call: LayerCall, rows: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows width"]:
        """`hidden` at `rows` alone, which count through the batch. Other rows are computed where the head must see them."""
        head = self.heads[index]
        if self.config.kind == "mlp":
            hidden = at_rows(call.hidden, rows)
            hidden = head(hidden, backbone.close(hidden))
        elif backbone.mixer is None or len(rows) in (0, call.hidden.shape[:2].numel()) or _is_checkpointed(head):
            hidden = at_rows(call.replay(head), rows)
        else:
            hidden = run_at(head, backbone.mixer, call, rows)
        return backbone.close(hidden)[0]

    # torch.compile would guard on the closures below, which are new in every call, and on every count of targets. The model
    # around the heads is compiled.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        backbone: Backbone,
        call: LayerCall,
        labels: Int[Tensor, "batch tokens"],
        *,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        soft: bool = False,
        soft_top_k: int | None = None,
        weights: Float[Tensor, " scored"] | None = None,
        sample: Sample | None = None,
    ) -> dict[str, Tensor]:
        """Score the horizons of a batch, one head after another.

        Args:
            soft: hold horizon h at position t to the model's own next-token distribution at t + h - 1, where the token
                t + h is a target, instead of to that token.
            soft_top_k: of these distributions keep the so many most likely tokens; None: all.
            weights: of the first so many horizons in `loss`; the others are not scored. None: all are, and there is no `loss`.
            sample: score a share of the targets, and estimate the sums over all of them; None: score all.

        Returns:
            `nll`: sum of -log p over the horizon's targets (soft: of KL divergences), in nats, shape [heads];
            `count`: number of targets, shape [heads]; `correct`: targets that were the most likely token (soft: rows where
            model and head agree on it), shape [heads]. With `weights` also `loss`, the sum of weights * nll: it has the
            gradient and nll has none, for every head's is computed at once (`at_once`), where that is possible.
        """
        horizons = self.config.horizons[: None if weights is None else len(weights)]
        where = {"position_ids": position_ids, "attention_mask": attention_mask}
        every = [horizon_targets(labels, horizon, **where).flatten() for horizon in horizons]
        unembedding = backbone.unembedding()
        teacher = None
        if soft:
            teacher = Teacher.of(call.hidden, horizon_targets(labels, 1, **where) != IGNORED, backbone, soft_top_k)

        def score(index: int, call: LayerCall, loss_of: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
            targets, horizon = every[index], horizons[index]
            rows, factor = (targets != IGNORED).nonzero()[:, 0], 1.0
            if sample is not None:
                rows, factor = sample.of(rows, horizon)
            with autocast_like(call.hidden):
                hidden = self.hidden_at(index, backbone, call, rows)
                if teacher is not None:
                    loss, hits = teacher.distance(hidden, unembedding, rows, horizon)
                else:
                    loss, hits = loss_of(hidden, unembedding, targets[rows])
            return loss * factor, hits * factor

        scores = {"count": torch.stack([(targets != IGNORED).sum() for targets in every])}
        given = call.differentiable()
        own = [self._trained(index, backbone, unembedding) for index in range(len(horizons))]
        has_gradients = torch.is_grad_enabled() and any((given, *own))
        if weights is None or not has_gradients or not call.is_open or self._is_sharded(backbone):
            parts = [score(index, call, _loss_in_graph) for index in range(len(horizons))]
            nll, correct = (torch.stack(part) for part in zip(*parts, strict=True))
            loss = {} if weights is None else {"loss": (weights.to(nll.dtype) * nll).sum()}
            return {"nll": nll, "correct": correct, **scores, **loss}

        def score_at_once(index: int, instead: list[Tensor]) -> tuple[Tensor, Tensor]:
            return score(index, call.with_tensors(given, instead), summed_loss)

        with _keeping_activations(self.heads):
            total, nll, correct = weighted_sum(score_at_once, weights, given, own)
        return {"nll": nll, "correct": correct, **scores, "loss": total}

    def _trained(self, index: int, backbone: Backbone, unembedding: Unembedding) -> list[Tensor]:
        """The weights between the fork and head `index`'s loss that have a gradient."""
        closing = (backbone.model.get_submodule(name) for name in backbone.closing_names)
        parameters = [p for module in (self.heads[index], *closing) for p in module.parameters()]
        return [p for p in (*parameters, unembedding.weight, unembedding.bias) if p is not None and p.requires_grad]

    def _is_sharded(self, backbone: Backbone) -> bool:
        """Whether FSDP2 holds parts of it: its hooks take a gradient in the forward pass for the backward pass of the step."""
        parts = (backbone.model, backbone.layer, backbone.model.get_output_embeddings(), *self.heads)
        return any(isinstance(part, FSDPModule) for part in parts)


def _loss_in_graph(hidden: Tensor, unembedding: Unembedding, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`summed_loss`, but without keeping a gradient of the weight for each head."""
    if not unembedding.weight.requires_grad:
        return summed_loss(hidden, unembedding, targets)
    likelihood, hits = log_likelihood(hidden, unembedding, targets)
    return -likelihood.sum(), hits.sum()


def _is_checkpointed(head: nn.Module) -> bool:
    """Whether it will be computed again in the backward pass, when hooks set for its forward pass are gone."""
    is_own = head.training and getattr(head, "gradient_checkpointing", False)
    return torch.is_grad_enabled() and bool(is_own or isinstance(head, ActivationWrapper))


@contextmanager
def _keeping_activations(heads: nn.ModuleList) -> Iterator[None]:
    """Within the block no head checkpoints: its backward pass follows at once, and would only compute it twice."""
    checkpointed = [part for part in heads.modules() if getattr(part, "gradient_checkpointing", False)]
    for part in checkpointed:
        part.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for part in checkpointed:
            part.gradient_checkpointing = True  # type: ignore[assignment]


def attach_heads(backbone: Backbone, heads: AuxiliaryHeads) -> None:
    """Put `heads` inside the model, so that its devices, wrappers and optimizer see them, and let its forward run them.

    Afterwards `model(..., labels=labels, auxiliary="add")` returns the model's own outputs and, under `auxiliary`, what
    `AuxiliaryHeads.forward` returns; `auxiliary="only"` runs the trunk without a graph and returns the heads' part alone,
    `auxiliary="soft"` the same with the model's own distributions (or their `soft_top_k` likeliest tokens) as targets; without
    the argument the forward is as it was. `auxiliary_weights` and `auxiliary_sample` are the `weights` and `sample` of
    `AuxiliaryHeads.forward`; `auxiliary_labels` are labels for the heads alone, where the model is called without `labels`.
    Only this instance changes. `model.save_pretrained` leaves the heads out.
    """
    model = backbone.model
    if hasattr(model, ATTRIBUTE):
        raise CaftuneError("The model already carries auxiliary heads. Call detach_heads(model) first.")
    signature = inspect.signature(type(model).forward)

    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        auxiliary: str | None = None,
        soft_top_k: int | None = None,
        auxiliary_weights: Tensor | None = None,
        auxiliary_sample: Sample | None = None,
        auxiliary_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        # `self` and not `model`: a deep copy of the model runs its own parts.
        if auxiliary is None:
            return self._caftune_inner_forward(*args, **kwargs)
        kwargs = _by_name(signature, self, args, kwargs)
        labels = kwargs.get("labels") if auxiliary_labels is None else auxiliary_labels
        if auxiliary not in ("add", "only", "soft"):
            raise CaftuneError(f"auxiliary must be 'add', 'only', 'soft' or None, got {auxiliary!r}.")
        if labels is None:
            raise CaftuneError("labels must be given for the auxiliary losses, got none.")
        # No loss reads a cache; with one, transformers does not tell packed documents apart, and some layers write in place.
        kwargs |= {"return_dict": True, "use_cache": False}
        own = replace(backbone, model=self)
        own.unembedding()  # FSDP2 gathers it here, before TRL's fused head would, whose gradient stays on its rank (TRL 1.16)
        with own.capture() as call:
            outputs: Any = None
            if auxiliary == "add":
                with _at_labelled_rows(own.trunk, kwargs) as arguments:
                    outputs = self._caftune_inner_forward(**arguments)
            else:
                _run_trunk(own, **kwargs)
        where = {name: kwargs.get(name) for name in ("position_ids", "attention_mask")}
        scores = getattr(self, ATTRIBUTE)(
            own,
            call,
            labels,
            soft=auxiliary == "soft",
            soft_top_k=soft_top_k,
            weights=auxiliary_weights,
            sample=auxiliary_sample,
            **where,
        )
        if outputs is None:
            return {"auxiliary": scores}
        kind: Any = type(outputs)
        return _with_auxiliary(kind)(**outputs, auxiliary=scores)

    inner = model.forward
    setattr(model, ATTRIBUTE, heads)
    model._caftune_inner_forward = inner
    model.forward = types.MethodType(forward, model)
    model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *_keys(heads)}


def _by_name(signature: inspect.Signature, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name. TypeError, as from the model's forward, for too many or one given twice."""
    given = signature.bind_partial(model, *args).arguments
    named = dict(list(given.items())[1:])
    twice = next((name for name in named if name in kwargs), None)
    if twice is not None:
        raise TypeError(f"{type(model).__name__}.forward got multiple values for argument {twice!r}.")
    return {**named, **kwargs}


def detach_heads(model: Any) -> AuxiliaryHeads:
    """Undo `attach_heads` and return the heads: the model is an ordinary one again."""
    heads = getattr(model, ATTRIBUTE)
    delattr(model, ATTRIBUTE)
    inner = model.__dict__.pop("_caftune_inner_forward")
    del model.forward
    if getattr(inner, "__func__", None) is not type(model).forward:
        model.forward = inner
    model._keys_to_ignore_on_save = set(model._keys_to_ignore_on_save) - set(_keys(heads))
    return heads


def _keys(heads: AuxiliaryHeads) -> list[str]:
    return [f"{ATTRIBUTE}.{key}" for key in heads.state_dict()]


@functools.cache
def _with_auxiliary(kind: Any) -> Any:
    """An output class with one more field: DDP takes outputs apart and builds them again by their fields."""
    return make_dataclass(f"{kind.__name__}WithAuxiliary", [("auxiliary", Any, None)], bases=(kind,))


@contextmanager
def _at_labelled_rows(trunk: nn.Module, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Within the block, TRL's fused head is given the rows that have a next token to be trained on, and no others.

    On a GPU it picks them itself; elsewhere (TRL 1.16) it computes the logits of every row and drops what it does not need.
    """
    if not arguments.get("fused_lm_head") or arguments.get("shift_labels") is not None:
        yield arguments
        return
    targets = horizon_targets(arguments["labels"], 1).flatten()
    rows = (targets != IGNORED).nonzero()[:, 0]

    def cut(_trunk: nn.Module, _args: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        output = copy.copy(output)  # heads that leave behind the whole trunk look at the one it returned
        output.last_hidden_state = at_rows(hidden, rows.to(hidden.device))
        return output

    handle = trunk.register_forward_hook(cut)
    try:
        yield {**arguments, "labels": None, "shift_labels": targets[rows][None]}
    finally:
        handle.remove()


def _run_trunk(backbone: Backbone, **kwargs: Any) -> None:
    """Run the trunk as a fixed function: no graph, no dropout."""
    kwargs = {name: value for name, value in kwargs.items() if name not in _OUTPUT_ARGUMENTS}
    with torch.no_grad(), evaluating(backbone.trunk):
        backbone.trunk(**{**kwargs, "use_cache": False})


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
    """Put plain linear layers, in the dtype of the layer's norms, in the place of bitsandbytes' 4-bit and 8-bit ones."""
    quantised = {name: module for name, module in layer.named_modules() if _is_quantised(module)}
    # Not the quantised layers' biases: bitsandbytes casts them to its own compute dtype in a forward pass.
    others = (module for module in layer.modules() if not _is_quantised(module))
    dtypes = (p.dtype for module in others for p in module.parameters(recurse=False))
    plain = next(dtypes, torch.get_default_dtype())
    for name, module in quantised.items():
        weight: Any = module.weight
        if not isinstance(module, nn.Linear) or type(weight).__name__ not in ("Params4bit", "Int8Params"):
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
    return isinstance(weight, nn.Parameter) and weight.dtype not in _PLAIN


def autocast_like(hidden: Tensor) -> AbstractContextManager[Any]:
    """Run float32 master heads in the precision of a half-precision trunk."""
    return torch.autocast(hidden.device.type, dtype=hidden.dtype) if hidden.dtype in _HALF else nullcontext()
