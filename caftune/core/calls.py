"""One call of a decoder layer, kept so that other layers can be called in the same way."""

from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_leaves, tree_map
from transformers.cache_utils import Cache

# Keyword arguments that would let a replayed layer read or write a cache. All are optional in every decoder layer.
_CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past", "cache_params", "cache_position", "state")
# What gradients do not go through, or can be seen to.
_PLAIN = (Tensor, bool, int, float, str, type(None), Cache, BlockMask)


@dataclass
class LayerCall:
    """The arguments of one call of the last decoder layer, and what it returned."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None

    def replay(self, layer: nn.Module, cache: Cache | None = None) -> Float[Tensor, "batch tokens *streams width"]:
        """Call `layer` as the last layer was called, with `cache` in the place of the model's, and return its hidden states."""
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
    def is_open(self) -> bool:
        """Whether all its tensors can be seen: the states that Gemma 4 shares between layers lie in a container of its own."""
        return all(isinstance(leaf, _PLAIN) for leaf in tree_leaves((self.args, self.kwargs, self.output)))

    def differentiable(self) -> list[Tensor]:
        """The tensors of the call that gradients go back through, each once."""
        leaves = tree_leaves((self.args, self.kwargs, self.output))
        return list({id(x): x for x in leaves if isinstance(x, Tensor) and x.requires_grad}.values())

    def with_tensors(self, given: list[Tensor], instead: list[Tensor]) -> "LayerCall":
        """The same call with `instead` in the places of the tensors `given`."""
        swap = {id(old): new for old, new in zip(given, instead, strict=True)}
        args, kwargs, output = tree_map(lambda x: swap.get(id(x), x), (self.args, self.kwargs, self.output))
        return LayerCall(args, kwargs, output)


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a layer returns: a tensor, or a tuple that begins with it."""
    return output if isinstance(output, Tensor) else output[0]
