"""What a trainer with heads refuses before it starts, each in one sentence with a remedy."""

import logging
import math
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations.fsdp import is_fsdp_enabled

from caftune.core.adapters import unwrapped
from caftune.core.backbone import evaluating, has_flash_attention, is_partitioned, whole_shape
from caftune.core.objective import IGNORED
from caftune.errors import CaftuneError
from caftune.generation.backends import unknown_token
from caftune.training.options import CAFTOptions

if TYPE_CHECKING:
    from caftune.training.config import CAFTConfig

_logger = logging.getLogger(__name__)
_HALF = (torch.bfloat16, torch.float16)
_NAMED_ROWS = 5
_ROWS_AT_ONCE = 1000
_QUANTISED = (
    "model must not be quantised without a peft_config, nor in stage 1. Give a LoraConfig; pretrain heads on the unquantised "
    "base, they fit the quantised one."
)
_TIED = (
    "modules_to_save must not hold {}: this base ties its embeddings, and training one of two copies would untie them. Set "
    "ensure_weight_tying=True in the peft_config, or leave it out."
)
_ADAPTED = (
    "peft_config must leave the unembedding unadapted with heads, which read its weight without an adapter. Take it out of "
    "target_modules (and, where embeddings are tied, out of trainable_token_indices), or train all of it by modules_to_save."
)
_MOST_DROPPED = 0.1  # of a data set
# Packing check: tokens of each of two documents, and the largest change of a logit that rounding explains, as a share of the
# largest logit. Documents that the model keeps apart differ by less (experts see other batches), others by far more.
_TOKENS = 8
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_HALF_TOLERANCE = 5e-3
_LENGTHEN = "Raise max_length, shorten their prompts, or remove these rows."


def _refuse(*problems: tuple[object, str]) -> None:
    """Raise CaftuneError with the text of the first problem that is true."""
    for is_problem, text in problems:
        if is_problem:
            raise CaftuneError(text)


def refuse_options(args: Any) -> None:
    """Refuse arguments of a class that does not have, or does not check, the options of heads."""
    kind = type(args).__name__
    is_known = isinstance(args, CAFTOptions)
    _refuse(
        (
            not is_known,
            f"args must be of a class with CAFTOptions, got {kind}. Define `@dataclass class Arguments(CAFTOptions, {kind})` "
            "and use it; aux_weight=0 without heads changes nothing.",
        ),
        (
            is_known and args.aux_weight is None,
            f"__post_init__ of {kind} must call super().__post_init__(), which checks the options of heads. Add the call.",
        ),
    )


def refuse_arguments(
    args: Any,
    peft_config: Any,
    compute_loss_func: Any,
    compute_metrics: Any,
    optimizers: tuple[Any, Any],
    model_init: Any = None,
) -> None:
    """Refuse arguments of the trainer that do not work with heads."""
    stage_one = args.pretrain_heads
    _refuse(
        (
            args.has_heads and model_init is not None,
            "model_init must be None with heads, which are put into one model. Give the trainer the model itself.",
        ),
        (
            optimizers[0] is not None and args.trains_heads,
            "optimizers must not hold an optimizer where heads are trained, because it was created before them. Use "
            "optimizer_cls_and_kwargs, or in stage 2 frozen heads (train_heads=False).",
        ),
        (
            args.has_heads and getattr(peft_config, "layer_replication", None),
            "peft_config.layer_replication must be None with heads: it replaces layers they branch off from. Leave it out.",
        ),
        (
            stage_one and peft_config is not None,
            "peft_config must be None in stage 1: heads are pretrained on the plain base. Leave it out.",
        ),
        (
            stage_one and compute_loss_func is not None,
            "compute_loss_func must be None in stage 1, which trains on the heads' losses only. Use it in stage 2.",
        ),
        (
            stage_one and args.push_to_hub,
            "push_to_hub must be False in stage 1: Trainer pushes a model without heads. Use `caftune heads push`.",
        ),
        (
            stage_one and compute_metrics is not None,
            "compute_metrics must be None in stage 1, which computes no logits of the model. Leave it out.",
        ),
    )


