"""What a training step needs in memory, in bytes: found without a weight or a token.

Weights, gradients and the optimizer's state follow from the parameters. Activations are found by a forward pass on fake tensors
(which have shapes and no values) that adds up what autograd keeps for the backward pass, so that attention implementation,
adapters, autocast and gradient checkpointing need no formula. The logits' working set follows from the kernels' chunks.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from caftune.core.backbone import Backbone, LayerCall
from caftune.core.cross_entropy import CHUNK_VALUES
from caftune.core.heads import AuxiliaryHeads
from caftune.core.probes import is_machine_error
from caftune.core.replay import Mixer, run_at

# Bytes of the optimizer's state per trained weight, as a multiple of the weight itself, or absolute where it is quantised.
_STATES_LIKE_WEIGHT = {"adamw_torch": 2, "adamw_torch_fused": 2, "adagrad": 1, "rmsprop": 1, "sgd": 0}
_STATES_IN_BYTES = {"adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1, "adamw_torch_8bit": 2}
# States of smaller weights stay in 32 bits, and with bitsandbytes those of embeddings (transformers 5.23 asks for it).
_FEWEST_IN_8_BITS = 4096
# TRL's kernel (1.16): rows and columns of its buffer; tiles in float32 that are alive beside it where there is no Triton.
_TILE_ROWS, _TILE_COLUMNS, _TILES_PLAIN = 4096, 32768, 7.25
_PAGE = 4096
# What libraries' code and Python's objects take in the first steps: 38 to 80 MiB in small models' steps on Linux.
_PROCESS = 60 * 2**20
# The mixers (see rows.py) of the common layers, by which their heads keep less: they cannot be found without numbers.
_MIXERS = (Mixer("self_attn", "input_layernorm", "self_attn.o_proj"), Mixer("attn", "ln_1", "attn.c_proj"))
# NormalFloat4 with double quantisation: 4 bits, and 0.127 of constants (QLoRA, 2305.14314, section 3).
_FOUR_BITS = 4.127 / 8


@dataclass(frozen=True)
class Batch:
    """One micro-batch as it lies in memory: padded to its longest row."""

    rows: int
    length: int
    labelled: float  # share of its positions
    is_padded: bool = False
    sampled: float = 1.0  # share of the labelled positions that a head is trained on

    @property
    def scored(self) -> float:
        """Share of the positions that a head's loss looks at."""
        return self.labelled * self.sampled


@dataclass(frozen=True)
class Kept:
    """Bytes that are kept for the backward pass."""

    trunk: int  # of the whole trunk; without a graph, what the last layer took and gave
    layer: int  # of the last layer alone, as it is when it is not checkpointed
    head: int  # of one head's layer
    closing: int  # of what follows the last layer


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step's parts, and its peak, at which not all of them are there in full."""

    weights: int
    heads: int  # their weights
    gradients: int
    optimizer: int
    activations: int
    head_activations: int
    logits: int  # working set of the cross-entropies
    last_layer: int  # its backward pass, with its activations where they are computed again
    process: int  # on a CPU, besides tensors
    peak: int
    optimizer_is_known: bool = True


def kept_activations(
    backbone: Backbone, heads: AuxiliaryHeads | None, batch: Batch, *, autocast: torch.dtype | None, trains_trunk: bool
) -> Kept:
    """Run a fake forward pass. Gives the model fake weights on the CPU: afterwards its own are gone."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        _FakeExperts(),
        _quiet_fakes(),
        torch.autocast("cpu", dtype=autocast, enabled=autocast is not None),
    ):
        _make_fake(backbone.model)
        ids = torch.zeros(batch.rows, batch.length, dtype=torch.long)
        ledger = _Ledger(batch, [*backbone.model.parameters()])
        after_layer: list[int] = []
        handle = backbone.layer.register_forward_hook(lambda *_: after_layer.append(ledger.total))
        with backbone.capture() as call, ledger, torch.set_grad_enabled(trains_trunk):
            backbone.trunk(input_ids=ids, use_cache=False)
        handle.remove()
        layer = 0
        if trains_trunk:
            layer = _kept_by(backbone.layer, call, batch)
        head = 0
        if heads is not None and heads.config.kind == "decoder":
            _make_fake(heads)
            head = _kept_by(heads.heads[0], call, batch, rows=batch.scored)
        elif heads is not None:  # a residual perceptron: its input, twice the inner width, its change
            head = 4 * call.hidden.nbytes
        closing = ledger.total - after_layer[-1] if trains_trunk else 3 * call.hidden.nbytes
        call_itself = call.input.nbytes + call.hidden.nbytes
    return Kept(trunk=ledger.total if trains_trunk else call_itself, layer=layer, head=head, closing=closing)


def _kept_by(layer: nn.Module, call: LayerCall, batch: Batch, *, rows: float = 1.0) -> int:
    """Bytes that a layer keeps, where it is trained on this share of the positions."""
    ledger = _Ledger(batch, [*layer.parameters()])
    names = {name for name, _ in layer.named_modules()}
    mixer = next((m for m in _MIXERS if {m.name, m.norm, m.last} <= names), None)
    try:
        with ledger, _unchecked(layer):
            if mixer is None or rows == 1:
                call.replay(layer)
            else:
                run_at(layer, mixer, call, torch.zeros(round(rows * batch.rows * batch.length), dtype=torch.long))
    except (RuntimeError, ValueError) as error:
        if rows == 1 or is_machine_error(error):
            raise
        return _kept_by(layer, call, batch)  # a layer that only looks like the common ones is trained whole
    return ledger.total


@contextlib.contextmanager
def _quiet_fakes() -> Iterator[None]:
    """Within the block, torch does not log what it also raises."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was


