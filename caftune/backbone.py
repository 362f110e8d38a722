"""What the method needs to know of the inside of a Hugging Face causal language model.

The last decoder layer is watched, not rebuilt: a forward pre-hook keeps the arguments of its call, and an auxiliary head
is called with the same ones. Masks, rotary phases, sliding windows and packing come along without being named here.
`Backbone.of(model)` finds the parts, runs eight tokens through the model, and refuses a model on which replaying the last
layer, the final norm and the unembedding does not give the model's own output.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.cache_utils import Cache

from caftune.cross_entropy import Unembedding

# Keyword arguments that would let a replayed layer read or write a cache. All are optional in every decoder layer.
_CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past", "cache_params", "cache_position")
_PROBE_TOKENS = 8


class UnsupportedModelError(ValueError):
    """The model cannot carry auxiliary heads; the message says why."""


@dataclass
class LayerCall:
    """The arguments of one call of the last decoder layer, and what it returned."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None

    def replay(self, layer: nn.Module) -> Float[Tensor, "batch tokens width"]:
        """Call `layer` as the last layer was called, without a cache, and return its hidden states."""
        args = tuple(None if isinstance(value, Cache) else value for value in self.args)
        kwargs = {name: value for name, value in self.kwargs.items() if name not in _CACHE_ARGUMENTS}
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        return _hidden(layer(*args, **kwargs))

    @property
    def hidden(self) -> Float[Tensor, "batch tokens width"]:
        """The last layer's output, before the final norm."""
        return _hidden(self.output)


@dataclass(frozen=True)
class Backbone:
    """The parts of a causal LM that heads touch, by name, so that later wrapping (PEFT, FSDP) is followed."""

    model: Any  # a transformers model with a language-modelling head
    layer_name: str
    closing_names: tuple[str, ...]
    width: int
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: Any) -> "Backbone":
        """Find the parts of `model` and verify them on eight tokens.

        Raises:
            UnsupportedModelError: no list of decoder layers, no output embeddings, or a replay that differs.
        """
        name = type(model).__name__
        if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
            raise UnsupportedModelError(f"{name} has no output embeddings. caftune needs a causal language model.")
        layers_name = _find_layers(model)
        scale, softcap = _logit_transform(model.config.get_text_config())
        draft = cls(model, f"{layers_name}.{_last_index(model, layers_name)}", (), 0, scale, softcap)
        with evaluating(model), torch.no_grad():
            return _verified(draft, parent_name=layers_name.rpartition(".")[0])

    @property
    def layer(self) -> nn.Module:
        """The last decoder layer."""
        return self.model.get_submodule(self.layer_name)

    @property
    def trunk(self) -> nn.Module:
        """The model without its unembedding."""
        return self.model.base_model

    @contextmanager
    def capture(self) -> Iterator[LayerCall]:
        """Within the block, a forward pass of the model fills in the yielded `LayerCall`."""
        call = LayerCall()

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call.args, call.kwargs = args, kwargs

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            call.output = output

        layer = self.layer
        handles = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
        try:
            yield call
        finally:
            for handle in handles:
                handle.remove()

    def close(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows unembedding_width"]:
        """What the model does between its last layer and its unembedding (the final norm)."""
        for name in self.closing_names:
            hidden = self.model.get_submodule(name)(hidden)
        return hidden

    def unembedding(self) -> Unembedding:
        """The output projection as it stands now; within a forward pass, whole where FSDP2 has sharded it."""
        head = self.model.get_output_embeddings()
        if isinstance(head.weight, DTensor) and isinstance(head, FSDPModule):
            head.unshard()  # its own forward, which would gather the weight, is not called
        return Unembedding(head.weight, getattr(head, "bias", None), self.scale, self.softcap)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, gathered where FSDP2 has sharded it (then every rank must call)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output


def _find_layers(model: Any) -> str:
    """Name of the list of decoder layers: the outermost of its length within the trunk."""
    depth = model.config.get_text_config().num_hidden_layers
    trunk = next(name for name, module in model.named_modules() if module is model.base_model)
    names = [
        f"{trunk}.{name}" if trunk else name
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and _is_decoder_stack(module)
    ]
    if not names:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of {depth} decoder layers that caftune can find."
        )
    return min(names, key=lambda name: name.count("."))


def _is_decoder_stack(layers: nn.ModuleList) -> bool:
    return all(next(layer.parameters(), None) is not None for layer in layers)


def _last_index(model: Any, layers_name: str) -> int:
    return len(model.get_submodule(layers_name)) - 1


def _logit_transform(config: Any) -> tuple[float, float | None]:
    """Scale and softcap of the logits, under the names transformers' configurations use for them."""
    scale = 1.0
    for attribute in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, attribute, None)
        if value is not None:
            scale *= value
    scaling = getattr(config, "logits_scaling", None)
    if scaling is not None:
        scale *= scaling if config.model_type == "hyperclovax" else 1 / scaling
    return scale, getattr(config, "final_logit_softcapping", None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block `model` is in evaluation mode; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _verified(draft: Backbone, *, parent_name: str) -> Backbone:
    """`draft` with its closing modules, after comparing a replay with the model's own output."""
    model = draft.model
    order: list[str] = []
    handles = [
        child.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, child in model.get_submodule(parent_name).named_children()
        if not isinstance(child, nn.ModuleList)
    ]
    handles.append(draft.layer.register_forward_hook(lambda *_: order.clear()))
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(1, _PROBE_TOKENS + 1, device=embedding.device)[None] % embedding.shape[0]
    try:
        with draft.capture() as call:
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    names = tuple(f"{parent_name}.{name}" if parent_name else name for name in order)
    found = replace(draft, closing_names=names, width=call.hidden.shape[-1])
    hidden = call.replay(found.layer)
    if not torch.equal(hidden, call.hidden):
        raise UnsupportedModelError(
            f"Calling the last layer of {type(model).__name__} a second time gives another result "
            "(its layers share state between calls), so it cannot carry auxiliary heads."
        )
    rebuilt = found.unembedding().logits(found.close(hidden)).to(logits.dtype)
    tolerance = 1e-4 if logits.dtype in (torch.float32, torch.float64) else 5e-2
    if not torch.allclose(rebuilt, logits, rtol=tolerance, atol=tolerance * float(logits.abs().max())):
        raise UnsupportedModelError(
            f"{type(model).__name__} does more between its last layer and its logits than caftune can repeat, "
            "so it cannot carry auxiliary heads."
        )
    return found
