"""A decoder layer at some of its rows: its token mixer sees every row, everything else only those that are asked for.

A layer is a mixer (attention, a state space), which alone looks at other rows, among parts that treat each row by itself:
norms, residuals, a perceptron. So the layer is called with the wanted rows only, and its mixer, through hooks, is given what
it would have been given in the whole layer: all rows, with the call's own mask, positions and phases. What the mixer
returns is cut to the wanted rows, before its output projection where that is its last step. Nothing here names a part of a
layer: `find_mixer` watches one, and the caller compares what comes out with the whole layer before relying on it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from caftune.core.calls import LayerCall
from caftune.core.probes import try_call


@dataclass(frozen=True)
class Mixer:
    """The parts of a layer that must see all rows, by their names in it."""

    name: str
    norm: str | None  # what the layer's input goes through on its way to the mixer; None: nothing
    last: str | None  # the part of the mixer that makes its output out of rows, one by one; None: the mixer itself


def at_rows(values: Tensor, rows: Int[Tensor, " rows"]) -> Tensor:
    """[batch, tokens, ...] -> [1, rows, ...]; `rows` counts through the batch, row by row."""
    return values.flatten(0, 1).index_select(0, rows)[None]


def run_at(
    layer: nn.Module, mixer: Mixer, call: LayerCall, rows: Int[Tensor, " rows"]
) -> Float[Tensor, "1 rows *streams width"]:
    """`call.replay(layer)` at `rows` alone."""
    whole = call.input
    with _mixing_all_rows(layer, mixer, whole, rows):
        return call.with_input(at_rows(whole, rows)).replay(layer)


def find_mixer(layer: nn.Module, call: LayerCall) -> Mixer | None:
    """The mixer of a layer that was called as in `call`, None where it has no such shape.

    It is the first part whose output at the last row moves when the other rows do, though its input there did not.
    Whether the layer at some rows then equals the whole layer is left to the caller to check.
    """
    whole = call.input
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
    return one is not None and other is not None and one.shape == other.shape and torch.equal(one[:, -1], other[:, -1])


def _last_part(layer: nn.Module, name: str, call: LayerCall) -> str | None:
    """The first part of the mixer whose output is the mixer's own."""
    mixer = layer.get_submodule(name)
    with _watching(mixer, deep=True) as inside, _watching(layer) as outside:
        call.replay(layer)
    output = outside[name].output
    return next((f"{name}.{part}" for part, seen in inside.items() if seen.output is output), None)


@contextmanager
def _watching(parent: nn.Module, *, deep: bool = False) -> Iterator[dict[str, _Seen]]:
    """Within the block, collect the first tensors that go in and out of the parent's parts, in the order they end."""
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
def _mixing_all_rows(layer: nn.Module, mixer: Mixer, whole: Tensor, rows: Tensor) -> Iterator[None]:
    """Within the block, the layer's mixer takes all rows of `whole` for its input, and hands out `rows`."""
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
        return (at_rows(args[0], rows), *args[1:])

    def leave(_module: nn.Module, _args: Any, output: Any) -> Any:
        if is_cut:
            return output
        return (at_rows(output[0], rows), *output[1:]) if isinstance(output, tuple) else at_rows(output, rows)

    module = layer.get_submodule(mixer.name)
    # State-space kernels, which run in training alone, take the weight of the last part and never call it.
    handles = [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
    if mixer.last is not None:
        handles.append(layer.get_submodule(mixer.last).register_forward_pre_hook(cut))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def choose_mixer(layer: nn.Module, call: LayerCall, is_same: Callable[[Tensor, Tensor], bool]) -> Mixer | None:
    """`find_mixer`, but only if the layer at some rows equals the whole layer: what it adds to its input is compared."""
    found = try_call(lambda: find_mixer(layer, call))  # parts of an unknown layer may ask for other shapes
    for mixer in (found, found and replace(found, last=None)):
        if mixer is not None and _equals_whole(layer, mixer, call, is_same):
            return mixer
    return None


def _equals_whole(layer: nn.Module, mixer: Mixer, call: LayerCall, is_same: Callable[[Tensor, Tensor], bool]) -> bool:
    whole = call.input
    count = whole.shape[0] * whole.shape[1]
    rows = torch.arange(1, count, 3, device=whole.device)
    found = try_call(lambda: run_at(layer, mixer, call, rows))
    if found is None:
        return False
    expected = at_rows(call.replay(layer), rows)
    entering = at_rows(whole, rows)
    return found.shape == expected.shape and is_same(found - entering, expected - entering)
