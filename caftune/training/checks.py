"""What CAFTTrainer refuses before it starts, each in one sentence with a remedy."""

import logging
import math
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations.fsdp import is_fsdp_enabled

from caftune.core.backbone import evaluating, has_flash_attention
from caftune.core.objective import IGNORED
from caftune.errors import CaftuneError
from caftune.generation.backends import unknown_token
from caftune.training.config import CAFTConfig

_logger = logging.getLogger(__name__)
_HALF = (torch.bfloat16, torch.float16)
_NAMED_ROWS = 5
_ROWS_AT_ONCE = 1000
_QUANTISED = (
    "model must not be quantised without a peft_config, nor in stage 1. Give a LoraConfig; pretrain heads on the unquantised "
    "base, they fit the quantised one."
)
_MOST_DROPPED = 0.1  # of a data set
# Packing check: tokens of each of two documents, and the largest change of a logit that rounding explains, as a share of the
# largest logit. Documents that the model keeps apart differ by less (experts see other batches), others by far more.
_TOKENS = 8
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_HALF_TOLERANCE = 5e-3
_LENGTHEN = "Raise max_length, shorten their prompts, or remove these rows."


def refuse_arguments(
    args: CAFTConfig, peft_config: Any, compute_loss_func: Any, compute_metrics: Any, optimizers: tuple[Any, Any]
) -> None:
    """Refuse arguments of the trainer that do not work with heads."""
    if optimizers[0] is not None and args.has_heads and (args.pretrain_heads or args.train_heads):
        raise CaftuneError(
            "optimizers must not hold an optimizer where heads are trained: it was made before they exist. "
            "Use optimizer_cls_and_kwargs."
        )
    if getattr(peft_config, "layer_replication", None) and args.has_heads:
        raise CaftuneError(
            "peft_config.layer_replication must be None: it puts other layers where the heads leave the model."
        )
    if not args.pretrain_heads:
        return
    if peft_config is not None:
        raise CaftuneError("peft_config must be None in stage 1: heads are pretrained on the plain base. Leave it out.")
    if compute_loss_func is not None:
        raise CaftuneError(
            "compute_loss_func must be None in stage 1, which trains on the heads' losses alone. Give it in stage 2."
        )
    if args.push_to_hub:
        raise CaftuneError(
            "push_to_hub must be False in stage 1: what Trainer pushes has no heads. Use `caftune heads push`."
        )
    if compute_metrics is not None:
        raise CaftuneError(
            "compute_metrics must be None in stage 1: there are no logits of the model to measure. Leave it out."
        )


def refuse_quantised(quantization_config: Any, *, has_adapter: bool) -> None:
    """Refuse bitsandbytes' quantised weights without an adapter: they cannot be trained."""
    if getattr(quantization_config, "quant_method", None) == "bitsandbytes" and not has_adapter:
        raise CaftuneError(_QUANTISED)


def refuse_processes(args: CAFTConfig) -> None:
    """Launches in which processes would not work together."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > args.world_size:
        raise CaftuneError(
            f"{launched} processes were launched, and each would train alone, in the same folder. Without GPUs set "
            "use_cpu=True; else launch with a configuration like those in recipes/accelerate."
        )
    if not args.has_heads:
        return
    if args.n_gpu > 1:
        raise CaftuneError(
            f"One process must have one GPU with auxiliary heads, got {args.n_gpu}: the model would lie on several. Launch a "
            "process for each (accelerate launch, recipes/accelerate), or set CUDA_VISIBLE_DEVICES=0."
        )
    plugin = args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise CaftuneError(
            "zero_stage must be at most 2 with auxiliary heads, got 3: the unembedding, which the heads share, is empty there "
            "outside its own call. FSDP2 shards the weights too (recipes/accelerate/fsdp2.yaml)."
        )
    if is_fsdp_enabled():  # true only with efficient loading
        raise CaftuneError(
            "fsdp_cpu_ram_efficient_loading must be false with auxiliary heads: every process copies them from the whole "
            "base, which with it only the first one has. Set it in accelerate's configuration (recipes/accelerate/fsdp2.yaml)."
        )


def refuse_split_rows(accelerator: Any, *, is_fsdp: bool) -> None:
    """Kinds of sharding that the heads cannot work under."""
    if is_fsdp and not accelerator.is_fsdp2:
        raise CaftuneError("fsdp_version must be 2 with auxiliary heads, got 1. See recipes/accelerate/fsdp2.yaml.")
    parallelism = accelerator.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise CaftuneError(
            "cp_size and sp_size must be 1: context and sequence parallelism cut rows into pieces, and a head's target may "
            "lie in the next one. Use FSDP2 or DeepSpeed ZeRO for memory, or a smaller max_length."
        )


def refuse_lost_adapters(accelerator: Any, model: Any) -> None:
    """An adapter that PEFT (0.21) would save as an empty file: the state names its layers without FSDP's wrappers."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.activation_checkpointing and hasattr(model, "peft_config"):
        raise CaftuneError(
            "fsdp_activation_checkpointing must be false with a peft_config, got true: the adapter would be saved without its "
            "weights. Use gradient_checkpointing=True."
        )


