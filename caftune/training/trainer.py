"""`CAFTTrainer`, a drop-in for TRL's `SFTTrainer`.

Stage 1 (`pretrain_heads=True`) trains the heads only: the trunk is frozen and runs without a graph, beta = 1, gamma is
constant, and there is no main loss. Stage 2 trains the model, and the heads with it unless `train_heads` is False, on the main
loss plus the auxiliary losses. With `aux_weight=0` stage 2 is SFTTrainer, step for step.
"""

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from datasets import IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTTrainer
from trl.trainer.utils import get_config_model_id

from caftune.checkpoints.cards import write_model_card
from caftune.checkpoints.export import export_model, export_saved
from caftune.checkpoints.heads_folder import read_heads, save_heads
from caftune.core.attach import ATTRIBUTE, attach_heads
from caftune.core.backbone import whole_shape
from caftune.core.finite import refuse_not_finite
from caftune.core.objective import HorizonTargets, Sample, weights_of_sums
from caftune.training._compat import as_sft_trainer_needs, keep_trainable_on_cpu
from caftune.training.checks import (
    RefuseLeaks,
    cut_length,
    find_truncated_rows,
    refuse_arguments,
    refuse_lost_adapters,
    refuse_missing_parts,
    refuse_processes,
    refuse_quantised,
    refuse_unfit,
    refuse_unfit_heads,
    refuse_unknown_tokens_of,
)
from caftune.training.config import CAFTConfig, as_caft_config
from caftune.training.divergence import LossWatch
from caftune.training.early_stopping import StopEarly
from caftune.training.epoch_order import EpochOrder
from caftune.training.loading import (
    Start,
    freeze_unembedding,
    holds_adapter,
    holds_tokenizer,
    load_base,
    load_or_build_heads,
    load_processing_class,
    text_tokenizer,
)
from caftune.training.trained_heads import (
    give_own_learning_rate,
    load_state,
    make_trainable,
    merged_state,
    save_adapter,
    training_record,
)

_DIVERGED = "The training diverged: train again with a lower learning_rate, or export an earlier checkpoint."

_TARGETS_DEPEND_ON = ("labels", "position_ids", "attention_mask")  # of a batch


