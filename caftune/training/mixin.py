"""`CAFTMixin`: auxiliary heads in any `transformers.Trainer`, whose own loss stays L_1.

Stage 1 (`pretrain_heads=True`) trains the heads only: the trunk is frozen and runs without a graph, beta = 1, gamma is
constant, and there is no main loss. Stage 2 trains the model, and the heads with it unless `train_heads` is False, on the main
loss plus the auxiliary losses. With `aux_weight=0` stage 2 is the trainer without heads, step for step.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from datasets import IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from caftune.checkpoints.cards import write_model_card
from caftune.checkpoints.export import export_model, export_saved
from caftune.checkpoints.heads_folder import read_heads, save_heads
from caftune.core.attach import ATTRIBUTE, attach_heads, without_auxiliary
from caftune.core.backbone import whole_shape
from caftune.core.finite import refuse_not_finite
from caftune.core.objective import HorizonTargets, Sample, weights_of_sums
from caftune.errors import CaftuneError
from caftune.training._compat import is_divided_by_trainer, keep_trainable_on_cpu
from caftune.training.checks import (
    half_precision_problem,
    refuse_arguments,
    refuse_lost_adapters,
    refuse_options,
    refuse_processes,
    refuse_unfit,
    refuse_unfit_heads,
    refuse_unknown_tokens_of,
)
from caftune.training.divergence import LossWatch
from caftune.training.early_stopping import StopEarly
from caftune.training.epoch_order import EpochOrder
from caftune.training.loading import Start, freeze_unembedding, load_or_build_heads, name_of, text_tokenizer
from caftune.training.trained_heads import (
    give_own_learning_rate,
    load_state,
    make_trainable,
    merged_state,
    refuse_optimizer_without,
    refuse_other_heads,
    save_adapter,
    training_record,
)

_logger = logging.getLogger(__name__)
_DIVERGED = "The training diverged: train again with a lower learning_rate, or export an earlier checkpoint."
_TARGETS_DEPEND_ON = ("labels", "position_ids", "attention_mask", "seq_idx", "cu_seq_lens_q")  # of a batch
_Trainer: type = Trainer if TYPE_CHECKING else object


class CAFTMixin(_Trainer):
    """Auxiliary heads for a Trainer. Its `args` are of a class that inherits CAFTOptions, which says when there are heads.

        class OwnTrainer(CAFTMixin, Trainer): ...

        @dataclass
        class OwnArguments(CAFTOptions, TrainingArguments): ...

    Batches need `labels` as transformers' models take them: one for each token, -100 where none is trained on. Packed documents
    need marks: `position_ids`, `seq_idx`, `cu_seq_lens_q` or an attention mask. L_1 is what `compute_loss` of the classes after
    the mixin returns, whose first forward pass also runs the heads. A class before the mixin may change the batch and the
    result, and calls `super().compute_loss`. Checkpoints and `save_model` are ordinary ones without heads (stage 1: the heads
    only); `export` writes the finished model with the base's keys.

    Raises:
        CaftuneError: heads of another model, options that do not work with heads; in the first step, batches without labels
            or without a target, and losses that heads have no part in.
    """

    args: Any  # CAFTOptions and TrainingArguments
    model: Any
    heads: Any = None  # AuxiliaryHeads, None where the run has none
    backbone: Any = None  # Backbone, None without heads
    data_collator: Any
    _start: Any = None  # Start; a class that knows the model before it is changed sets it before __init__
    _revision: str | None = None  # of the base on the hub

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(CAFTMixin):
            raise TypeError(f"CAFTMixin must come before Trainer among the bases of {cls.__name__}. Put it first.")

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        refuse_options(self.args)
        keep_trainable_on_cpu(self.model)
        if self._start is None:
            self._start = self._load_heads()
        self.heads, self.backbone = self._start.heads, self._start.backbone
        name = name_of(self.model)
        # Absolute, because a run may change its folder before it exports.
        self._base = (str(Path(name).resolve()) if Path(name).is_dir() else name, self._revision)
        if self.args.freeze_unembedding:
            freeze_unembedding(self.model)
        refuse_lost_adapters(self.accelerator, self.model)
        self.add_callback(_WatchHeads(self))
        if self.args.early_stopping_patience is not None:
            self.add_callback(StopEarly(self.args.early_stopping_patience))
        self.loss_watch = LossWatch()
        self._horizon_counts: Tensor | None = None  # targets of each horizon in the current optimizer step
        self._micro_batch = 0  # number within the optimizer step
        self._collated: list[tuple[Tensor, int]] = []  # tensors that the targets were computed from, and their versions
        self._batches = 1  # by which Trainer divides the losses of micro-batches
        self._had_targets = False  # whether a step of this trainer had any
        self._scored_batches = 0  # of the current optimizer step
        self.reset_log_sums()
        if self.heads is not None:
            self._attach()

    def _load_heads(self) -> Start:
        """The heads of the run, checked against the model and the trainer's arguments."""
        refuse_processes(self.args)
        if not self.args.has_heads:
            return Start()
        refuse_arguments(
            self.args, None, self.compute_loss_func, self.compute_metrics, (self.optimizer, None), self.model_init
        )
        refuse_unfit(self.model, None, self.args)
        problem = half_precision_problem(self.model, None, self.args)
        if problem is not None:
            _logger.warning(problem)
        return self._find_heads()

    def _find_heads(self) -> Start:
        """The heads of the trainer's model. A class whose model was changed before returns those of the model as it was."""
        tokenizer = None if self.processing_class is None else text_tokenizer(self.processing_class)
        return load_or_build_heads(self.model, self.args, tokenizer)

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
            CaftuneError: weights that are not finite; nothing is written. (As in Trainer, training itself does not stop for
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
                trust = getattr(self.args, "trust_remote_code", False)
                options: dict[str, Any] = {"merged": merged, "vocab_size": rows, "trust_remote_code": trust}
                native = export_saved(saved, folder, self.processing_class, **base, **options)
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        write_model_card(folder, name, self.args, best or self.state.global_step, heads=self._start.description)
        return native

    def create_optimizer(self, *given: Any, **named: Any) -> torch.optim.Optimizer:
        """The trainer's optimizer, with `heads_learning_rate` for the heads where it is given."""
        is_new = self.optimizer is None
        super().create_optimizer(*given, **named)
        if is_new and self.args.trains_heads:
            refuse_optimizer_without(self.heads, self.optimizer, self.model)
            if self.args.heads_learning_rate is not None:
                give_own_learning_rate(self.optimizer, self.heads, self.args.heads_learning_rate)
        return self.optimizer

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
        """L_1 as the trainer computes it, plus the auxiliary losses. In evaluation L_1 only; in stage 1 no L_1."""
        targets = None if self.heads is None else self._take_targets(inputs)
        given: dict[str, Any] = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        if self.args.pretrain_heads:
            return self._loss_of_heads(model, inputs, targets, **given)
        training = self.model.training
        is_plain = self.heads is None or (self._scored_horizons == 0 if training else "labels" not in inputs)
        if is_plain:
            result = super().compute_loss(model, inputs, **given)
        else:
            scoring = self._scoring(inputs, targets, num_items_in_batch) if training else {"auxiliary_targets": targets}
            heads = {"auxiliary": "add", "auxiliary_labels": self._labels(inputs), **scoring}
            with heads_in_first_pass(model, heads) as scores:
                result = super().compute_loss(model, inputs, **given)
            if "nll" not in scores:
                raise CaftuneError(
                    f"The loss of {type(self).__name__} must be computed with the model that compute_loss is given, called "
                    "as model(...), or heads have no part in it. Call that model, not self.model or its parts."
                )
            self._record(scores)
        if not training:
            return result
        main = result[0] if return_outputs else result
        self._add_main(main.detach() / self._batches)
        loss = main if is_plain else main + scores["loss"]
        return (loss, result[1]) if return_outputs else loss

    def _loss_of_heads(
        self, model: nn.Module, inputs: dict[str, Any], targets: Any, return_outputs: bool, num_items_in_batch: Any
    ) -> Any:
        """Stage 1: the auxiliary losses only."""
        soft = {"auxiliary": "soft", "soft_top_k": self.args.soft_top_k}
        mode = soft if self.args.soft_targets and self.model.training else {"auxiliary": "only"}
        scoring = self._scoring(inputs, targets, num_items_in_batch)
        auxiliary = model(**inputs, **mode, **scoring)["auxiliary"]
        self._record(auxiliary)
        return (auxiliary["loss"], auxiliary) if return_outputs else auxiliary["loss"]

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As the trainer's; in stage 1 the loss only, because the model's logits are not computed."""
        return super().prediction_step(model, inputs, prediction_loss_only or self.args.pretrain_heads, ignore_keys)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the trainer's; also records whether the loss is finite, for `StopOnDivergence`."""
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
        """As the trainer's; a resumed run finds the order of its epoch again."""
        sampler = super()._get_train_sampler(*args)
        return EpochOrder(sampler, self) if isinstance(sampler, LengthGroupedSampler) else sampler

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As the trainer's; the collator also computes the horizons' targets, while the batch is on the CPU."""
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
        self._micro_batch = self._scored_batches = 0
        self._steps += bool(batches)
        self._batches = len(batches) if is_divided_by_trainer(self, num_items) else 1
        if self.heads is not None and batches:
            for batch in batches:
                batch["auxiliary_targets"] = batch.get("auxiliary_targets") or self._targets(batch)
            horizons = self.heads.config.horizons
            counts = torch.stack([batch["auxiliary_targets"].counts_of(horizons) for batch in batches]).sum(0)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                counts = self.accelerator.reduce(counts.to(device), reduction="sum")
            self._refuse_no_labels(batches)
            self._horizon_counts = counts
            tensors = [batch.get(name) for batch in batches for name in _TARGETS_DEPEND_ON]
            self._collated = [(found, found._version) for found in tensors if isinstance(found, Tensor)]
        return batches, num_items

    def _refuse_no_labels(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Refuse a first step in which no process trains on a token. Documents may be too short for a later one."""
        if self._had_targets or not self._needs_heads:
            return
        count = torch.stack([batch["auxiliary_targets"].counts_of([1]) for batch in batches]).sum()
        if self.args.world_size > 1:
            count = self.accelerator.reduce(count.to(self.args.device), reduction="sum")
        self._had_targets = bool(count)
        if not self._had_targets:
            raise CaftuneError(
                "The first step must have tokens to train on, got none: labels are -100 wherever a token has an earlier one "
                "of its document to be predicted from. Check the data collator and the labels of the first rows."
            )

    @property
    def _needs_heads(self) -> bool:
        """Whether the heads run in this training step."""
        return self.heads is not None and (self.args.pretrain_heads or self._scored_horizons > 0)

    def _take_targets(self, inputs: dict[str, Any]) -> HorizonTargets | None:
        """Remove the targets from `inputs` and return them; None if a subclass has changed what they depend on."""
        targets = inputs.pop("auxiliary_targets", None)
        given = [inputs[name] for name in _TARGETS_DEPEND_ON if isinstance(inputs.get(name), Tensor)]
        is_collated = [any(found is one and found._version == age for one, age in self._collated) for found in given]
        return targets if all(is_collated) or not self.model.training else None

    def _targets(self, batch: Mapping[str, Any]) -> HorizonTargets:
        """The targets of a batch, from its labels."""
        self._labels(batch)
        return HorizonTargets.of(batch, [1, *self.heads.config.horizons])  # 1: for soft targets

    @staticmethod
    def _labels(batch: Mapping[str, Any]) -> Tensor:
        """The labels of a batch, which must have some."""
        if "labels" not in batch:
            raise CaftuneError(
                f"Batches must hold labels for the heads, got {', '.join(batch)}. Give rows labels (-100 where a token is not "
                "trained on), or a data collator that does, such as DataCollatorForLanguageModeling(tokenizer, mlm=False)."
            )
        return batch["labels"]

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

    def _scoring(
        self, inputs: dict[str, Any], targets: HorizonTargets | None, num_items_in_batch: Any
    ) -> dict[str, Any]:
        """Arguments of the model's forward for the auxiliary losses: the targets, the weight of every sum, and a sample."""
        is_training = self.model.training
        counts = self._horizon_counts if is_training else None
        if counts is None:
            targets = targets or self._targets(inputs)
            counts = targets.counts_of(self.heads.config.horizons)
        device = self.args.device
        if not is_training:  # stage 1: the objective without gamma, so that evaluations can be compared
            weights = weights_of_sums(self._weights_without_gamma(), counts)
            return {"auxiliary_targets": targets, "auxiliary_weights": weights.to(device, non_blocking=True)}
        scored = self._scored_horizons
        factor = 1
        weights = weights_of_sums(self._weights_at(self.state.global_step)[:scored], counts[:scored])
        weights = weights.to(device, non_blocking=True)
        if self._horizon_counts is not None:
            if is_divided_by_trainer(self, num_items_in_batch):
                factor = self.current_gradient_accumulation_steps
            if self.args.average_tokens_across_devices:
                # DDP averages gradients over ranks, while the counts are sums over ranks: as Trainer does for L_1.
                factor *= self.accelerator.num_processes
        seed = (self.args.seed, self.state.global_step, self._micro_batch, self.args.process_index)
        self._micro_batch += 1
        sample = Sample(self.args.aux_target_share, seed) if self.args.aux_target_share < 1 else None
        return {"auxiliary_targets": targets, "auxiliary_weights": weights * factor, "auxiliary_sample": sample}

    def _record(self, scores: dict[str, Any]) -> None:
        """Add a batch's sums to those since the last log; horizon 1 comes first if it was computed."""
        self._scored_batches += 1
        kept = self._horizon_sums.setdefault("train" if self.model.training else "eval", {})
        for name, first in zip(("nll", "count", "correct"), scores.get("main", (None,) * 3), strict=True):
            value = scores[name]
            exact = torch.float32 if value.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
            row = value.new_zeros(self.heads.config.count, dtype=exact)
            row[: len(value)] = value.detach()
            row = row if first is None else torch.cat([first.to(exact)[None], row])
            kept[name] = kept[name] + row if name in kept else row

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the trainer's; trained heads are saved next to the model (stage 1: in its place)."""
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
        save_heads(folder, self.heads, self.backbone, self._start.tokenizer, state=state, write=write, **about)
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
        folder = checkpoint if self.args.pretrain_heads else checkpoint / "heads"
        if self.heads is not None:
            refuse_other_heads(self.heads, folder, are_trained=self.args.trains_heads)
        if self.args.trains_heads:
            load_state(self.heads, folder, read_heads(folder))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        missing = [key for key in load_result.missing_keys if not key.startswith(f"{ATTRIBUTE}.")]
        left = SimpleNamespace(missing_keys=missing, unexpected_keys=load_result.unexpected_keys)
        super()._issue_warnings_after_load(left)


class _WatchHeads(TrainerCallback):
    """Resets the trainer's log sums when a training begins, and after a prediction, which logs nothing.

    Before an optimizer step it refuses a loss that heads should have been part of and were not.
    """

    def __init__(self, trainer: CAFTMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """Reset them."""
        self._trainer.reset_log_sums()

    on_predict = on_train_begin

    def on_pre_optimizer_step(self, *_args: Any, **_kwargs: Any) -> None:
        """Refuse a step without the heads."""
        if self._trainer._needs_heads and not self._trainer._scored_batches:
            name = type(self._trainer).__name__
            raise CaftuneError(
                f"compute_loss of {name} must call super().compute_loss, got a loss without heads. Call it, or write the loss "
                f"in a class after the mixin: class OwnLoss(Trainer), class {name}(CAFTMixin, OwnLoss)."
            )


@contextmanager
def heads_in_first_pass(model: nn.Module, arguments: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Within the block, the first forward pass of a model with heads gets these arguments and runs them.

    By hooks, so that any loss may use the model itself and sees the model's own outputs. In training the first pass with a
    graph counts: those without are a teacher's or for metrics.

    Yields:
        What the heads returned, empty before the pass; and under `main`, where TRL's fused head ran, the same for horizon 1.
    """
    scores: dict[str, Any] = {}
    has_graph = torch.is_grad_enabled()

    def before(_model: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        if "nll" not in scores and torch.is_grad_enabled() == has_graph:
            return args, {**given, **arguments}
        return None

    def after(_model: nn.Module, _args: tuple[Any, ...], given: dict[str, Any], outputs: Any) -> Any:
        if "auxiliary" in given:
            outputs, found = without_auxiliary(outputs)
            scores.update(found)
        if given.get("fused_lm_head"):  # with a user's loss, or label smoothing, in a later pass
            scores["main"] = (-outputs.log_probs.detach().sum(), outputs.label_mask.sum(), outputs.is_top1.sum())
        return outputs

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield scores
    finally:
        for handle in handles:
            handle.remove()


def with_targets(batch: dict[str, Any], horizons: Sequence[int]) -> dict[str, Any]:
    """The batch with `auxiliary_targets`, an argument of the model's forward; computed from its labels if missing."""
    if "auxiliary_targets" not in batch and "labels" in batch:
        batch["auxiliary_targets"] = HorizonTargets.of(batch, [1, *horizons])  # 1: for soft targets
    return batch


def _collate_with_targets(collate: Callable[..., Any], horizons: Sequence[int], examples: Any) -> Any:
    return with_targets(collate(examples), horizons)
