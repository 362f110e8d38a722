"""Memory of a training step, in bytes, found without loading a weight.

Weights, gradients and optimizer states follow from the parameters. Activations come from a forward pass on fake tensors (shapes
without values) that adds up what autograd keeps for the backward pass, so attention implementation, adapters, autocast and
gradient checkpointing need no formula. The working set of the logits follows from the kernels' chunks.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from caftune.core.backbone import Backbone
from caftune.core.cross_entropy import CHUNK_VALUES
from caftune.core.heads import AuxiliaryHeads
from caftune.core.probes import is_machine_error
from caftune.core.replay import LayerCall, Mixer, run_at
from caftune.training.run_setup import Setup

# Size of the optimizer's state: as a multiple of the trained weight, or in bytes per value where it is quantised.
_STATES_LIKE_WEIGHT = {"adamw_torch": 2, "adamw_torch_fused": 2, "adagrad": 1, "rmsprop": 1, "sgd": 0}
_STATES_IN_BYTES = {"adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1, "adamw_torch_8bit": 2}
# States of smaller weights stay in 32 bits, and with bitsandbytes those of embeddings (transformers 5.23 sets that).
_FEWEST_IN_8_BITS = 4096
# TRL's loss (1.16): rows and columns of its buffer; float32 tiles next to the buffer where there is no Triton.
_TILE_ROWS, _TILE_COLUMNS, _TILES_PLAIN = 4096, 32768, 7.25
_TILES_SCORED = 2.6  # tiles in an evaluation
_PAGE = 4096
# Code of libraries and objects of Python in the first steps: 38 to 80 MiB in steps of small models on Linux.
_PROCESS = 60 * 2**20
# glibc (2.36) does not use a freed block again for an aligned tensor of the same size, so temporary tensors of a forward pass
# leave holes between those kept, of about half of their bytes. It maps blocks of 32 MiB separately, and gives these back.
_HOLES, _MAPPED = 0.5, 32 * 2**20
# The mixers of the common layers (see core/replay.py), whose heads keep less. Finding a mixer needs values.
_MIXERS = (Mixer("self_attn", "input_layernorm", "self_attn.o_proj"), Mixer("attn", "ln_1", "attn.c_proj"))
# NormalFloat4 with double quantisation: 4 bits, and 0.127 of constants (QLoRA, 2305.14314, section 3).
_FOUR_BITS = 4.127 / 8

_FAKE_LOG = logging.getLogger("torch._subclasses.fake_tensor")


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step's parts, and its peak. At the peak not all parts are allocated in full."""

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


@dataclass(frozen=True)
class _Kept:
    """Bytes that are kept for the backward pass."""

    trunk: int  # of the whole trunk; without a graph, input and output of the last layer
    layer: int  # of the last layer, if it is not checkpointed
    head: int  # of one head's layer
    closing: int  # of what follows the last layer
    freed: int = 0  # of temporary tensors of the trunk that are too small to be mapped


