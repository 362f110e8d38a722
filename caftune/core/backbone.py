"""The parts of a Hugging Face causal language model that heads use.

A hook captures the arguments of the last decoder layer's call, and a head is called with the same ones: masks, rotary phases,
sliding windows and packing are passed on without being named here. `Backbone.of(model)` finds the parts and checks them on
eight tokens: (1) the last layer called again, then the final norm and the unembedding, must give the model's logits;
(2) changing a later token must not change earlier logits. A model that fails (1) carries MLP heads only, behind the first
part from which its logits can be rebuilt; a model that fails (2) is refused.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from caftune.core.cross_entropy import Unembedding
from caftune.core.probes import try_call
from caftune.core.replay import LayerCall, Mixer, choose_mixer
from caftune.errors import CaftuneError

_PROBE_TOKENS = 8


class UnsupportedModelError(CaftuneError):
    """The model cannot carry auxiliary heads, for the reason that the message gives."""


@dataclass(frozen=True)
class Backbone:
    """The parts of a causal LM that heads use, by name, so that modules wrapped later (PEFT, FSDP) are found."""

    model: Any  # a transformers model with a language-modelling head
    layer_name: str  # the last decoder layer; the whole trunk where `copy_refusal` is set
    closing_names: tuple[str, ...]
    width: int
    scale: float
    softcap: float | None
    copy_refusal: str | None = None  # why the last layer cannot be copied; None where it can
    mixer: Mixer | None = None  # for running a copy at some positions only; None: at all

    @classmethod
    def of(cls, model: Any) -> "Backbone":
        """Find the parts of `model` and check them on eight tokens.

        Raises:
            UnsupportedModelError: no output embeddings, logits that cannot be rebuilt, or a model compiled or not causal.
        """
        _refuse_compiled(model)
        name = type(model).__name__
        if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
            raise UnsupportedModelError(f"{name} has no output embeddings. caftune needs a causal language model.")
        draft = cls(model, "", (), 0, *_logit_transform(model.config.get_text_config()))
        _refuse_rescaling(model)
        with evaluating(model), torch.no_grad(), _as_flash_attention_needs(model):
            _refuse_not_causal(model)
            try:
                return _verified(replace(draft, layer_name=last_layer(model)))
            except UnsupportedModelError as error:
                refusal = str(error)
            try:
                return _verified(replace(draft, layer_name=_name_of(draft.trunk, model), copy_refusal=refusal))
            except UnsupportedModelError:
                raise UnsupportedModelError(f"{refusal}, so it cannot carry auxiliary heads.") from None

    @property
    def layer(self) -> nn.Module:
        """The last decoder layer."""
        return self.model.get_submodule(self.layer_name)

    @property
    def trunk(self) -> nn.Module:
        """The model without its unembedding."""
        return _trunk(self.model)

    @contextmanager
    def capture(self) -> Iterator[LayerCall]:
        """Within the block, a forward pass of the model fills the yielded `LayerCall`."""
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

    def close(self, hidden: Float[Tensor, "... width"]) -> Float[Tensor, "... unembedding_width"]:
        """Apply the modules between the last layer and the unembedding (the final norm)."""
        for name in self.closing_names:
            hidden = self.model.get_submodule(name)(hidden)
        return hidden

    def unembedding(self) -> Unembedding:
        """The current output projection; within a forward pass gathered, if FSDP2 shards it.

        DeepSpeed ZeRO-3 gathers by itself what a forward pass reads of another module, until that pass ends.
        """
        head = self.model.get_output_embeddings()
        if isinstance(head.weight, DTensor) and isinstance(head, FSDPModule):
            head.unshard()  # its own forward, which would gather the weight, is not called
        return Unembedding(head.weight, getattr(head, "bias", None), self.scale, self.softcap)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, gathered if FSDP2 shards it (then every rank must call)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 partitions it: it is empty outside `gathered` and the forward passes that read it."""
    return hasattr(parameter, "ds_status")


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape, of a parameter that ZeRO-3 partitions when it is whole."""
    return getattr(parameter, "ds_shape", parameter.shape)


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within the block, parameters that ZeRO-3 partitions are whole (every rank must enter it)."""
    absent = [p for p in parameters if is_partitioned(p) and p.ds_status.name == "NOT_AVAILABLE"]  # type: ignore[attr-defined]
    if not absent:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(absent):
        yield