def refuse_short_context(model: Any, args: CAFTConfig, *, furthest: int) -> None:
    """Horizons that no row is long enough for."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    context = min(args.max_length or math.inf, positions or math.inf)
    if furthest >= context:
        raise CaftuneError(
            f"num_heads must leave horizons below the context of {context} tokens, got horizon {furthest}. "
            "Use fewer heads or a larger max_length."
        )


def refuse_unknown_tokens_of(trainer: Any) -> None:
    """`refuse_unknown_tokens` for a trainer's data sets, except streams."""
    embedded, evaluation = trainer.model.get_input_embeddings().weight.shape[0], trainer.eval_dataset
    named = evaluation if isinstance(evaluation, dict) else {"eval": evaluation}
    for name, rows in {"train": trainer.train_dataset, **named}.items():
        if isinstance(rows, Dataset) and "input_ids" in rows.column_names and embedded:
            refuse_unknown_tokens(rows, trainer._tokenizer, embedded, name=name)


def refuse_unfit_heads(trainer: Any) -> None:
    """Heads that do not go with how the model is sharded, how long its rows are, or what of it is trained."""
    args, config, backbone = trainer.args, trainer.heads.config, trainer.backbone
    refuse_split_rows(trainer.accelerator, is_fsdp=trainer.is_fsdp_enabled)
    refuse_short_context(trainer.model, args, furthest=config.horizons[-1])
    if args.aux_weight == 0 or trainer.trains_heads or config.kind != "decoder":
        return
    beside = {id(parameter) for parameter in backbone.layer.parameters()}
    trained = [parameter for parameter in backbone.model.parameters() if parameter.requires_grad]
    if trained and all(id(parameter) in beside for parameter in trained):
        raise CaftuneError(
            "Not the last layer alone must be trained: decoder heads stand beside it, and their losses would reach nothing. "
            "Train other layers too, or use heads of kind mlp."
        )


