"""Calling the last decoder layer again: as it was called, with another layer in its place, or at some positions only.

A layer is a mixer (attention, a state space), which alone looks at other positions, among parts that treat each position by
itself: norms, residuals, a perceptron. So `run_at` calls the layer with the wanted positions only and, through hooks, gives
the mixer all positions with the call's own mask, position ids and phases. The mixer's output is cut to the wanted positions,
before its output projection where that is its last step. No part of a layer is named here: `find_mixer` finds the mixer by
watching, and `choose_mixer` compares the result with the whole layer before it is used.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_leaves, tree_map
from transformers.cache_utils import Cache

from caftune.core.probes import try_call

# Keyword arguments that would let a replayed layer read or write a cache. All are optional in every decoder layer.
_CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past", "cache_params", "cache_position", "state")
# Values through which no gradient flows, or whose tensors `tree_leaves` lists.
_VISIBLE = (Tensor, bool, int, float, str, type(None), Cache, BlockMask)


@dataclass
class LayerCall:
    """The arguments of one call of the last decoder layer, and what it returned."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None

    def replay(self, layer: nn.Module, cache: Cache | None = None) -> Float[Tensor, "batch tokens *streams width"]:
        """The hidden states of `layer`, called as the last layer was, but with `cache` in place of the model's cache."""
        args = tuple(cache if isinstance(value, Cache) else value for value in self.args)
        kwargs = {name: cache if isinstance(value, Cache) else value for name, value in self.kwargs.items()}
        if cache is None:
            kwargs = {name: value for name, value in kwargs.items() if name not in _CACHE_ARGUMENTS}
            if "use_cache" in kwargs:
                kwargs["use_cache"] = False
        return hidden_of(layer(*args, **kwargs))

    @property
    def hidden(self) -> Float[Tensor, "batch tokens *streams width"]:
        """The last layer's output, before the final norm."""
        return hidden_of(self.output)

    @property
    def input(self) -> Float[Tensor, "batch tokens *streams width"]:
        """The hidden states that the last layer was called with."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def with_input(self, hidden: Tensor) -> "LayerCall":
        """The same call with other hidden states."""
        if self.args:
            return replace(self, args=(hidden, *self.args[1:]))
        return replace(self, kwargs={**self.kwargs, "hidden_states": hidden})

    @property
    def all_tensors_visible(self) -> bool:
        """Whether `differentiable` finds every tensor (not so in Gemma 4, whose layers share some in a container)."""
        return all(isinstance(leaf, _VISIBLE) for leaf in tree_leaves((self.args, self.kwargs, self.output)))

    def differentiable(self) -> list[Tensor]:
        """The tensors of the call that gradients flow back through, each once."""
        leaves = tree_leaves((self.args, self.kwargs, self.output))
        return list({id(x): x for x in leaves if isinstance(x, Tensor) and x.requires_grad}.values())

    def with_tensors(self, given: list[Tensor], instead: list[Tensor]) -> "LayerCall":
        """The same call with the tensors `instead` in place of the tensors `given`."""
        swap = {id(old): new for old, new in zip(given, instead, strict=True)}
        args, kwargs, output = tree_map(lambda x: swap.get(id(x), x), (self.args, self.kwargs, self.output))
        return LayerCall(args, kwargs, output)


def hidden_of(output: Any) -> Tensor:
    """The hidden states that a layer returned: the output itself, or the first element of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


@dataclass(frozen=True)
class Mixer:
    """The part of a layer that must see all positions, and its surroundings, by their names in the layer."""

    name: str
    norm: str | None  # applied to the layer's input before the mixer; None: nothing is
    last: str | None  # the mixer's last step, if it treats each position by itself; None: no such step


def at_positions(values: Tensor, positions: Int[Tensor, " positions"]) -> Tensor:
    """[batch, tokens, ...] -> [1, positions, ...]; `positions` count through the flattened batch."""
    return values.flatten(0, 1).index_select(0, positions)[None]


def run_at(
    layer: nn.Module, mixer: Mixer, call: LayerCall, positions: Int[Tensor, " positions"]
) -> Float[Tensor, "1 positions *streams width"]:
    """`call.replay(layer)` at `positions` only."""
    whole = call.input
    with _mixing_all_positions(layer, mixer, whole, positions):
        return call.with_input(at_positions(whole, positions)).replay(layer)