class _FakeExperts(TorchDispatchMode):
    """Within the block, fake products of experts in any dtype: torch's own (2.13) are of bfloat16 alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            tokens, weights = args[:2]
            return tokens.new_empty(tokens.shape[0], weights.shape[2])
        return func(*args, **(kwargs or {}))


class _Ledger(torch.autograd.graph.saved_tensors_hooks):
    """Within the block, adds up the storages that autograd saves, weights and (where no row is padded) masks left out."""

    def __init__(self, batch: Batch, weights: list[nn.Parameter]) -> None:
        super().__init__(self._enter, lambda tensor: tensor)
        self._storages = {weight.untyped_storage()._cdata: weight.untyped_storage() for weight in weights}
        self._mask = (batch.rows, 1, batch.length, batch.length)
        self._is_padded = batch.is_padded
        self.total = 0

    def _enter(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # A real batch without padding has no mask; a fake one cannot tell.
        is_spared = tuple(tensor.shape) == self._mask and not self._is_padded
        if storage._cdata not in self._storages and not is_spared:
            self._storages[storage._cdata] = storage  # kept, so that its number is not given to another
            self.total += storage.nbytes()
        return tensor


@contextlib.contextmanager
def _unchecked(layer: nn.Module) -> Iterator[None]:
    """Within the block, `layer` keeps its activations though the model checkpoints its layers."""
    was: Any = getattr(layer, "gradient_checkpointing", False)
    layer.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        layer.gradient_checkpointing = was


def _make_fake(module: nn.Module) -> None:
    """Put fake tensors on the CPU in the place of all weights and buffers; tied ones stay tied."""
    twins: dict[int, Tensor] = {}

    def twin(tensor: Tensor) -> Tensor:
        if id(tensor) not in twins:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_weight = isinstance(tensor, nn.Parameter)
            twins[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_weight else fake
        return twins[id(tensor)]

    for part in module.modules():
        stores: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for tensors in stores:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = twin(tensor)


def state_bytes(optimizer: str, weights: list[nn.Parameter], model: nn.Module) -> tuple[int, bool]:
    """Bytes of an optimizer's state for `weights`, embeddings being those of `model`, and whether they are known.

    Where they are not, they are taken to be as large as AdamW's.
    """
    if optimizer == "adafactor":  # a row and a column for each matrix
        sizes = [sum(w.shape) if w.dim() > 1 else w.numel() for w in weights]
        return 4 * sum(sizes), True
    if optimizer in _STATES_IN_BYTES:
        has_wide = optimizer != "adamw_torch_8bit"
        wide = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and has_wide}
        wide |= {id(weight) for weight in weights if weight.numel() < _FEWEST_IN_8_BITS}
        sizes = [weight.numel() * (4 if id(weight) in wide else 1) for weight in weights]
        return _STATES_IN_BYTES[optimizer] * sum(sizes), True
    copies = _STATES_LIKE_WEIGHT.get(optimizer, 2)
    return copies * sum(weight.nbytes for weight in weights), optimizer in _STATES_LIKE_WEIGHT


def weight_bytes(model: Any, *, four_bits: bool) -> int:
    """Bytes of a model's weights and buffers; with `four_bits` the linear layers of its trunk are quantised."""
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} if four_bits else set()
    linear -= {id(model.get_output_embeddings().weight)}
    linear -= {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    sizes = [p.numel() * _FOUR_BITS if id(p) in linear else p.nbytes for p in model.parameters()]
    return round(sum(sizes)) + sum(buffer.nbytes for buffer in model.buffers())


def logits_bytes(
    batch: Batch, vocabulary: int, width: int, *, has_triton: bool, skips: bool, itemsize: int
) -> tuple[int, int]:
    """Working sets of TRL's kernel for the model's own loss, which `skips` unlabelled rows, and of the heads' loss."""
    labelled = round(batch.rows * batch.length * batch.labelled)
    rows = labelled if skips else batch.rows * (batch.length - 1)
    at_once = min(rows, _TILE_ROWS)
    # The buffer has all its columns however small the vocabulary is. On a CPU the pages of the others are never touched.
    touched = -(-vocabulary * itemsize // _PAGE) * _PAGE
    buffer = at_once * (_TILE_COLUMNS * itemsize if has_triton else min(_TILE_COLUMNS * itemsize, touched))
    others = 0 if has_triton else at_once * min(vocabulary, _TILE_COLUMNS) * 4 * _TILES_PLAIN
    main = buffer + others + 4 * rows * width
    scored = round(batch.rows * batch.length * batch.scored)
    chunk = min(scored, max(1, CHUNK_VALUES // vocabulary)) * vocabulary
    # The heads' loss turns logits into their gradient in place; in half precision both are there twice.
    return round(main), chunk * (4 if itemsize >= 4 else 4 + 2 * itemsize)


def peak_memory(
    backbone: Backbone,
    heads: AuxiliaryHeads | None,
    *,
    kept: Kept,
    batch: Batch,
    logits: tuple[int, int],
    optimizer: str,
    accumulates: bool,
    four_bits: bool,
    checkpointing: bool,
    casts: bool,
    on_gpu: bool,
) -> Memory:
    """A step's parts and its peak: the highest of the moments at which memory is highest.

    These are: the last head's loss (everything of the trunk is kept, heads run one at a time), the beginning of the backward
    pass (the heads' gradients are handed on, and the unembedding's added up), that of the next-token loss, that of the last
    layer, the end of the backward pass (all gradients, hardly any activations), the update.

    Args:
        logits: working sets of the model's own loss and of a head's.
        accumulates: whether gradients of earlier micro-batches lie there already.
        casts: whether autocast runs products of float32 weights in half precision. It holds its copies of trained weights until
            the forward pass ends (without checkpointing they are among what autograd keeps).
    """
    model = backbone.model
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    head_weights = list(heads.parameters()) if heads is not None else []
    trained_heads = [weight for weight in head_weights if weight.requires_grad]
    weights, of_heads = weight_bytes(model, four_bits=four_bits), sum(weight.nbytes for weight in head_weights)
    gradients = sum(weight.nbytes for weight in (*trained, *trained_heads))
    state, is_known = state_bytes(optimizer, [*trained, *trained_heads], model)
    one_head = kept.head + round(kept.closing * batch.scored) if heads is not None else 0
    last_layer = round(kept.layer * (1.25 if checkpointing else 0.25))
    process = 0 if on_gpu else _PROCESS
    count = len(heads.heads) if heads is not None else 0
    unembedding = model.get_output_embeddings().weight
    new = 0 if accumulates else 1
    of_trained = sum(weight.nbytes for weight in trained_heads)
    early = new * of_trained  # gradients that are there before the trunk's
    late = unembedding.nbytes if unembedding.requires_grad else 0
    handed = [weight.nbytes for weight in trained_heads] + [late] * (count > 0)
    copies = 2 * sum(weight.numel() for weight in trained if weight.dim() > 1) if casts and checkpointing else 0
    is_tied = unembedding is model.get_input_embeddings().weight
    moments = {
        # In a backward pass gradients of activations take about a quarter of what they replace, in a head a sixth.
        "heads": kept.trunk
        + one_head
        + max(logits[1], one_head // 6)
        + of_trained * (1 - 1 / max(1, count))
        + 2 * late * (count > 0)
        + copies,
        # The heads' gradients lie beside those of earlier passes; one tensor after another is scaled.
        "handed on": kept.trunk + sum(handed) + max(handed, default=0),
        # Autograd adds the unembedding's gradients, the heads' and the model's own, into a third tensor.
        "added up": kept.trunk + of_trained + 3 * late * (count > 0),
        "main loss": kept.trunk + logits[0] + early + late * (1 + (count > 0)),
        "last layer": kept.trunk + early + late + last_layer,
        "end": new * gradients + kept.layer + late * is_tied,
        "optimizer": new * gradients + _optimizer_workspace(optimizer, [*trained, *trained_heads], on_gpu=on_gpu),
    }
    fixed = weights + of_heads + state + (gradients if accumulates else 0) + process
    return Memory(
        weights=weights,
        heads=of_heads,
        gradients=gradients,
        optimizer=state,
        activations=kept.trunk,
        head_activations=one_head,
        logits=max(logits),
        last_layer=last_layer,
        process=process,
        peak=fixed + round(max(moments.values())),
        optimizer_is_known=is_known,
    )


def _optimizer_workspace(optimizer: str, weights: list[nn.Parameter], *, on_gpu: bool) -> int:
    """Tensors that an update makes: none in a fused one; on a GPU those of all weights at once, else the largest's."""
    if not weights or optimizer == "adamw_torch_fused" or "8bit" in optimizer:
        return 0
    sizes = [weight.nbytes for weight in weights]
    return sum(sizes) if on_gpu else 2 * max(sizes)