def refuse_quantised(quantization_config: Any, *, has_adapter: bool) -> None:
    """Refuse weights quantised by bitsandbytes without an adapter: they cannot be trained."""
    is_quantised = getattr(quantization_config, "quant_method", None) == "bitsandbytes"
    _refuse((is_quantised and not has_adapter, _QUANTISED))


def refuse_processes(args: Any) -> None:
    """Refuse launches whose processes would not work together."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    plugin, has_heads = args.deepspeed_plugin, args.has_heads
    _refuse(
        (
            launched > args.world_size,
            f"{launched} processes were launched, and each would train alone, in the same folder. Without GPUs set "
            "use_cpu=True; otherwise launch with a configuration like those in recipes/accelerate.",
        ),
        (
            has_heads and args.n_gpu > 1,
            f"One process must have one GPU with auxiliary heads, got {args.n_gpu}: the model would be split over them. Launch "
            "a process for each (accelerate launch, recipes/accelerate), or set CUDA_VISIBLE_DEVICES=0.",
        ),
        (
            plugin is not None and plugin.zero_stage == 3 and args.soft_targets,
            "soft_targets must be False under DeepSpeed ZeRO-3, got True: their losses need the whole unembedding in the "
            "backward pass, too. Pretrain the heads under ZeRO-2, FSDP2 or DDP (recipes/accelerate).",
        ),
        (
            has_heads and is_fsdp_enabled(),  # true only with efficient loading
            "fsdp_cpu_ram_efficient_loading must be false with auxiliary heads, got true: every process copies the heads from "
            "the base, which then only the first one holds. Set it in accelerate's configuration "
            "(recipes/accelerate/fsdp2.yaml).",
        ),
    )


def refuse_lost_adapters(accelerator: Any, model: Any) -> None:
    """Refuse adapters that PEFT (0.21) would save as an empty file: their keys lack the wrappers of FSDP's checkpointing."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    _refuse(
        (
            plugin is not None and plugin.activation_checkpointing and hasattr(model, "peft_config"),
            "fsdp_activation_checkpointing must be false with a peft_config, got true: the adapter would be saved without its "
            "weights. Use gradient_checkpointing=True.",
        )
    )


def refuse_unfit_heads(trainer: Any) -> None:
    """Refuse heads that do not fit the sharding, the length of the examples, or the trained part of the model."""
    args, config, backbone, accelerator = trainer.args, trainer.heads.config, trainer.backbone, trainer.accelerator
    parallelism = accelerator.parallelism_config
    positions = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
    context = min(getattr(args, "max_length", None) or math.inf, positions or math.inf)
    has_copies = args.aux_weight != 0 and not args.pretrain_heads and config.kind == "decoder"
    last_layer = {id(parameter) for parameter in backbone.layer.parameters()}
    trained = {id(parameter) for parameter in backbone.model.parameters() if parameter.requires_grad}
    _refuse(
        (
            trainer.is_fsdp_enabled and not accelerator.is_fsdp2,
            "fsdp_version must be 2 with auxiliary heads, got 1. See recipes/accelerate/fsdp2.yaml.",
        ),
        (
            parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled),
            "cp_size and sp_size must be 1: context and sequence parallelism split sequences, and a head's target may be in "
            "the next part. Use FSDP2 or DeepSpeed ZeRO for memory, or a smaller max_length.",
        ),
        (
            config.horizons[-1] >= context,
            f"num_heads must leave horizons below the context of {context} tokens, got horizon {config.horizons[-1]}. "
            "Use fewer heads or a larger max_length.",
        ),
        (
            has_copies and trained and trained <= last_layer,
            "Only the last layer is trainable, but decoder heads branch off before it, so the auxiliary losses have no "
            "gradient in the model. Unfreeze earlier layers or use head_kind='mlp'.",
        ),
        (_adapts_unembedding(backbone.model), _ADAPTED),  # a peft_config's adapter, which is there by now
    )


