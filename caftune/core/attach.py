"""Putting heads into a model: `attach_heads` gives its forward the auxiliary losses, `detach_heads` undoes it."""

import functools
import inspect
import types
from dataclasses import make_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from caftune.core._compat import at_labelled_positions
from caftune.core.backbone import Backbone, evaluating
from caftune.core.heads import AuxiliaryHeads
from caftune.core.objective import HorizonTargets, Sample
from caftune.errors import CaftuneError

# The name of the heads inside the model that carries them.
ATTRIBUTE = "auxiliary_heads"
# Arguments of a causal LM that its trunk does not take.
_OUTPUT_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch", "fused_lm_head", "logits_to_keep")


def attach_heads(backbone: Backbone, heads: AuxiliaryHeads) -> None:
    """Put `heads` inside the model, so that its devices, wrappers and optimizer see them, and let its forward run them.

    The model's forward then takes these arguments; without `auxiliary` it is unchanged:

        auxiliary="add"      the model's own outputs and, under `auxiliary`, the result of `AuxiliaryHeads.forward`
        auxiliary="only"     the latter alone; the trunk runs without a graph
        auxiliary="soft"     as "only", with the model's own distributions as targets (`soft_top_k`: their most likely tokens)
        auxiliary_weights, auxiliary_sample    `weights` and `sample` of `AuxiliaryHeads.forward`
        auxiliary_targets    `HorizonTargets` of the batch (with horizon 1 for "soft"); None: they are computed from the labels
        auxiliary_labels     labels for the heads alone, where the model is called without `labels`

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
        auxiliary_targets: HorizonTargets | None = None,
        auxiliary_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        # `self` and not `model`: a deep copy of the model runs its own parts.
        if auxiliary is None:
            return self._caftune_inner_forward(*args, **kwargs)
        kwargs = _by_name(signature, self, args, kwargs)
        if auxiliary not in ("add", "only", "soft"):
            raise CaftuneError(f"auxiliary must be 'add', 'only', 'soft' or None, got {auxiliary!r}.")
        labels = kwargs.get("labels") if auxiliary_labels is None else auxiliary_labels
        if labels is None and auxiliary_targets is None:
            raise CaftuneError("labels must be given for the auxiliary losses, got none.")
        # No loss reads a cache; with one, transformers does not tell packed documents apart, and some layers write in place.
        kwargs |= {"return_dict": True, "use_cache": False}
        own = replace(backbone, model=self)
        own.unembedding()  # FSDP2 gathers it here, before TRL's fused head would, whose gradient stays on its rank (TRL 1.16)
        with own.capture() as call:
            outputs: Any = None
            if auxiliary == "add":
                with at_labelled_positions(own.trunk, kwargs) as arguments:
                    outputs = self._caftune_inner_forward(**arguments)
            else:
                _run_trunk(own, **kwargs)
        heads = getattr(self, ATTRIBUTE)
        scores = heads(
            own,
            call,
            auxiliary_targets or _targets(heads, {**kwargs, "labels": labels}, is_soft=auxiliary == "soft"),
            soft=auxiliary == "soft",
            soft_top_k=soft_top_k,
            weights=auxiliary_weights,
            sample=auxiliary_sample,
        )
        if outputs is None:
            return {"auxiliary": scores}
        return _with_auxiliary(outputs, scores)

    inner = model.forward
    setattr(model, ATTRIBUTE, heads)
    model._caftune_inner_forward = inner
    model.forward = types.MethodType(forward, model)
    model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *_keys(heads)}


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


def _by_name(signature: inspect.Signature, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name. TypeError, as from the model's forward, for too many or one given twice."""
    given = signature.bind_partial(model, *args).arguments
    named = dict(list(given.items())[1:])
    twice = next((name for name in named if name in kwargs), None)
    if twice is not None:
        raise TypeError(f"{type(model).__name__}.forward got multiple values for argument {twice!r}.")
    return {**named, **kwargs}


# Their number differs with every batch, for which torch.compile would compile again.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _targets(heads: AuxiliaryHeads, batch: dict[str, Any], *, is_soft: bool) -> HorizonTargets:
    """The targets of the heads, and with soft targets of horizon 1, at whose positions the model has a next token."""
    return HorizonTargets.of(batch, [1, *heads.config.horizons] if is_soft else heads.config.horizons)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _with_auxiliary(outputs: Any, scores: dict[str, Tensor]) -> Any:
    """The outputs with a field `auxiliary`."""
    kind: Any = type(outputs)
    return _output_class(kind)(**outputs, auxiliary=scores)


def without_auxiliary(outputs: Any) -> tuple[Any, dict[str, Tensor]]:
    """The model's own outputs, and the heads' result, of a forward pass with `auxiliary="add"`."""
    kind = type(outputs).__bases__[0]
    return kind(**{name: value for name, value in outputs.items() if name != "auxiliary"}), outputs["auxiliary"]


@functools.cache
def _output_class(kind: Any) -> Any:
    """The output class with a field `auxiliary`: DDP takes outputs apart and rebuilds them by their fields."""
    return make_dataclass(f"{kind.__name__}WithAuxiliary", [("auxiliary", Any, None)], bases=(kind,))


def _run_trunk(backbone: Backbone, **kwargs: Any) -> None:
    """Run the trunk as a fixed function: no graph, no dropout."""
    kwargs = {name: value for name, value in kwargs.items() if name not in _OUTPUT_ARGUMENTS}
    with torch.no_grad(), evaluating(backbone.trunk):
        backbone.trunk(**{**kwargs, "use_cache": False})
