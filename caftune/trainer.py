"""`CAFTTrainer`, a drop-in for TRL's `SFTTrainer`.

One class serves both stages. Stage 1 (`pretrain_heads=True`) trains the heads alone: the trunk is frozen and runs without a
graph, beta = 1, gamma constant, and the main loss is left out. Stage 2 trains the model with the auxiliary losses added.
With `aux_weight=0` stage 2 is the stock SFTTrainer, step for step.
"""

import copy
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from trl import SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.trainer.utils import create_model_from_path

from caftune.backbone import Backbone
from caftune.checkpoint import export_model, load_heads, read_heads, save_heads
from caftune.config import CAFTConfig
from caftune.heads import ATTRIBUTE, AuxiliaryHeads, HeadsConfig, attach_heads
from caftune.objective import IGNORED, auxiliary_loss, horizon_targets

_logger = logging.getLogger(__name__)
_HALF = (torch.bfloat16, torch.float16)
_NAMED_ROWS = 5


class CAFTTrainer(SFTTrainer):
    """TRL's SFTTrainer with auxiliary heads.

    Takes the arguments of SFTTrainer. Checkpoints and `save_model` are ordinary ones without heads (stage 1: only the
    heads); `export` writes the finished model with the base's keys.

    Raises:
        HeadsError: the heads do not belong to the model.
        ValueError: options that cannot work together, rows without a trained token, half-precision master weights.
    """

    args: CAFTConfig
    model: Any
    heads: Any  # AuxiliaryHeads, None where the run has none
    backbone: Any  # Backbone, None without heads
    _tag_names: ClassVar[list[str]] = ["trl", "sft", "caft"]
    _name = "CAFT"

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: CAFTConfig,
        *,
        processing_class: Any = None,
        peft_config: Any = None,
        quantization_config: Any = None,
        **sft_arguments: Any,
    ) -> None:
        _refuse_arguments(args, peft_config, sft_arguments)
        if isinstance(model, str):
            model = _load_model(model, args, quantization_config)
            quantization_config = None
        if processing_class is None:
            revision = dict(args.model_init_kwargs or {}).get("revision")  # type: ignore[arg-type]
            processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path, revision=revision)
        _refuse_unfit(model, peft_config, args)
        self.heads, self.backbone = _heads_for(model, args, processing_class)
        # The model is built: SFTTrainer would warn that these are not used.
        model_init_kwargs, args.model_init_kwargs = args.model_init_kwargs, None
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            peft_config=peft_config,
            quantization_config=quantization_config,
            **sft_arguments,
        )
        args.model_init_kwargs = model_init_kwargs
        self._horizon_counts: Tensor | None = None
        self._horizon_sums: dict[str, dict[str, Tensor]] = {}
        if self.heads is not None:
            self._attach()

    def _attach(self) -> None:
        """Put the heads into the model, after PEFT has wrapped it (so that it leaves them alone)."""
        self._refuse_short_context()
        attach_heads(self.backbone, self.heads.to(self.args.device))
        trained = self.args.pretrain_heads or self.args.train_heads
        if self.args.pretrain_heads:
            self.model.requires_grad_(False)
        if trained:
            self.heads.float()  # master weights, also beside a half-precision trunk
        self.heads.requires_grad_(trained)

    def export(self, folder: str | os.PathLike[str]) -> None:
        """Write the trained model as an ordinary checkpoint (stage 1: the heads)."""
        if not self.is_world_process_zero():
            return
        if self.args.pretrain_heads:
            self._save_heads(Path(folder))
        else:
            export_model(self.accelerator.unwrap_model(self.model), folder, self.processing_class)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """L_1 as SFTTrainer computes it, and the auxiliary losses. In evaluation L_1 alone; stage 1 has no L_1."""
        if self.args.pretrain_heads:
            auxiliary = model(**inputs, use_cache=False, auxiliary="only")["auxiliary"]
            loss = self._auxiliary_loss(auxiliary, num_items_in_batch)
            return (loss, auxiliary) if return_outputs else loss
        training = self.model.training
        if self.heads is None or (training and self.args.aux_weight == 0):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        scores: dict[str, Tensor] = {}

        def forward(**arguments: Any) -> Any:
            if not arguments.get("fused_lm_head"):
                return model(**arguments)
            outputs = model(**arguments, auxiliary="add")
            scores.update(outputs["auxiliary"])
            self._record_main(outputs)
            return outputs

        result = super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)
        if not training:
            self._record(scores)
            return result
        loss = (result[0] if return_outputs else result) + self._auxiliary_loss(scores, num_items_in_batch)
        return (loss, result[1]) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one optimizer step; the targets of every horizon are counted over all of them."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.heads is not None and batches:
            counts = (
                torch.stack([_count_targets(batch, self.heads.config.horizons) for batch in batches]).sum(0).to(device)
            )
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                counts = self.accelerator.reduce(counts, reduction="sum")
            self._horizon_counts = counts
        return batches, num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each horizon's loss in nats, top-1 accuracy and (in training) present weight."""
        mode = "train" if self.model.training else "eval"
        sums = self._horizon_sums.pop(mode, None)
        if sums is not None:
            logs.update(self._horizon_metrics(sums, mode))
        super().log(logs, start_time)

    def _horizon_metrics(self, sums: dict[str, Tensor], mode: str) -> dict[str, float]:
        names = sorted(sums)
        total = self.accelerator.reduce(torch.cat([sums[name].double() for name in names]), reduction="sum").tolist()
        values = iter(total)
        table = {name: [next(values) for _ in sums[name]] for name in names}
        prefix = "eval_" if mode == "eval" else ""
        metrics = {}
        for i, horizon in enumerate(self._horizons(table)):
            count = max(table["count"][i], 1)
            metrics[f"{prefix}h{horizon}_loss"] = table["nll"][i] / count
            metrics[f"{prefix}h{horizon}_accuracy"] = table["correct"][i] / count
        if mode == "train" and self.heads is not None:
            weights = self._weights_at(max(self.state.global_step - 1, 0))
            metrics |= {f"h{h}_weight": weight for h, weight in zip(self.heads.config.horizons, weights, strict=True)}
        return metrics

    def _horizons(self, table: dict[str, list[float]]) -> list[int]:
        heads = self.heads.config.horizons if self.heads is not None else []
        return heads if len(table["count"]) == len(heads) else [1, *heads]

    def _weights_at(self, step: int) -> list[float]:
        horizons = self.heads.config.horizons
        return self.args.auxiliary_weights.at(step, max(self.state.max_steps, 1), horizons)

    def _auxiliary_loss(self, scores: dict[str, Tensor], num_items_in_batch: Any) -> Tensor:
        self._record(scores)
        if not self.model.training:  # stage 1: the objective without gamma, so that evaluations can be compared
            constant = replace(self.args.auxiliary_weights, schedule="constant")
            return auxiliary_loss(scores["nll"], scores["count"], constant.at(0, 1, self.heads.config.horizons))
        if self._horizon_counts is None:
            return auxiliary_loss(scores["nll"], scores["count"], self._weights_at(self.state.global_step))
        loss = auxiliary_loss(scores["nll"], self._horizon_counts, self._weights_at(self.state.global_step))
        if num_items_in_batch is None:  # then Trainer divides what compute_loss returns by the number of micro-batches
            loss = loss * self.current_gradient_accumulation_steps
        # DDP averages gradients over ranks, while the counts are sums over ranks: as SFTTrainer does for L_1.
        return loss * self.accelerator.num_processes if self.args.average_tokens_across_devices else loss

    def _record_main(self, outputs: Any) -> None:
        self._main = {
            "nll": -outputs.log_probs.detach().sum(),
            "count": outputs.label_mask.sum(),
            "correct": outputs.is_top1.sum(),
        }

    def _record(self, scores: dict[str, Tensor]) -> None:
        """Add a batch's sums to those since the last log: horizon 1 first where it was computed."""
        main = self.__dict__.pop("_main", None)
        kept = self._horizon_sums.setdefault("train" if self.model.training else "eval", {})
        for name, value in scores.items():
            row = value.detach().double()
            row = row if main is None else torch.cat([main[name].double()[None], row])
            kept[name] = kept[name] + row if name in kept else row

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """As SFTTrainer, but rows whose answer max_length would cut away are refused instead of dropped in silence."""
        if isinstance(dataset, IterableDataset):
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        dataset = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
        if args.max_length is not None and not (packing and args.packing_strategy == "bfd_split"):
            _refuse_cut_answers(dataset, args.max_length, name=dataset_name)
        return super()._prepare_dataset(dataset, processing_class, args, packing, None, dataset_name)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        if not self.args.pretrain_heads:
            super()._save(output_dir, state_dict)
        if self.heads is not None and (self.args.pretrain_heads or self.args.train_heads) and self.args.should_save:
            self._save_heads(folder if self.args.pretrain_heads else folder / "heads")

    def _save_heads(self, folder: Path) -> None:
        stage = {key: getattr(self.args, key) for key in ("learning_rate", "num_train_epochs", "seed", "aux_decay")}
        training = {"stage": 1 if self.args.pretrain_heads else 2, "steps": self.state.global_step, **stage}
        save_heads(folder, self.heads, self.backbone, self.processing_class, training=training)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.args.pretrain_heads:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_trained_heads(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if not self.args.pretrain_heads:
            super()._load_best_model()
        self._load_trained_heads(Path(str(self.state.best_model_checkpoint)))

    def _load_trained_heads(self, checkpoint: Path) -> None:
        if self.heads is None or not (self.args.pretrain_heads or self.args.train_heads):
            return
        folder = checkpoint if self.args.pretrain_heads else checkpoint / "heads"
        self.heads.load_state_dict(read_heads(folder))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        missing = [key for key in load_result.missing_keys if not key.startswith(f"{ATTRIBUTE}.")]
        super()._issue_warnings_after_load(
            SimpleNamespace(missing_keys=missing, unexpected_keys=load_result.unexpected_keys)
        )

    def _refuse_short_context(self) -> None:
        context = self.args.max_length or math.inf
        context = min(
            context, getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        )
        furthest = self.heads.config.horizons[-1]
        if furthest >= context:
            raise ValueError(
                f"num_heads must leave horizons below the context of {context} tokens, got horizon {furthest}. "
                "Use fewer heads or a larger max_length."
            )


def tokenized(dataset: Dataset, tokenizer: Any, args: CAFTConfig, *, name: str) -> Dataset:
    """`input_ids` and `labels` exactly as the trainer would make them, without a model and before packing.

    Raises:
        ValueError: rows whose answer lies wholly beyond `max_length`, counted and named.
    """
    # SFTTrainer prepares data in a method; it reads these three attributes and nothing else of the trainer (TRL 1.16).
    trainer = CAFTTrainer.__new__(CAFTTrainer)
    trainer._tokenizer, trainer.chat_template = tokenizer, None
    paired = {"prompt", "completion"} <= set(dataset.column_names)
    trainer.completion_only_loss = paired if args.completion_only_loss is None else args.completion_only_loss
    if args.assistant_only_loss and not has_generation_markers(tokenizer.chat_template):
        trainer.chat_template = get_training_chat_template(tokenizer)
    return trainer._prepare_dataset(dataset, tokenizer, args, False, None, name)


def _refuse_arguments(args: Any, peft_config: Any, sft_arguments: dict[str, Any]) -> None:
    if not isinstance(args, CAFTConfig):
        raise TypeError(f"args must be a CAFTConfig, got {type(args).__name__}.")
    if args.pretrain_heads and peft_config is not None:
        raise ValueError("peft_config must be None in stage 1: heads are pretrained on the plain base.")
    if sft_arguments.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func must be None: CAFTTrainer computes the loss.")


def _load_model(name: str, args: CAFTConfig, quantization_config: Any) -> PreTrainedModel:
    options: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    options.setdefault("trust_remote_code", args.trust_remote_code)
    return create_model_from_path(name, **options)


def _refuse_unfit(model: PreTrainedModel, peft_config: Any, args: CAFTConfig) -> None:
    if hasattr(model, "peft_config"):
        raise ValueError("model must be the plain base, got one wrapped by PEFT. Give the base and a peft_config.")
    if getattr(peft_config, "is_prompt_learning", False) and args.aux_weight:
        raise ValueError(f"peft_config must adapt weights (LoRA and its kin), got {type(peft_config).__name__}.")
    _refuse_untying(model, peft_config)
    half = next((p.dtype for p in model.parameters() if p.requires_grad and p.dtype in _HALF), None)
    if half is not None and peft_config is None and not args.pretrain_heads:
        raise ValueError(
            f"model must hold float32 weights for full fine-tuning, got {half}: updates below about 1/256 of a weight would "
            "be lost. Load it with dtype='float32'; bf16=True still computes in bfloat16."
        )


def _refuse_untying(model: PreTrainedModel, peft_config: Any) -> None:
    """A trained copy of one of two tied matrices cannot be written with the base's keys."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    embeddings = {model.get_input_embeddings(), model.get_output_embeddings()}
    tied = {name.rpartition(".")[2] for name, module in model.named_modules() if module in embeddings}
    saved = tied & set(getattr(peft_config, "modules_to_save", None) or ())
    if saved:
        raise ValueError(
            f"modules_to_save must not hold {', '.join(sorted(saved))}: this base ties its embeddings, and training one of "
            "two copies would untie them. Leave it out, or use full fine-tuning."
        )


def _heads_for(
    model: PreTrainedModel, args: CAFTConfig, tokenizer: Any
) -> tuple[AuxiliaryHeads | None, Backbone | None]:
    if args.heads is None and not args.pretrain_heads:
        return None, None
    backbone = Backbone.of(model)
    if args.heads is not None:
        return load_heads(args.heads, backbone, tokenizer, force=args.force_heads), backbone
    return AuxiliaryHeads.build(backbone, HeadsConfig(args.num_heads, args.head_kind)), backbone


def _count_targets(batch: dict[str, Tensor], horizons: list[int]) -> Tensor:
    where = {"position_ids": batch.get("position_ids"), "attention_mask": batch.get("attention_mask")}
    return torch.stack([(horizon_targets(batch["labels"], h, **where) != IGNORED).sum() for h in horizons])


def _refuse_cut_answers(dataset: Dataset, max_length: int, *, name: str) -> None:
    lost, shortened = [], 0
    for row, example in enumerate(dataset.select_columns("labels").with_format("numpy")):
        if (example["labels"][:max_length] == IGNORED).all():
            lost.append(row)
        shortened += len(example["labels"]) > max_length
    if lost:
        named = ", ".join(map(str, lost[:_NAMED_ROWS])) + (", ..." if len(lost) > _NAMED_ROWS else "")
        raise ValueError(
            f"{len(lost)} of {len(dataset)} rows of the {name} data (counted from 0: {named}) have no token to train on within "
            f"max_length={max_length}. Raise max_length, shorten their prompts, or remove these rows."
        )
    if shortened:
        _logger.warning(
            "%d of %d %s rows are longer than max_length=%d and lose their end.",
            shortened,
            len(dataset),
            name,
            max_length,
        )