def refuse_unfit(model: PreTrainedModel | PeftModel, peft_config: Any, args: Any) -> None:
    """Refuse models that cannot be trained with heads."""
    adapters = [*(model.peft_config.values() if isinstance(model, PeftModel) else ())]
    adapters += [] if peft_config is None else [peft_config]
    learning = [type(kind).__name__ for kind in adapters if getattr(kind, "is_prompt_learning", False)]
    trained = any(parameter.requires_grad for parameter in model.parameters())
    _refuse(
        (
            args.pretrain_heads and adapters,
            "model must be the plain base, got one wrapped by PEFT: stage 1 trains heads of the base. Load the base only.",
        ),
        (
            getattr(model, "_hf_peft_config_loaded", False),
            "model must be a PeftModel if it has adapters, got adapters of transformers' load_adapter, which would not be "
            "exported. Use PeftModel.from_pretrained(base, adapter, is_trainable=True).",
        ),
        (
            learning,
            f"peft_config must adapt weights (LoRA or similar) with heads, got {''.join(learning[:1])}: its virtual tokens "
            "come before the sequence, and heads would count them among the tokens they predict. Use LoRA, or no `heads`.",
        ),
        (
            any(map(is_partitioned, model.parameters())),
            "model must hold whole weights with heads, which are copies of them, got a part (DeepSpeed ZeRO-3). Give "
            "CAFTTrainer its name or folder, or load it before the training arguments are made.",
        ),
        (getattr(model, "is_quantized", False) and not adapters, _QUANTISED),
        (
            not (peft_config or args.pretrain_heads or trained),
            "model must have weights to train, and all are frozen (stage 1 freezes the model it is given). Load it again, or "
            "call model.requires_grad_(True); load an adapter with is_trainable=True.",
        ),
        *((tied := _tied_copies(model, kind), _TIED.format(", ".join(tied))) for kind in adapters),
        (_adapts_unembedding(model), _ADAPTED),
    )


def _adapts_unembedding(model: Any) -> bool:
    """Whether PEFT adapts the unembedding. A trained copy of it (modules_to_save) has its weight where heads read it."""
    head = model.get_output_embeddings()
    return unwrapped(head) is not head and not isinstance(head, ModulesToSaveWrapper)


def half_precision_problem(model: PreTrainedModel | PeftModel, peft_config: Any, args: Any) -> str | None:
    """What is wrong with training weights in half precision; None where that is not done."""
    if args.pretrain_heads or peft_config is not None or isinstance(model, PeftModel):
        return None
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    half = next((dtype for dtype in _HALF if dtype in trained), None)
    if half is None:
        return None
    return (
        f"model must hold float32 weights for full fine-tuning, got {half}: updates below about 1/256 of a weight would be "
        "lost. Load it with dtype='float32' (bf16=True still computes in bfloat16) or give a LoraConfig."
    )


def _tied_copies(model: PreTrainedModel | PeftModel, peft_config: Any) -> list[str]:
    """Tied embeddings of which an adapter trains a copy: two different matrices cannot be saved with the base's keys."""
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if not is_tied or getattr(peft_config, "ensure_weight_tying", False):
        return []
    embeddings = {model.get_input_embeddings(), model.get_output_embeddings()}
    tied = {name.rpartition(".")[2] for name, module in model.named_modules() if module in embeddings}
    return sorted(tied & set(getattr(peft_config, "modules_to_save", None) or ()))


def refuse_missing_parts(dataset: Dataset, args: "CAFTConfig", *, name: str, as_stock: bool = False) -> None:
    """Refuse examples without the part that is trained on.

    Args:
        as_stock: only warn about data that SFTTrainer trains on.
    """
    columns = dataset.column_names
    if "input_ids" in columns:
        return
    if "prompt" in columns and "completion" not in columns:
        raise CaftuneError(
            f"The {name} data must have completions to train on, got the columns {', '.join(columns)}. "
            "Name the answers completion (of preference pairs, the chosen ones)."
        )
    if args.completion_only_loss and "completion" not in columns:
        problem = (
            f"completion_only_loss must not be set where rows have no completion, as in the {name} data: every token would be "
            "trained on. Use assistant_only_loss for messages, or leave it out."
        )
        if not as_stock:
            raise CaftuneError(problem)
        _logger.warning(problem)
    if args.assistant_only_loss and "messages" in columns:
        talks = enumerate(dataset["messages"])
        silent = [row for row, talk in talks if not any(message["role"] == "assistant" for message in talk)]
        if silent:
            raise CaftuneError(
                f"{len(silent)} of {len(dataset)} rows of the {name} data (counted from 0: {_named(silent)}) have no assistant "
                "turn, on which assistant_only_loss trains. Remove these rows, or leave assistant_only_loss out."
            )