def _trunk(model: Any) -> nn.Module:
    """The base model; where the class names none (Mllama), the part that holds the input embeddings."""
    if model.base_model is not model:
        return model.base_model
    embeddings = model.get_input_embeddings()
    return next(part for part in model.children() if embeddings in part.modules())


def _name_of(part: nn.Module, model: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


def last_layer(model: Any) -> str:
    """Name of the last decoder layer: the end of the outermost list of as many modules as the configuration has layers.

    Lists within the decoder come first: a vision tower may have as many blocks as the language model has layers.
    """
    config, trunk = model.config.get_text_config(), _trunk(model)
    # num_hidden_layers counts the attention layers where a decoder layer has several (LongCat: num_layers counts the others);
    # an encoder-decoder has decoder_layers (BART).
    depths = (config.num_hidden_layers, getattr(config, "num_layers", None), getattr(config, "decoder_layers", None))
    stacks = {
        name: len(module)
        for name, module in trunk.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) in depths and _is_decoder_stack(module)
    }
    if not stacks:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of {depths[0]} decoder layers that caftune can find"
        )
    decoder = set(model.get_decoder().modules())
    name = min(stacks, key=lambda name: (trunk.get_submodule(name) not in decoder, name.count(".")))
    return ".".join(filter(None, (_name_of(trunk, model), name, str(stacks[name] - 1))))


def _is_decoder_stack(layers: nn.ModuleList) -> bool:
    return all(next(layer.parameters(), None) is not None for layer in layers)