def find_mixer(layer: nn.Module, call: LayerCall) -> Mixer | None:
    """The first part of `layer` whose output at the last position changes with its input at other positions.

    None where the layer is not built as described above. The caller checks that `run_at` equals the whole layer.
    """
    whole = call.input
    # The same at the last position, different everywhere else.
    moved = torch.cat([-whole[:, :-1], whole[:, -1:]], 1)
    with _watching(layer) as before:
        call.replay(layer)
    with _watching(layer) as after:
        call.with_input(moved).replay(layer)
    for name, seen in before.items():
        other = after.get(name)
        if other is None or seen.input is None or seen.output is None or seen.output.dim() < 3:
            continue
        if _same_end(seen.input, other.input) and not _same_end(seen.output, other.output):
            norm = next((n for n, s in before.items() if s.output is seen.input and s.input is whole), None)
            if norm is None and seen.input is not whole:
                return None
            return Mixer(name, norm, _last_part(layer, name, call))
    return None


@dataclass
class _Seen:
    input: Tensor | None
    output: Tensor | None


def _same_end(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are equal at the last position."""
    return one is not None and other is not None and one.shape == other.shape and torch.equal(one[:, -1], other[:, -1])


def _last_part(layer: nn.Module, name: str, call: LayerCall) -> str | None:
    """The first part of the mixer whose output is the mixer's output."""
    mixer = layer.get_submodule(name)
    with _watching(mixer, deep=True) as inside, _watching(layer) as outside:
        call.replay(layer)
    output = outside[name].output
    return next((f"{name}.{part}" for part, seen in inside.items() if seen.output is output), None)


@contextmanager
def _watching(parent: nn.Module, *, deep: bool = False) -> Iterator[dict[str, _Seen]]:
    """Within the block, collect the first tensor in and out of each of the parent's parts, in the order they return."""
    found: dict[str, _Seen] = {}

    def watch(name: str) -> Callable[..., None]:
        def after(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            returned = output[0] if isinstance(output, tuple) else output
            found[name] = _Seen(given, returned if isinstance(returned, Tensor) else None)

        return after

    parts = [(n, m) for n, m in parent.named_modules() if n] if deep else list(parent.named_children())
    handles = [module.register_forward_hook(watch(name), with_kwargs=True) for name, module in parts]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _mixing_all_positions(layer: nn.Module, mixer: Mixer, whole: Tensor, positions: Tensor) -> Iterator[None]:
    """Within the block, the layer's mixer reads all positions of `whole` and returns `positions` only."""
    is_cut = False

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        nonlocal is_cut
        is_cut = False
        full = whole if mixer.norm is None else layer.get_submodule(mixer.norm)(whole)
        if args:
            return (full, *args[1:]), kwargs
        name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
        return args, {**kwargs, name: full}

    def cut(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal is_cut
        is_cut = True
        return (at_positions(args[0], positions), *args[1:])

    def leave(_module: nn.Module, _args: Any, output: Any) -> Any:
        if is_cut:
            return output
        return (
            (at_positions(output[0], positions), *output[1:])
            if isinstance(output, tuple)
            else at_positions(output, positions)
        )

    module = layer.get_submodule(mixer.name)
    # The kernels of state spaces, used in training only, read the last part's weight and never call it: then `leave` cuts.
    handles = [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
    if mixer.last is not None:
        handles.append(layer.get_submodule(mixer.last).register_forward_pre_hook(cut))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def choose_mixer(layer: nn.Module, call: LayerCall, is_same: Callable[[Tensor, Tensor], bool]) -> Mixer | None:
    """`find_mixer`, if the layer at some positions then equals the whole layer (compared: what it adds to its input)."""
    found = try_call(lambda: find_mixer(layer, call))  # an unknown layer's parts may need other shapes
    for mixer in (found, found and replace(found, last=None)):
        if mixer is not None and _equals_whole(layer, mixer, call, is_same):
            return mixer
    return None


def _equals_whole(layer: nn.Module, mixer: Mixer, call: LayerCall, is_same: Callable[[Tensor, Tensor], bool]) -> bool:
    whole = call.input
    count = whole.shape[0] * whole.shape[1]
    positions = torch.arange(1, count, 3, device=whole.device)
    found = try_call(lambda: run_at(layer, mixer, call, positions))
    if found is None:
        return False
    expected = at_positions(call.replay(layer), positions)
    entering = at_positions(whole, positions)
    return found.shape == expected.shape and is_same(found - entering, expected - entering)