def _named(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:_NAMED_ROWS])) + (", ..." if len(rows) > _NAMED_ROWS else "")


def cut_length(args: "CAFTConfig", *, packing: bool) -> int | None:
    """The tokens that rows are cut to; None where packing splits long documents instead."""
    return None if packing and args.packing_strategy in ("bfd_split", "wrapped") else args.max_length


def _column(dataset: Dataset, name: str) -> Iterator[Any]:
    """A column's values as NumPy arrays, read in batches: ten times as fast as row by row."""
    for batch in dataset.select_columns(name).with_format("numpy").iter(_ROWS_AT_ONCE):
        yield from batch[name]


def find_truncated_rows(
    dataset: Dataset, max_length: int, truncation_mode: str, *, name: str, may_be_all: bool = False, kept: bool = False
) -> tuple[list[int], int]:
    """The rows that truncation to `max_length` leaves without a trained token, and the number that it shortens. Logs both.

    Args:
        kept: whether these rows are kept (only the log differs).

    Raises:
        CaftuneError: no row has a token to train on, unless `may_be_all`.
    """
    part = slice(-max_length, None) if truncation_mode == "keep_end" else slice(max_length)
    lost, shortened = [], 0
    for row, labels in enumerate(_column(dataset, "labels")):
        if (labels[part] == IGNORED).all():
            lost.append(row)
        shortened += len(labels) > max_length
    if len(lost) == len(dataset) and not may_be_all:
        refuse_many_dropped(lost, len(dataset), max_length, name=name)
    if lost:
        what = "They are kept, as context of the rows they are packed with" if kept else "They are left out"
        _logger.warning(f"{_cut(lost, len(dataset), max_length, name)}. {what}. {_LENGTHEN}")
    if shortened:
        end = "beginning" if truncation_mode == "keep_end" else "end"
        _logger.warning(
            f"{shortened} of {len(dataset)} {name} rows are longer than max_length={max_length} and lose their {end}."
        )
    return lost, shortened


def _cut(lost: list[int], total: int, max_length: int | None, name: str) -> str:
    rows = f"{len(lost)} of {total} rows of the {name} data (counted from 0: {_named(lost)})"
    return f"{rows} have no token to train on within max_length={max_length}"


def refuse_many_dropped(dropped: list[int], total: int, max_length: int | None, *, name: str) -> None:
    """Raise CaftuneError where more than a tenth of the rows have no token to train on within max_length."""
    if len(dropped) > _MOST_DROPPED * total:
        why = ": no row remains" if len(dropped) == total else ", and up to a tenth may be left out"
        raise CaftuneError(f"{_cut(dropped, total, max_length, name)}{why}. {_LENGTHEN}")


def refuse_long_rows(dataset: Dataset, context: int | None, *, name: str) -> None:
    """Raise CaftuneError where rows are longer than the model's context (for data.max_length: null)."""
    lengths = [len(ids) for ids in _column(dataset, "input_ids")]
    long = [row for row, length in enumerate(lengths) if length > (context or math.inf)]
    if long:
        raise CaftuneError(
            f"Rows of {name} must have at most the {context} tokens of the model's context, got {max(lengths)} in row "
            f"{lengths.index(max(lengths))}; {len(long)} of {len(lengths)} rows are longer (counted from 0: {_named(long)}). "
            "Set data.max_length, or shorten them."
        )


def refuse_unknown_tokens(
    dataset: Dataset, tokenizer: Any, embedded: int, *, name: str, dropped: Collection[int] = ()
) -> None:
    """Raise CaftuneError where a row has a token id of `embedded` (the rows of the embeddings) or above.

    Args:
        dropped: the numbers of rows left out before, so that errors name rows by their numbers in the file.
    """
    gone = set(dropped)
    numbers = (number for number in count() if number not in gone)
    for row, ids in zip(numbers, _column(dataset, "input_ids"), strict=False):
        if len(ids) and ids.max() >= embedded:
            raise unknown_token(int(ids.max()), tokenizer, embedded, place=f"Row {row} of the {name} data")