def refuse_unfit(model: PreTrainedModel | PeftModel, peft_config: Any, args: CAFTConfig) -> None:
    """Refuse models that cannot be trained with heads."""
    configs = _adapters(model, peft_config)
    if args.pretrain_heads and configs:
        raise CaftuneError(
            "model must be the plain base, got one wrapped by PEFT: stage 1 trains heads of the base. Load the base alone."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise CaftuneError(
            "model must be a PeftModel where it carries adapters, got adapters of transformers' load_adapter, which would not "
            "be exported. Use PeftModel.from_pretrained(base, adapter, is_trainable=True)."
        )
    learning = next((kind for kind in configs if getattr(kind, "is_prompt_learning", False)), None)
    if learning is not None:
        raise CaftuneError(
            f"peft_config must adapt weights (LoRA and its kin) with heads, got {type(learning).__name__}: its virtual tokens "
            "come before the row, and heads would count them among the tokens they predict. Use LoRA, or leave out `heads`."
        )
    if getattr(model, "is_quantized", False) and not configs:
        raise CaftuneError(_QUANTISED)
    if not (peft_config or args.pretrain_heads or any(parameter.requires_grad for parameter in model.parameters())):
        raise CaftuneError(
            "model must have weights to train, and all are frozen (stage 1 freezes the model it is given). Load it again, or "
            "call model.requires_grad_(True); load an adapter with is_trainable=True."
        )
    for kind in configs:
        _refuse_untying(model, kind)
    half = next((p.dtype for p in model.parameters() if p.requires_grad and p.dtype in _HALF), None)
    if half is not None and not configs and not args.pretrain_heads:
        raise CaftuneError(
            f"model must hold float32 weights for full fine-tuning, got {half}: updates below about 1/256 of a weight would "
            "be lost. Load it with dtype='float32' (bf16=True still computes in bfloat16), or give a LoraConfig."
        )


def _adapters(model: Any, peft_config: Any) -> list[Any]:
    """The configurations of the model's adapters and of the one to be added."""
    carried = model.peft_config.values() if isinstance(model, PeftModel) else ()
    return [*carried, *([] if peft_config is None else [peft_config])]


def _refuse_untying(model: PreTrainedModel | PeftModel, peft_config: Any) -> None:
    """A trained copy of one of two tied matrices cannot be written with the base's keys."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    embeddings = {model.get_input_embeddings(), model.get_output_embeddings()}
    tied = {name.rpartition(".")[2] for name, module in model.named_modules() if module in embeddings}
    saved = tied & set(getattr(peft_config, "modules_to_save", None) or ())
    if saved and not getattr(peft_config, "ensure_weight_tying", False):
        raise CaftuneError(
            f"modules_to_save must not hold {', '.join(sorted(saved))}: this base ties its embeddings, and training one of "
            "two copies would untie them. Set ensure_weight_tying=True in the peft_config, or leave it out."
        )


def refuse_missing_parts(dataset: Dataset, args: CAFTConfig, *, name: str, as_stock: bool = False) -> None:
    """Refuse rows without the part that is to be trained on.

    Args:
        as_stock: only warn about what SFTTrainer trains on.
    """
    if "input_ids" in dataset.column_names:
        return
    if "prompt" in dataset.column_names and "completion" not in dataset.column_names:
        raise CaftuneError(
            f"The {name} data has prompts and no completions to train on; its columns are {', '.join(dataset.column_names)}. "
            "Name the answers completion (of preference pairs, the chosen ones)."
        )
    if args.completion_only_loss and "completion" not in dataset.column_names:
        problem = (
            f"completion_only_loss must not be set where rows have no completion, as in the {name} data: every token would be "
            "trained on. Use assistant_only_loss for messages, or leave it out."
        )
        if not as_stock:
            raise CaftuneError(problem)
        _logger.warning(problem)
    if args.assistant_only_loss and "messages" in dataset.column_names:
        talks = enumerate(dataset["messages"])
        silent = [row for row, talk in talks if not any(message["role"] == "assistant" for message in talk)]
        if silent:
            raise CaftuneError(
                f"{len(silent)} of {len(dataset)} rows of the {name} data (counted from 0: {_named(silent)}) have no assistant "
                "turn, on which assistant_only_loss trains. Remove these rows, or leave assistant_only_loss out."
            )


def _named(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:_NAMED_ROWS])) + (", ..." if len(rows) > _NAMED_ROWS else "")


def cut_length(args: CAFTConfig, *, packing: bool) -> int | None:
    """The tokens that rows are cut to; None where packing splits long documents instead."""
    return None if packing and args.packing_strategy in ("bfd_split", "wrapped") else args.max_length


def find_truncated_rows(
    dataset: Dataset, max_length: int, truncation_mode: str, *, name: str, may_be_all: bool = False, kept: bool = False
) -> tuple[list[int], int]:
    """The rows that truncation to `max_length` leaves without a trained token, and how many it shortens. Both are logged.

    Args:
        kept: whether these rows are kept (only the log differs).

    Raises:
        CaftuneError: no row has a token to train on, unless `may_be_all`.
    """
    part = slice(-max_length, None) if truncation_mode == "keep_end" else slice(max_length)
    lost, shortened = [], 0
    batches = (
        dataset.select_columns("labels").with_format("numpy").iter(_ROWS_AT_ONCE)
    )  # row by row takes ten times as long
    for row, labels in enumerate(labels for batch in batches for labels in batch["labels"]):
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
        why = ": no row is left" if len(dropped) == total else ", and up to a tenth may be left out"
        raise CaftuneError(f"{_cut(dropped, total, max_length, name)}{why}. {_LENGTHEN}")


def refuse_long_rows(dataset: Dataset, context: int | None, *, name: str) -> None:
    """Raise CaftuneError where rows are longer than the model's context (for data.max_length: null)."""
    batches = dataset.select_columns("input_ids").with_format("numpy").iter(_ROWS_AT_ONCE)
    lengths = [len(ids) for batch in batches for ids in batch["input_ids"]]
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
    batches = dataset.select_columns("input_ids").with_format("numpy").iter(_ROWS_AT_ONCE)
    for row, ids in zip(numbers, (ids for batch in batches for ids in batch["input_ids"]), strict=False):
        if len(ids) and ids.max() >= embedded:
            raise unknown_token(int(ids.max()), tokenizer, embedded, place=f"Row {row} of the {name} data")


def refuse_unknown_padding(args: CAFTConfig, tokenizer: Any, embedded: int) -> None:
    """`refuse_unknown_tokens` for the padding token, where rows are padded: its embedding is looked up, too."""
    pad = args.pad_token or tokenizer.pad_token or tokenizer.eos_token
    number = tokenizer.convert_tokens_to_ids(pad) if pad is not None else None
    if number is not None and number >= embedded and not (args.padding_free or args.packing):
        raise unknown_token(number, tokenizer, embedded, place="The padding of rows (pad_token)")


class RefuseLeaks(TrainerCallback):
    """Before the first step of a run with packed rows: two forward passes that differ in the first of two documents.

    If what the model says within the second document moves, it sees across documents, with this attention
    implementation, and the run is refused.

    Args:
        refuse: raise an error; False: only warn, since SFTTrainer would train.
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
                f"packing and padding_free must be False for this model with attention {attention!r}: what it says within a "
                f"document changes with the document before it in the row (by {moved:.1%} of its largest logit), so it would "
                "be trained on text it should not see. Try attn_implementation='flash_attention_2' on a GPU."
            )
            if self._refuse:
                raise CaftuneError(problem)
            _logger.warning(problem)


def _movement(trainer: Any) -> tuple[float, float]:
    """The largest change of a logit of the second document, as a share of the largest logit; and what rounding explains."""
    vocabulary = trainer.model.get_input_embeddings().weight.shape[0]
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
    """Full precision, in which a small leak does not drown in rounding: accelerate puts its autocast into the forward."""
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
    """Logits at the second of two documents, in a batch as the trainer packs it."""
    batch = trainer.data_collator([{"input_ids": ids, "labels": ids} for ids in (first, second)])
    batch = {
        name: value.to(trainer.args.device) if isinstance(value, Tensor) else value for name, value in batch.items()
    }
    del batch["labels"]
    return trainer.model_wrapped(**batch, use_cache=False).logits[0, len(first) :]