def step_memory(backbone: Backbone, heads: AuxiliaryHeads | None, setup: Setup) -> Memory:
    """Parts and peak of a step. Gives model and heads fake weights: their own are lost."""
    kept = _kept_activations(backbone, heads, setup)
    model, head_weights = backbone.model, list(heads.parameters()) if heads is not None else []
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    trained_heads = [weight for weight in head_weights if weight.requires_grad]
    unembedding = model.get_output_embeddings().weight
    is_tied = unembedding is model.get_input_embeddings().weight

    weights, of_heads = _weight_bytes(model, four_bits=setup.tuning == "qlora"), _bytes(head_weights)
    state, is_known = state_bytes(setup.optimizer, [*trained, *trained_heads], model)
    main_loss, head_loss = _logits_bytes(setup, *unembedding.shape)
    one_head = kept.head + round(kept.closing * setup.scored_positions) if heads is not None else 0
    last_layer = round(kept.layer * (1.25 if setup.checkpointing else 0.25))
    process = 0 if setup.on_gpu else _PROCESS + round(_HOLES * kept.freed)

    # Gradients. Where micro-batches accumulate, those of earlier ones are allocated all the time, and so not counted below.
    gradients, of_trained_heads = _bytes([*trained, *trained_heads]), _bytes(trained_heads)
    new, new_of_heads = (0, 0) if setup.accumulation > 1 else (gradients, of_trained_heads)
    of_unembedding = unembedding.nbytes if unembedding.requires_grad else 0
    from_heads = of_unembedding if heads is not None else 0  # the unembedding's gradient by the heads' losses
    handed_on = [weight.nbytes for weight in trained_heads] + [from_heads]
    # Autocast keeps half-precision copies of trained weights until the forward pass ends. (Without checkpointing they are among
    # what autograd keeps.)
    casts = setup.half and setup.dtype == torch.float32 and setup.checkpointing
    copies = 2 * sum(weight.numel() for weight in trained if weight.dim() > 1) if casts else 0

    # The moments at which memory is highest. In a backward pass the gradients of activations take about a quarter of the
    # activations that they replace, in a head a sixth.
    moments = {
        # The last head's loss: everything of the trunk is kept, and heads run one at a time.
        "heads": kept.trunk
        + one_head
        + max(head_loss, one_head // 6)
        + of_trained_heads * (1 - 1 / max(1, setup.heads))
        + 2 * from_heads
        + copies,
        # The backward pass begins: gradients of the heads' losses are scaled, one tensor after another.
        "handed on": kept.trunk + sum(handed_on) + max(handed_on),
        # Autograd adds two gradients of the unembedding, by the heads' losses and the model's own, into a third tensor.
        "added up": kept.trunk + of_trained_heads + 3 * from_heads,
        "main loss": kept.trunk + main_loss + new_of_heads + of_unembedding + from_heads,
        "last layer": kept.trunk + new_of_heads + of_unembedding + last_layer,
        # The backward pass ends: all gradients, and the activations of one layer.
        "end": new + kept.layer + of_unembedding * is_tied,
        "optimizer": new + _optimizer_workspace(setup, [*trained, *trained_heads]),
        "evaluation": _evaluation_bytes(setup, kept, len(unembedding)) + new - gradients,
    }
    fixed = weights + of_heads + state + gradients - new + process
    return Memory(
        weights=weights,
        heads=of_heads,
        gradients=gradients,
        optimizer=state,
        activations=kept.trunk,
        head_activations=one_head,
        logits=max(main_loss, head_loss),
        last_layer=last_layer,
        process=process,
        peak=fixed + round(max(moments.values())),
        optimizer_is_known=is_known,
    )


def _evaluation_bytes(setup: Setup, kept: _Kept, vocabulary: int) -> int:
    """Working set of an evaluation, whose batches have another size: no gradients, and logits of all positions on a CPU."""
    if setup.eval_batch_size == 0:
        return 0
    batch = replace(setup, batch_size=setup.eval_batch_size, target_share=1.0)
    main, _ = _logits_bytes(replace(batch, heads=0), vocabulary, 0, tiles=_TILES_SCORED)
    _, head = _logits_bytes(batch, vocabulary, 0)
    # Input and output of the last layer, and its norm.
    return kept.closing * setup.eval_batch_size // setup.batch_size + max(main, head)


def _bytes(weights: list[nn.Parameter]) -> int:
    return sum(weight.nbytes for weight in weights)


def _kept_activations(backbone: Backbone, heads: AuxiliaryHeads | None, setup: Setup) -> _Kept:
    """Run a fake forward pass of the trunk and of a head."""
    has_graph = setup.stage == "train"
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        _FakeExperts(),
        _with_value(_FAKE_LOG, "disabled", True),  # torch logs what it also raises
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=setup.half),
    ):
        backbone.model.to_empty(device="cpu").tie_weights()
        ledger = _Ledger(backbone.model, setup)
        after_layer: list[int] = []
        handle = backbone.layer.register_forward_hook(lambda *_: after_layer.append(ledger.total))
        made = _Made()
        with backbone.capture() as call, ledger, made, torch.set_grad_enabled(has_graph):
            ids = torch.zeros(setup.batch_size, setup.length, dtype=torch.long)
            backbone.trunk(input_ids=ids, use_cache=False)
        handle.remove()
        head = 0
        if heads is not None and heads.config.kind == "decoder":
            head = _kept_by(heads.heads[0].to_empty(device="cpu"), call, setup, setup.scored_positions)
        elif heads is not None:  # a residual perceptron: its input, twice the inner width, its change
            head = 4 * call.hidden.nbytes
        if not has_graph:
            return _Kept(call.input.nbytes + call.hidden.nbytes, 0, head, closing=3 * call.hidden.nbytes)
        layer = _kept_by(backbone.layer, call, setup)
        freed = sum(size for number, size in made.sizes.items() if number not in ledger.known)
        return _Kept(ledger.total, layer, head, closing=ledger.total - after_layer[-1], freed=freed)


def _kept_by(layer: nn.Module, call: LayerCall, setup: Setup, share: float = 1.0) -> int:
    """Bytes that a layer keeps when it is trained on this share of the positions."""
    ledger = _Ledger(layer, setup)
    names = {name for name, _ in layer.named_modules()}
    mixer = next((m for m in _MIXERS if {m.name, m.norm, m.last} <= names), None) if share < 1 else None
    try:
        with ledger, _with_value(layer, "gradient_checkpointing", False):
            if mixer is None:
                call.replay(layer)
            else:
                positions = torch.zeros(round(share * setup.batch_size * setup.length), dtype=torch.long)
                if run_at(layer, mixer, call, positions).shape[0] != 1:
                    raise ValueError("arguments of the call were broadcast")
    except (RuntimeError, TypeError, ValueError) as error:
        if mixer is None or is_machine_error(error):
            raise
        return _kept_by(layer, call, setup)  # it has the names of a common layer, and another shape
    return ledger.total


