"""`CAFTTrainer`, a drop-in for TRL's `SFTTrainer`: what CAFTMixin adds to a trainer, and how SFTTrainer loads and reads."""

import copy
from typing import Any, ClassVar

from datasets import IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments

from caftune.errors import CaftuneError
from caftune.training._compat import as_sft_trainer_needs, keep_trainable_on_cpu
from caftune.training._trl import SFTTrainer
from caftune.training.checks import (
    RefuseLeaks,
    cut_length,
    find_truncated_rows,
    half_precision_problem,
    refuse_arguments,
    refuse_missing_parts,
    refuse_processes,
    refuse_quantised,
    refuse_unfit,
)
from caftune.training.config import CAFTConfig, as_caft_config
from caftune.training.loading import (
    Start,
    holds_adapter,
    holds_tokenizer,
    load_base,
    load_or_build_heads,
    load_processing_class,
    name_of,
    text_tokenizer,
)
from caftune.training.mixin import CAFTMixin


class CAFTTrainer(CAFTMixin, SFTTrainer):
    """TRL's SFTTrainer with auxiliary heads.

    Takes the arguments of SFTTrainer, in its order. There are heads where `args` is a CAFTConfig with `heads` or
    `pretrain_heads`. Otherwise (no `args`, an SFTConfig, TrainingArguments, a CAFTConfig with `aux_weight=0` and no `heads`) it
    is SFTTrainer: the same data, losses, weights and errors. `model` may also be a folder with an adapter, which is trained
    further. Checkpoints and `save_model` are ordinary ones without heads (stage 1: the heads only); `export` writes the
    finished model with the base's keys.

    Raises:
        CaftuneError: heads of another model, options that do not work with heads, or rows without a trained token.
    """

    args: CAFTConfig
    _tag_names: ClassVar[list[str]] = ["trl", "sft", "caft"]
    _name = "CAFT"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: CAFTConfig | TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Any = None,
    ) -> None:
        is_stock = not isinstance(args, CAFTConfig)
        args = as_caft_config(args, model)
        refuse_processes(args)
        refuse_arguments(args, peft_config, compute_loss_func, compute_metrics, optimizers)
        self._revision = dict(args.model_init_kwargs or {}).get("revision")  # type: ignore[arg-type]
        has_adapter = isinstance(model, str) and holds_adapter(model)
        is_loaded = isinstance(model, str) and (args.has_heads or has_adapter)  # otherwise SFTTrainer loads it
        if isinstance(model, str):
            refuse_quantised(quantization_config, has_adapter=has_adapter or peft_config is not None)
        if isinstance(model, str) and is_loaded:
            name, model = model, load_base(model, args, quantization_config)
            quantization_config = None
            if processing_class is None and has_adapter and holds_tokenizer(name):
                processing_class = load_processing_class(name, args)
        self._start = Start()
        if args.has_heads and not isinstance(model, str):
            processing_class = processing_class or load_processing_class(name_of(model), args)
            refuse_unfit(model, peft_config, args)
            problem = half_precision_problem(model, peft_config, args)
            if problem is not None:
                raise CaftuneError(problem)
            keep_trainable_on_cpu(model)
            # A copy, because SFTTrainer may add tokens to it.
            self._start = load_or_build_heads(model, args, copy.deepcopy(text_tokenizer(processing_class)))
        # By data set: numbers of the examples that are left out, since they have no trained token within max_length.
        self.dropped_rows: dict[str, list[int]] = {}
        with as_sft_trainer_needs(args, processing_class, has_model=is_loaded):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_loss_func=compute_loss_func,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                quantization_config=quantization_config,
                peft_config=peft_config,
                formatting_func=formatting_func,
            )
        self.add_callback(RefuseLeaks(self, refuse=not is_stock))

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """As SFTTrainer, but the examples whose answer max_length cuts away are logged (SFTTrainer drops them silently).

        With packing SFTTrainer keeps them, without a token to train on.

        Raises:
            CaftuneError: no example keeps a token to train on, or examples lack the part that is trained on.
        """
        if isinstance(dataset, IterableDataset):
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if formatting_func is None:
            refuse_missing_parts(dataset, args, name=dataset_name, as_stock=not args.has_heads)
        length = cut_length(args, packing=packing)
        if length is None:
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        dataset = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
        mode = "keep_start" if packing else args.truncation_mode  # SFTTrainer always keeps the start when packing
        lost, shortened = find_truncated_rows(
            dataset, length, mode, name=dataset_name, may_be_all=not args.has_heads, kept=packing
        )
        if lost and not packing:
            self.dropped_rows[dataset_name] = lost
            gone = set(lost)
            dataset = dataset.select([row for row in range(len(dataset)) if row not in gone])
        is_known = args.truncation_mode in ("keep_start", "keep_end")  # SFTTrainer refuses other values
        if is_known and not (shortened or packing):  # avoids two passes over the data that would cut nothing
            whole.shuffle_dataset, args = args.shuffle_dataset, whole
        return super()._prepare_dataset(dataset, processing_class, args, packing, None, dataset_name)