def _logit_transform(config: Any) -> tuple[float, float | None]:
    """Scale and softcap of the logits, by the names that transformers' configurations use."""
    scale = 1.0
    for attribute in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale *= _first_set(config, attribute) or 1.0
    scaling = _first_set(config, "logits_scaling")
    if scaling is not None:
        scale *= scaling if config.model_type == "hyperclovax" else 1 / scaling
    scale /= _first_set(config, "logits_mup_width_multiplier") or 1.0
    return scale, _first_set(config, "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def _first_set(config: Any, *attributes: str) -> float | None:
    values = (getattr(config, attribute, None) for attribute in attributes)
    return next((value for value in values if value is not None), None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block `model` is in evaluation mode; afterwards every module is in its earlier mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _refuse_not_causal(model: Any) -> None:
    """Changing the last token of the probe must not change the logits before it."""
    ids = probe(model)
    changed = ids.clone()
    changed[0, -1] = ids[0, 0]
    before, after = (model(input_ids=row, use_cache=False).logits[:, :-1] for row in (ids, changed))
    rounded = getattr(model, "is_quantized", False)  # LLM.int8 picks its outlier columns over the whole row
    if not is_close(after, before, tolerance=5e-2 if rounded else None):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not causal: changing a later token changes earlier logits, so heads could see their "
            "targets. Use a causal model (for some classes: is_decoder=True in the configuration)."
        )


def _verified(draft: Backbone) -> Backbone:
    """`draft` with its closing modules, if the logits rebuilt from it are the model's own."""
    model = draft.model
    with draft.capture() as call, _watch(draft) as closing_names:
        logits = model(input_ids=probe(model), use_cache=False).logits
    if call.output is None:
        raise UnsupportedModelError(f"{type(model).__name__} does not call its {draft.layer_name} in a forward pass")
    found = replace(draft, closing_names=tuple(closing_names), width=call.hidden.shape[-1])
    if not _repeats(lambda: found.unembedding().logits(found.close(call.hidden)).to(logits.dtype), logits, is_close):
        raise UnsupportedModelError(
            f"{type(model).__name__} does more between its last layer and its logits than caftune can repeat"
        )
    if found.copy_refusal is None and not _repeats(lambda: call.replay(found.layer), call.hidden, torch.equal):
        refusal = (
            f"Calling the last layer of {type(model).__name__} a second time gives another result "
            "(its layers share state between calls)"
        )
        return replace(found, copy_refusal=refusal)
    if found.copy_refusal is None:
        return replace(found, mixer=choose_mixer(found.layer, call, is_close))
    return found


@contextmanager
def _watch(draft: Backbone) -> Iterator[list[str]]:
    """Within the block, a forward pass fills in the names of the modules that run between the layer and the unembedding."""
    layer, unembedding = draft.layer, draft.model.get_output_embeddings()
    names = {module: name for name, module in draft.model.named_modules()}
    begun: list[tuple[nn.Module, tuple[nn.Module, ...]]] = []  # each with the modules it was called in
    running: list[nn.Module] = []
    finished: set[nn.Module] = set()
    is_after_layer = False

    def before(module: nn.Module, _args: Any) -> None:
        nonlocal is_after_layer
        is_after_layer = is_after_layer and module is not unembedding
        if is_after_layer:
            begun.append((module, tuple(running)))
            running.append(module)

    def after(module: nn.Module, _args: Any, _output: Any) -> None:
        nonlocal is_after_layer
        if module is layer:
            is_after_layer = True
            for record in (begun, running, finished):
                record.clear()
        elif is_after_layer and running and running[-1] is module:
            finished.add(running.pop())

    handles = [module.register_forward_pre_hook(before) for module in names]
    handles += [module.register_forward_hook(after) for module in names]
    outermost: list[str] = []
    try:
        yield outermost
        outermost += [names[module] for module, around in begun if module in finished and not finished & {*around}]
    finally:
        for handle in handles:
            handle.remove()


def has_flash_attention(model: Any) -> bool:
    """Whether its attention is a flash kernel, which computes in half precision only."""
    return "flash" in str(getattr(model.config.get_text_config(), "_attn_implementation", None))


@contextmanager
def _as_flash_attention_needs(model: Any) -> Iterator[None]:
    """Flash attention: run float32 weights under bfloat16 autocast, as a trainer will; on a CPU, use eager attention."""
    if not has_flash_attention(model):
        yield
        return
    is_full = model.dtype == torch.float32
    with torch.autocast(model.device.type, torch.bfloat16) if is_full else nullcontext():
        if model.device.type != "cpu" or _runs(model):
            yield
            return
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values()
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def _runs(model: Any) -> bool:
    return try_call(lambda: model(input_ids=probe(model), use_cache=False)) is not None


def _refuse_compiled(model: Any) -> None:
    """Refuse torch.compile around the layers: compiled code does not run the hooks that capture the last layer's call."""
    plain = getattr(model, "_orig_mod", model)
    decoder = plain.get_decoder() if hasattr(plain, "get_decoder") else None
    parts = (plain, getattr(plain, "base_model", None), decoder)
    if plain is not model or any(getattr(part, "_compiled_call_impl", None) is not None for part in parts):
        raise UnsupportedModelError(
            f"{type(plain).__name__} must not be compiled before it gets heads, which read its last layer's call. Give it "
            "without torch.compile; torch_compile=True in the trainer's arguments compiles it with its heads."
        )


def _refuse_rescaling(model: Any) -> None:
    """Refuse RWKV's rescaling: it divides the weights of later layers in evaluation, and multiplies them in training."""
    every, depth = getattr(model.config, "rescale_every", 0), getattr(model.config, "num_hidden_layers", 0)
    if 0 < every < depth:
        raise UnsupportedModelError(
            f"rescale_every must be 0, got {every} with {depth} layers: the last layer's weights would change between training "
            "and evaluation. Set it in the config.json of a local copy, or where the model is loaded: float16 alone needs it."
        )


def probe(model: Any) -> Tensor:
    """Eight tokens to try a model on."""
    embedding = model.get_input_embeddings().weight
    return torch.arange(1, _PROBE_TOKENS + 1, device=embedding.device)[None] % embedding.shape[0]


def _repeats(compute: Callable[[], Tensor], expected: Tensor, is_same: Callable[[Tensor, Tensor], bool]) -> bool:
    """Whether `compute` runs (an unknown model's parts may need more arguments) and returns `expected`."""
    found = try_call(compute)
    return found is not None and found.shape == expected.shape and is_same(found, expected)


def is_close(found: Tensor, expected: Tensor, tolerance: float | None = None) -> bool:
    """Whether two results agree up to rounding, in half precision up to its rounding."""
    is_half = torch.is_autocast_enabled(expected.device.type) or expected.dtype not in (torch.float32, torch.float64)
    tolerance = tolerance or (5e-2 if is_half else 1e-4)
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