@contextlib.contextmanager
def _with_value(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within the block, the attribute has this value; afterwards its own, or False where it had none."""
    before = getattr(owner, name, False)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _FakeExperts(TorchDispatchMode):
    """Within the block, experts of any dtype have fake products: torch's own (2.13) take bfloat16 only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            tokens, weights = args[:2]
            return tokens.new_empty(tokens.shape[0], weights.shape[2])
        return func(*args, **(kwargs or {}))


class _Made(TorchDispatchMode):
    """Within the block, keeps the sizes of storages that operations make, by number, of those that the heap holds."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self._references: list[Any] = []  # so that no number is given to another storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in (x for x in tree_leaves(out) if isinstance(x, Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage.nbytes() < _MAPPED:
                self.sizes[storage._cdata] = storage.nbytes()
                self._references.append(storage)
        return out


class _Ledger(torch.autograd.graph.saved_tensors_hooks):
    """Within the block, adds up the storages that autograd saves, without weights and without masks of unpadded batches."""

    def __init__(self, module: nn.Module, setup: Setup) -> None:
        super().__init__(self._enter, lambda tensor: tensor)
        storages = [weight.untyped_storage() for weight in module.parameters()]
        self.known = {storage._cdata: storage for storage in storages}
        # A real batch without padding has no mask; transformers makes one for fake tensors, which it cannot look into.
        self._mask = None if setup.is_padded else (setup.batch_size, 1, setup.length, setup.length)
        self.total = 0

    def _enter(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known and tuple(tensor.shape) != self._mask:
            self.known[storage._cdata] = storage  # a reference, so that its number is not given to another storage
            self.total += storage.nbytes()
        return tensor


def state_bytes(optimizer: str, weights: list[nn.Parameter], model: nn.Module) -> tuple[int, bool]:
    """Bytes of an optimizer's state for `weights`, some of them embeddings of `model`, and whether the optimizer is known.

    An unknown optimizer's state is taken to be as large as AdamW's.
    """
    if optimizer == "adafactor":  # a row and a column for each matrix
        sizes = [sum(w.shape) if w.dim() > 1 else w.numel() for w in weights]
        return 4 * sum(sizes), True
    if optimizer in _STATES_IN_BYTES:
        is_bitsandbytes = optimizer != "adamw_torch_8bit"
        wide = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and is_bitsandbytes}
        wide |= {id(weight) for weight in weights if weight.numel() < _FEWEST_IN_8_BITS}
        sizes = [weight.numel() * (4 if id(weight) in wide else 1) for weight in weights]
        return _STATES_IN_BYTES[optimizer] * sum(sizes), True
    return _STATES_LIKE_WEIGHT.get(optimizer, 2) * _bytes(weights), optimizer in _STATES_LIKE_WEIGHT


def _optimizer_workspace(setup: Setup, weights: list[nn.Parameter]) -> int:
    """Tensors that an update makes: none in a fused one; on a GPU those of all weights at once, else the largest's."""
    if not weights or setup.optimizer == "adamw_torch_fused" or "8bit" in setup.optimizer:
        return 0
    return _bytes(weights) if setup.on_gpu else 2 * max(weight.nbytes for weight in weights)


def _weight_bytes(model: Any, *, four_bits: bool) -> int:
    """Bytes of a model's weights and buffers. `four_bits`: the frozen linear layers of its trunk are quantised."""
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} if four_bits else set()
    linear -= {id(model.get_output_embeddings().weight)}
    linear -= {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    sizes = [p.numel() * _FOUR_BITS if id(p) in linear else p.nbytes for p in model.parameters()]
    return round(sum(sizes)) + sum(buffer.nbytes for buffer in model.buffers())


def _logits_bytes(setup: Setup, vocabulary: int, width: int, tiles: float = _TILES_PLAIN) -> tuple[int, int]:
    """Working sets of TRL's loss of the model itself, and of a head's loss; 0 for one that the run does not have."""
    itemsize = 2 if setup.half else setup.dtype.itemsize
    main = head = 0.0
    if setup.stage == "train":
        skips = setup.on_gpu or (setup.skips_unlabelled and not setup.leaves_out_heads)
        positions = setup.batch_size * (setup.length - 1)
        if skips:
            positions = round(setup.batch_size * setup.length * setup.labelled_positions)
        rows = min(positions, _TILE_ROWS)
        # The buffer has all its columns however small the vocabulary is. On a CPU the pages of the others are never touched.
        touched = -(-vocabulary * itemsize // _PAGE) * _PAGE
        buffer = rows * (_TILE_COLUMNS * itemsize if setup.on_gpu else min(_TILE_COLUMNS * itemsize, touched))
        others = 0 if setup.on_gpu else rows * min(vocabulary, _TILE_COLUMNS) * 4 * tiles
        main = buffer + others + 4 * positions * width
    if setup.heads > 0:
        scored = round(setup.batch_size * setup.length * setup.scored_positions)
        chunk = min(scored, max(1, CHUNK_VALUES // vocabulary)) * vocabulary
        # The heads' loss turns logits into their gradient in place; in half precision both types are allocated.
        head = chunk * (4 if itemsize >= 4 else 4 + 2 * itemsize)
    return round(main), round(head)