def refuse_unknown_tokens_of(trainer: Any) -> None:
    """`refuse_unknown_tokens` for a trainer's data sets, except streams."""
    embedded = trainer.model.get_input_embeddings().weight.shape[0]
    evaluation = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    for name, rows in {"train": trainer.train_dataset, **evaluation}.items():
        if isinstance(rows, Dataset) and "input_ids" in rows.column_names and embedded:
            refuse_unknown_tokens(rows, trainer._start.tokenizer, embedded, name=name)


def refuse_unknown_padding(args: "CAFTConfig", tokenizer: Any, embedded: int) -> None:
    """`refuse_unknown_tokens` for the padding token, if rows are padded: its embedding is looked up, too."""
    pad = args.pad_token or tokenizer.pad_token or tokenizer.eos_token
    number = tokenizer.convert_tokens_to_ids(pad) if pad is not None else None
    if number is not None and number >= embedded and not (args.padding_free or args.packing):
        raise unknown_token(number, tokenizer, embedded, place="The padding of rows (pad_token)")


class RefuseLeaks(TrainerCallback):
    """Before the first step of a run with packed rows, checks that the model keeps packed documents apart.

    Two forward passes differ in the first of two documents. If the logits of the second document change, attention crosses
    documents with this attention implementation.

    Args:
        refuse: raise an error; False: only warn, as SFTTrainer would train.
    """

    def __init__(self, trainer: Any, *, refuse: bool = True) -> None:
        self._trainer = trainer
        self._refuse = refuse

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        model = self._trainer.model
        if not self._trainer.padding_free:
            return
        moved, tolerance = _movement(self._trainer)
        if moved > tolerance:
            attention = getattr(model.config.get_text_config(), "_attn_implementation", None)
            problem = (
                f"packing and padding_free must be False for this model with attention {attention!r}: its logits within a "
                f"document change with the document before it (by {moved:.1%} of the largest logit), so it would be trained "
                "on text it should not see. Try attn_implementation='flash_attention_2' on a GPU."
            )
            if self._refuse:
                raise CaftuneError(problem)
            _logger.warning(problem)


def _movement(trainer: Any) -> tuple[float, float]:
    """The largest change of a logit of the second document, as a share of the largest logit; and the tolerance."""
    vocabulary = whole_shape(trainer.model.get_input_embeddings().weight)[0]
    numbers = torch.arange(1, _TOKENS + 1)
    one, other, second = ((numbers * factor % vocabulary).tolist() for factor in (1, 3, 2))
    # FSDP2 casts the weights themselves.
    is_cast = trainer.is_fsdp_enabled and trainer.accelerator.mixed_precision != "no"
    is_half = any(parameter.dtype not in _TOLERANCE for parameter in trainer.model.parameters())
    half = is_half or is_cast or has_flash_attention(trainer.model)
    with evaluating(trainer.model), torch.no_grad(), nullcontext() if half else _without_autocast(trainer.model):
        logits, changed = (_second_logits(trainer, first, second) for first in (one, other))
    tolerance = _HALF_TOLERANCE if half else _TOLERANCE[logits.dtype]
    return float((logits - changed).abs().max() / logits.abs().max()), tolerance


@contextmanager
def _without_autocast(model: Any) -> Iterator[None]:
    """Full precision, where rounding does not hide a small leak: without the autocast in accelerate's forward."""
    patched = vars(model).get("forward")
    if "_original_forward" not in vars(model):
        yield
        return
    model.forward = model._original_forward
    try:
        yield
    finally:
        model.forward = patched


def _second_logits(trainer: Any, first: list[int], second: list[int]) -> Tensor:
    """Logits of the second of two documents, packed into one row by the trainer's collator."""
    batch = trainer.data_collator([{"input_ids": ids, "labels": ids} for ids in (first, second)])
    batch = {
        name: value.to(trainer.args.device) if isinstance(value, Tensor) else value for name, value in batch.items()
    }
    del batch["labels"]
    return trainer.model_wrapped(**batch, use_cache=False).logits[0, len(first) :]
