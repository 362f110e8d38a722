"""Which options may change when a run resumes: those that affect neither past steps nor the order of examples."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caftune.errors import CaftuneError

# Options of cadence, output and speed: training steps do not depend on them, except by rounding.
_HARMLESS_NAMES = """
    logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica
    disable_tqdm report_to run_name project include_num_input_tokens_seen skip_memory_metrics
    save_strategy save_steps save_total_limit save_only_model save_on_each_node
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size
    eval_accumulation_steps eval_do_concat_batches eval_use_gather_object batch_eval_metrics
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataset_num_proc gradient_checkpointing gradient_checkpointing_kwargs activation_offloading
    torch_empty_cache_steps ddp_timeout
"""
_HARMLESS = frozenset(_HARMLESS_NAMES.split())
# Their cadence affects the result where evaluations set the learning rate or choose the exported checkpoint.
_WHEN_EVALUATED = frozenset(
    ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy", "save_steps")
)
_LENGTH = frozenset(("num_train_epochs", "max_steps"))
_BATCH = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}  # and their defaults
_SECTIONS = {"pretrain": ("pretrain",), "adapt": ("adapt",), "train": ("trainer", "adapt")}  # each stage's own first
_NONE = object()


@dataclass(frozen=True)
class Changes:
    """The options that differ from those of the earlier run, each as `key: before -> now`."""

    harmless: list[str] = field(default_factory=list)  # options that do not change the weights, except by rounding
    length: list[str] = field(default_factory=list)  # options that set when training ends

    def __iter__(self) -> Iterator[str]:
        yield from self.harmless
        yield from self.length


def remove_allowed_changes(kept: dict[str, Any], wanted: dict[str, Any], stage: str) -> Changes:
    """Remove the options that may change from two identities of a stage, and return those that differ."""
    changes = Changes()
    for number, section in enumerate(_SECTIONS.get(stage, ())):
        before, now = dict(kept.get(section) or {}), dict(wanted.get(section) or {})
        if kept.get(section) is None or wanted.get(section) is None:
            continue
        harmless = _HARMLESS | frozenset(_BATCH) if _is_same_batch(before, now) else _HARMLESS
        harmless -= _WHEN_EVALUATED if _is_decided_by_evaluations(before) else frozenset()
        changes.harmless.extend(_remove_options(before, now, harmless, section))
        if number == 0:
            changes.length.extend(_remove_options(before, now, _LENGTH, section))
        kept[section], wanted[section] = before, now
    for section in ("heads", "model.lora"):  # options of the export alone
        before, now = ((_section(identity, section)) for identity in (kept, wanted))
        changes.harmless.extend(_remove_options(before, now, {"keep", "merge"}, section))
    return changes


def refuse_checkpoint(checkpoint: Path, options: Mapping[str, Any]) -> None:
    """Raise CaftuneError where a checkpoint cannot be trained to another length; nothing of its run is changed."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    step, epoch = state["global_step"], state.get("epoch")
    end: float = options.get("max_steps", -1)
    if end <= 0 and epoch:
        end = math.ceil(options.get("num_train_epochs", 3.0) * step / epoch - 1e-6)  # 3: transformers' default
    if 0 < end < step:
        raise too_short_error(checkpoint, step, int(end))
    if not 0 < end <= step:
        refuse_missing_optimizer_state(checkpoint)


def too_short_error(checkpoint: Path, step: int, end: int) -> CaftuneError:
    """The error for a training that would end before its checkpoint's step."""
    return CaftuneError(
        f"The training must not end before step {step}, which {checkpoint} has reached, got step {end} (num_train_epochs, "
        f"max_steps). Raise it, see `caftune export --checkpoint` for earlier checkpoints, or remove {checkpoint.parent} to "
        "train from the start."
    )


def refuse_missing_optimizer_state(checkpoint: Path) -> None:
    """Raise CaftuneError where a checkpoint has no optimizer state."""
    kept = ("optimizer*", "global_step*")  # the second is DeepSpeed's
    if not any(any(checkpoint.glob(name)) for name in kept):
        raise CaftuneError(
            f"{checkpoint} must hold an optimizer's state to resume from, got the model alone (save_only_model). Remove "
            f"{checkpoint.parent} to train from the start, or see `caftune export --checkpoint`."
        )


def _section(identity: dict[str, Any], place: str) -> dict[str, Any]:
    """A section of an identity, copied so that its keys can be removed; an empty one where there is none."""
    for key in place.split("."):
        if key not in identity:
            return {}
        identity[key] = dict(identity[key])
        identity = identity[key]
    return identity


def _remove_options(before: dict[str, Any], now: dict[str, Any], names: Any, section: str) -> list[str]:
    """Remove options from both, and return those that differ."""
    found = []
    for name in sorted(names):
        one, other = before.pop(name, _NONE), now.pop(name, _NONE)
        if one != other:
            found.append(f"{section}.{name}: {_shown(one)} -> {_shown(other)}")
    return found


def _shown(value: Any) -> str:
    return "default" if value is _NONE else repr(value)


def _is_decided_by_evaluations(options: Mapping[str, Any]) -> bool:
    kind = options.get("lr_scheduler_type")
    return bool(options.get("load_best_model_at_end")) or kind in ("reduce_lr_on_plateau", "greedy")


def _is_same_batch(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether every step has the same rows: the same number per step, and none dropped."""
    if any(options.get(name) for options in (before, now) for name in ("auto_find_batch_size", "dataloader_drop_last")):
        return False  # the checkpoint's size is used again, or an epoch drops other rows at its end
    sizes = [[options.get(name, default) for name, default in _BATCH.items()] for options in (before, now)]
    if not all(isinstance(size, int) for pair in sizes for size in pair):
        return False
    return sizes[0][0] * sizes[0][1] == sizes[1][0] * sizes[1][1]