class CAFTTrainer(SFTTrainer):
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
    model: Any
    heads: Any  # AuxiliaryHeads, None where the run has none
    backbone: Any  # Backbone, None without heads
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
        revision = dict(args.model_init_kwargs or {}).get("revision")  # type: ignore[arg-type]
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
            processing_class = processing_class or load_processing_class(get_config_model_id(model.config), args)
            refuse_unfit(model, peft_config, args)
            keep_trainable_on_cpu(model)
            self._given_tokenizer = copy.deepcopy(text_tokenizer(processing_class))  # SFTTrainer may add tokens to it
            self._start = load_or_build_heads(model, args, self._given_tokenizer)
        self.heads, self.backbone = self._start.heads, self._start.backbone
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
        name = get_config_model_id(self.model.config)
        # Absolute, because a run may change its folder before it exports.
        self._base = (str(Path(name).resolve()) if Path(name).is_dir() else name, revision)
        keep_trainable_on_cpu(self.model)
        if args.freeze_unembedding:
            freeze_unembedding(self.model)
        refuse_lost_adapters(self.accelerator, self.model)
        self.add_callback(RefuseLeaks(self, refuse=not is_stock))
        self.add_callback(ResetLogSums(self))
        if args.early_stopping_patience is not None:
            self.add_callback(StopEarly(args.early_stopping_patience))
        self.loss_watch = LossWatch()
        self._horizon_counts: Tensor | None = None  # targets of each horizon in the current optimizer step
        self._micro_batch = 0  # number within the optimizer step
        self._collated: list[tuple[Tensor, int]] = []  # tensors that the targets were computed from, and their versions
        self._batches = 1  # by which Trainer divides the losses of micro-batches
        self.reset_log_sums()
        if self.heads is not None:
            self._attach()

    def _attach(self) -> None:
        """Put the heads into the model, after PEFT has wrapped it (so that it leaves them alone)."""
        refuse_unfit_heads(self)
        refuse_unknown_tokens_of(self)
        if self.args.pretrain_heads:
            self.model.requires_grad_(False)
        self.heads.requires_grad_(False)
        if self.args.trains_heads:
            active = self.model.active_adapters if isinstance(self.model, PeftModel) else []
            adapters = {name: self.model.peft_config[name] for name in active}
            make_trainable(self.heads, lora_rank=self.args.heads_lora_rank, adapters=adapters)
        attach_heads(self.backbone, self.heads.to(self.args.device))

    def export(
        self, folder: str | os.PathLike[str], *, merged: bool = True, about: Mapping[str, Any] | None = None
    ) -> list[str]:
        """Write the trained model as an ordinary checkpoint (stage 1: the heads). With several processes, all must call it.

        Args:
            merged: write the base with its adapters merged; False: write the adapter alone, as PEFT does.
            about: stage 1: more to record in heads.json, next to the settings (the data, the command).

        Returns:
            The names of the base's own multi-token tensors, which were copied unchanged (see `export_model`).

        Raises:
            CaftuneError: weights that are not finite; nothing is written. (As in SFTTrainer, training itself does not stop for
                them; add the callback `StopOnDivergence` for that.)
        """
        native: list[str] = []
        trained = self.heads if self.args.pretrain_heads else self.model
        refuse_not_finite(dict(trained.named_parameters()), "The weights to export", _DIVERGED)
        if self.args.pretrain_heads:
            self._save_heads(Path(folder), about)
        else:
            is_split = self.is_fsdp_enabled or getattr(self.args.deepspeed_plugin, "zero_stage", 0) == 3
            state = self.accelerator.get_state_dict(self.model_wrapped) if is_split else None
            if self.is_world_process_zero():
                native = self._write(Path(folder), state, merged=merged or not hasattr(self.model, "peft_config"))
        self.accelerator.wait_for_everyone()
        return native

    def _write(self, folder: Path, state: dict[str, Any] | None, *, merged: bool) -> list[str]:
        """The model and its card; `state`: the whole weights, where they were gathered from all processes."""
        (name, revision), model = self._base, self.accelerator.unwrap_model(self.model)
        base: dict[str, Any] = {"base_name": name, "base_revision": revision}
        if merged and state is None and not getattr(model, "is_quantized", False):
            native = export_model(model, folder, self.processing_class, **base)
        else:  # the adapter alone; or the plain base with the trained weights
            folder.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=folder.parent, prefix=".export-") as saved:  # /tmp may be too small
                self._save(saved, state)
                rows = whole_shape(model.get_input_embeddings().weight)[0]
                trust = self.args.trust_remote_code
                options: dict[str, Any] = {"merged": merged, "vocab_size": rows, "trust_remote_code": trust}
                native = export_saved(saved, folder, self.processing_class, **base, **options)
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        write_model_card(folder, name, self.args, best or self.state.global_step, heads=self._start.description)
        return native

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """SFTTrainer's optimizer, with `heads_learning_rate` for the heads where it is given."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.trains_heads and self.args.heads_learning_rate is not None:
            give_own_learning_rate(optimizer, self.heads, self.args.heads_learning_rate)
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip the heads' gradients apart from the model's, so that they do not change the size of its steps."""
        if not self.args.trains_heads or self.args.pretrain_heads:
            return super()._clip_grad_norm(model)
        own = {id(parameter) for parameter in self.heads.parameters()}
        trunk = [parameter for parameter in model.parameters() if id(parameter) not in own]
        norm = self.accelerator.clip_grad_norm_(trunk, self.args.max_grad_norm)
        limit = self.args.heads_max_grad_norm or self.args.max_grad_norm
        nn.utils.clip_grad_norm_(self.heads.parameters(), limit)  # the call above has undone float16's loss scaling
        return norm

    def _run_epoch(self, **arguments: Any) -> None:  # type: ignore[override]
        """Without a step too many: transformers 5.23 trains one where a run resumes from its last step, inside an epoch.

        And an epoch where a callback stops the training as it begins.
        """
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(**arguments)
        else:
            self.control.should_training_stop = True

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """L_1 as SFTTrainer computes it, plus the auxiliary losses. In evaluation L_1 only; in stage 1 no L_1."""
        self._drop_targets_of_other_batch(inputs)
        if self.args.pretrain_heads:
            return self._loss_of_heads(model, inputs, return_outputs, num_items_in_batch)
        training = self.model.training
        is_plain = self.heads is None or (training and self._scored_horizons == 0)
        scoring = self._scoring(inputs, num_items_in_batch) if training and not is_plain else {}
        scores: dict[str, Any] = {}

        def forward(**arguments: Any) -> Any:
            # L_1 comes from the first pass: with a user's loss, or label smoothing, that is not the fused one.
            heads = {} if scores else {"auxiliary": "add", "auxiliary_labels": inputs["labels"], **scoring}
            outputs = model(**arguments, **heads)
            if heads:
                scores.update(outputs["auxiliary"])
            if arguments.get("fused_lm_head"):
                scores["main"] = (-outputs.log_probs.detach().sum(), outputs.label_mask.sum(), outputs.is_top1.sum())
            return outputs

        result = super().compute_loss(model if is_plain else forward, inputs, return_outputs, num_items_in_batch)
        main = result[0] if return_outputs else result
        if training:
            self._add_main(main.detach() / self._batches)
        if not is_plain:
            self._record(scores)
        if is_plain or not training:
            return result
        loss = main + scores["loss"]
        return (loss, result[1]) if return_outputs else loss

    def _loss_of_heads(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: Any
    ) -> Any:
        """Stage 1: the auxiliary losses only."""
        soft = {"auxiliary": "soft", "soft_top_k": self.args.soft_top_k}
        mode = soft if self.args.soft_targets and self.model.training else {"auxiliary": "only"}
        scoring = self._scoring(inputs, num_items_in_batch)
        auxiliary = model(**inputs, use_cache=False, **mode, **scoring)["auxiliary"]
        self._record(auxiliary)
        return (auxiliary["loss"], auxiliary) if return_outputs else auxiliary["loss"]

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As SFTTrainer; in stage 1 the loss only, because the model's logits are not computed."""
        return super().prediction_step(model, inputs, prediction_loss_only or self.args.pretrain_heads, ignore_keys)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As SFTTrainer; also records whether the loss is finite, for `StopOnDivergence`."""
        loss = super().training_step(*args, **kwargs)
        self.loss_watch.add(loss, self.state.global_step + 1)
        return loss

    def reset_log_sums(self) -> None:
        """Set the sums since the last log to zero."""
        self._horizon_sums: dict[str, dict[str, Tensor]] = {}
        self._main_sum = torch.zeros((), device=self.args.device)  # of L_1
        self._steps = 0

    def _add_main(self, loss: Tensor) -> None:
        """Add a batch's part to the sum since the last log, as Trainer does with the whole loss."""
        if self.args.logging_nan_inf_filter:
            loss = torch.where(loss.isfinite(), loss, self._main_sum / max(self._steps, 1))
        self._main_sum = self._main_sum + loss

    def _get_train_sampler(self, *args: Any) -> Any:
        """As SFTTrainer; a resumed run finds the order of its epoch again."""
        sampler = super()._get_train_sampler(*args)
        return EpochOrder(sampler, self) if isinstance(sampler, LengthGroupedSampler) else sampler

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As SFTTrainer; the collator also computes the horizons' targets, while the batch is on the CPU."""
        rows = self.train_dataset
        # A dispatcher cuts each batch for the processes, so there they are computed in `get_batch_samples`.
        is_dispatched = isinstance(rows, IterableDataset | TorchIterableDataset) or self.accelerator.dispatch_batches
        if self.heads is None or is_dispatched:
            return super().get_train_dataloader()
        collate = self.data_collator
        self.data_collator = partial(_collate_with_targets, collate, self.heads.config.horizons)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one optimizer step; the targets of every horizon are counted over all of them."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_batch = 0
        self._steps += bool(batches)
        self._batches = len(batches) if num_items is None else 1
        if self.heads is not None and batches:
            counts = torch.stack([self._counts(batch) for batch in batches]).sum(0)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                counts = self.accelerator.reduce(counts.to(device), reduction="sum")
            self._horizon_counts = counts
            tensors = [batch.get(name) for batch in batches for name in _TARGETS_DEPEND_ON]
            self._collated = [(found, found._version) for found in tensors if isinstance(found, Tensor)]
        return batches, num_items

    def _drop_targets_of_other_batch(self, inputs: dict[str, Any]) -> None:
        """Remove targets that are not those of `inputs`, which a subclass may have changed: the forward computes them again."""
        given = [inputs[name] for name in _TARGETS_DEPEND_ON if isinstance(inputs.get(name), Tensor)]
        is_collated = [any(found is one and found._version == age for one, age in self._collated) for found in given]
        if self.model.training and not all(is_collated):
            inputs.pop("auxiliary_targets", None)

    def _counts(self, batch: dict[str, Any]) -> Tensor:
        """The number of targets of each horizon in a batch, which is given its targets where it has none yet."""
        horizons = self.heads.config.horizons
        return with_targets(batch, horizons)["auxiliary_targets"].counts_of(horizons)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log also each horizon's loss in nats and accuracy; in training its weight, and `main_loss`, which is L_1."""
        mode = "train" if {"loss", "train_runtime"} & set(logs) else "eval"
        sums = self._horizon_sums.pop(mode, None)
        main, steps = self._main_sum, self._steps
        if mode == "train":
            self._main_sum = torch.zeros_like(main)
            self._steps = 0
        if sums is not None and "train_runtime" not in logs:  # the summary of a run belongs to no step
            # "eval_", or "eval_<name>_" where there are several evaluation sets
            named = (key.removesuffix("loss") for key in logs if key.endswith("_loss"))
            prefix = next(named, "") if mode == "eval" else ""
            metrics = self._horizon_metrics(sums)
            logs.update({f"{prefix}{name}": value for name, value in metrics.items()})
            if mode == "train":
                weights = self._weights_at(max(self.state.global_step - 1, 0))
                logs.update({f"h{h}_weight": w for h, w in zip(self.heads.config.horizons, weights, strict=True)})
                if not self.args.pretrain_heads:
                    logs["main_loss"] = self.accelerator.reduce(main, reduction="mean").item() / steps
            elif self.args.pretrain_heads:  # over all tokens, not the mean of the batches' means
                terms = zip(self.heads.config.horizons, self._weights_without_gamma(), strict=True)
                logs[f"{prefix}loss"] = sum(weight * metrics[f"h{h}_loss"] for h, weight in terms)
        super().log(logs, start_time)

    def _horizon_metrics(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Losses and accuracies of the horizons, from sums over all ranks; horizon 1 comes first if it was computed."""
        table = {name: self.accelerator.reduce(row, reduction="sum").tolist() for name, row in sorted(sums.items())}
        horizons = [1, *self.heads.config.horizons][-len(table["count"]) :]
        metrics = {}
        for i, horizon in enumerate(horizons):
            if table["count"][i] == 0 and self.args.aux_min_weight > 0:
                continue  # no head was scored
            count = max(table["count"][i], 1)
            metrics[f"h{horizon}_loss"] = table["nll"][i] / count
            metrics[f"h{horizon}_accuracy"] = table["correct"][i] / count
        return metrics

    def _weights_without_gamma(self) -> list[float]:
        return replace(self.args.auxiliary_weights, schedule="constant").at(0, 1, self.heads.config.horizons)

    def _weights_at(self, step: int) -> list[float]:
        return self.args.auxiliary_weights.at(step, max(self.state.max_steps, 1), self.heads.config.horizons)

    @property
    def _scored_horizons(self) -> int:
        """Number of auxiliary horizons scored in this step (0 if beta is 0; otherwise those with weight >= aux_min_weight)."""
        weights = [] if self.args.aux_weight == 0 else self._weights_at(self.state.global_step)
        return sum(weight >= self.args.aux_min_weight for weight in weights)

    def _scoring(self, inputs: dict[str, Any], num_items_in_batch: Any) -> dict[str, Any]:
        """Arguments of the model's forward for the auxiliary losses: the weight of every sum, and a sample."""
        is_training = self.model.training
        counts = self._horizon_counts if is_training else None
        if counts is None:
            counts = self._counts(inputs)
        device = self.args.device
        if not is_training:  # stage 1: the objective without gamma, so that evaluations can be compared
            weights = weights_of_sums(self._weights_without_gamma(), counts)
            return {"auxiliary_weights": weights.to(device, non_blocking=True)}
        scored = self._scored_horizons
        factor = 1
        weights = weights_of_sums(self._weights_at(self.state.global_step)[:scored], counts[:scored])
        weights = weights.to(device, non_blocking=True)
        if self._horizon_counts is not None:
            if num_items_in_batch is None:  # Trainer divides what compute_loss returns by the number of micro-batches
                factor = self.current_gradient_accumulation_steps
            if self.args.average_tokens_across_devices:
                # DDP averages gradients over ranks, while the counts are sums over ranks: as SFTTrainer does for L_1.
                factor *= self.accelerator.num_processes
        seed = (self.args.seed, self.state.global_step, self._micro_batch, self.args.process_index)
        self._micro_batch += 1
        sample = Sample(self.args.aux_target_share, seed) if self.args.aux_target_share < 1 else None
        return {"auxiliary_weights": weights * factor, "auxiliary_sample": sample}

    def _record(self, scores: dict[str, Any]) -> None:
        """Add a batch's sums to those since the last log; horizon 1 comes first if it was computed."""
        kept = self._horizon_sums.setdefault("train" if self.model.training else "eval", {})
        for name, first in zip(("nll", "count", "correct"), scores.get("main", (None,) * 3), strict=True):
            value = scores[name]
            exact = torch.float32 if value.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
            row = value.new_zeros(self.heads.config.count, dtype=exact)
            row[: len(value)] = value.detach()
            row = row if first is None else torch.cat([first.to(exact)[None], row])
            kept[name] = kept[name] + row if name in kept else row

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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As SFTTrainer; trained heads are saved next to the model (stage 1: in its place)."""
        folder = Path(str(output_dir or self.args.output_dir))
        if not self.args.pretrain_heads:
            super().save_model(str(folder), _internal_call)
        if self.args.trains_heads:
            self._save_heads(folder if self.args.pretrain_heads else folder / "heads")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # PEFT's bias="all" takes every bias, also the heads'.
        if state_dict is None and self.heads is not None and hasattr(self.model, "peft_config"):
            state_dict = self.model.state_dict()
        if state_dict is not None:
            state_dict = {key: value for key, value in state_dict.items() if f"{ATTRIBUTE}." not in key}
        super()._save(output_dir, state_dict)

    def _save_heads(self, folder: Path, about: Mapping[str, Any] | None = None) -> None:
        training = {**training_record(self.args, self.state.global_step), **(about or {})}
        about = {"training": training, "fingerprint": self._start.fingerprint, "revision": self._base[1]}
        state, write = merged_state(self.heads), self.args.should_save
        save_heads(folder, self.heads, self.backbone, self._given_tokenizer, state=state, write=write, **about)
        save_adapter(folder, self.heads, write=write)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.args.pretrain_heads:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_trained_heads(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or not self.args.pretrain_heads:
            super()._load_best_model()
        if not self.is_deepspeed_enabled:  # its checkpoints hold the heads, too
            self._load_trained_heads(Path(str(self.state.best_model_checkpoint)))

    def _load_trained_heads(self, checkpoint: Path) -> None:
        if self.args.trains_heads:
            folder = checkpoint if self.args.pretrain_heads else checkpoint / "heads"
            load_state(self.heads, folder, read_heads(folder))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        missing = [key for key in load_result.missing_keys if not key.startswith(f"{ATTRIBUTE}.")]
        left = SimpleNamespace(missing_keys=missing, unexpected_keys=load_result.unexpected_keys)
        super()._issue_warnings_after_load(left)


class ResetLogSums(TrainerCallback):
    """Resets the trainer's log sums when a training begins, and after a prediction, which logs nothing."""

    def __init__(self, trainer: CAFTTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """Reset them."""
        self._trainer.reset_log_sums()

    on_predict = on_train_begin


def with_targets(batch: dict[str, Any], horizons: Sequence[int]) -> dict[str, Any]:
    """The batch with `auxiliary_targets`, an argument of the model's forward; computed from its labels if missing."""
    if "auxiliary_targets" not in batch and "labels" in batch:
        batch["auxiliary_targets"] = HorizonTargets.of(batch, [1, *horizons])  # 1: for soft targets
    return batch


def _collate_with_targets(collate: Callable[..., Any], horizons: Sequence[int], examples: Any) -> Any:
    return with_targets(collate(examples), horizons)
