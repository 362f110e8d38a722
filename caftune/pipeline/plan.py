"""`caftune plan`: what a run costs and whether it fits, from its configuration, tokenizer and data. No weight is loaded."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import comb
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table

from caftune.checkpoints.heads_folder import describe_heads
from caftune.core.backbone import UnsupportedModelError
from caftune.core.objective import IGNORED
from caftune.core.probes import is_machine_error
from caftune.errors import CaftuneError
from caftune.pipeline.base_model import BaseModel
from caftune.pipeline.schema import Recipe
from caftune.pipeline.stage_config import lora_config, stage_one_config, stage_two_config
from caftune.pipeline.stage_rows import head_rows, task_rows
from caftune.training.config import CAFTConfig
from caftune.training.estimate import Estimate, estimate
from caftune.training.measured_cost import memory_bytes
from caftune.training.run_setup import Setup

# Examples that are read to measure their length and labelled share.
_EXAMPLES_READ = 1000
_ASSUMED_LABELLED, _ASSUMED_LENGTH = 0.5, 1024
_SHORTEST = 128  # tokens; no remedy cuts examples below it


@dataclass(frozen=True)
class Rows:
    """The tokenized examples that a run trains on. `assumed`: why they are assumed and not read."""

    read: int
    mean_length: float
    longest: int
    labelled: float
    padded_length: float  # mean over batches of the longest example
    assumed: str | None = None


@dataclass(frozen=True)
class Remedy:
    """A change that makes a run smaller, and the peak with it and all remedies before it."""

    change: str
    peak: int


@dataclass(frozen=True)
class Plan:
    """What a run costs: bytes, operations per token, parameters."""

    model: str
    setup: Setup
    rows: Rows
    estimate: Estimate
    device: str
    available: int  # bytes
    # Bytes that a process on a CPU holds before its model is loaded, this one too: libraries, tokenizer, rows.
    libraries: int
    remedies: list[Remedy] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether the device has enough free memory for the peak."""
        return self.estimate.memory.peak <= self.available

    @property
    def needed(self) -> int:
        """The peak with libraries, tokenizer and rows: what the system shows of the process."""
        return self.estimate.memory.peak + self.libraries

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        found = asdict(self)
        found["setup"]["dtype"] = str(self.setup.dtype).removeprefix("torch.")
        found["estimate"]["flops"]["total"] = self.estimate.flops.total
        return {**found, "needed": self.needed, "fits": self.fits}


@dataclass(frozen=True)
class _Planned:
    """The model that is planned, and the LoraConfig that the recipe gives it."""

    name: str
    config: Any
    lora: Callable[[], Any]

    @classmethod
    def of(cls, recipe: Recipe, base: BaseModel, args: CAFTConfig) -> "_Planned":
        """The base, with eager attention where the run has it: only that keeps more than the other kinds."""
        config = copy.deepcopy(base.config)
        if dict(args.model_init_kwargs or {}).get("attn_implementation") == "eager":  # type: ignore[arg-type]
            config._attn_implementation = "eager"
        adapted = recipe.model.model_copy(update={"tuning": "lora"})  # remedies may add an adapter
        return cls(base.name, config, partial(lora_config, adapted))

    def estimate(self, setup: Setup) -> Estimate:
        """What `setup` costs with this base."""
        has_adapter = setup.stage == "train" and setup.tuning != "full"
        try:
            return estimate(self.config, setup, self.lora() if has_adapter else None)
        except UnsupportedModelError:
            raise
        except Exception as error:  # errors of the model's own code and of PEFT
            if is_machine_error(error):
                raise
            why = " ".join(str(error).split())
            raise CaftuneError(
                "model.name must be a model that runs with the recipe's options on tensors without values, got "
                f"{self.name} ({type(error).__name__}: {why}). Change an option that this names, or measure a short run."
            ) from error


def plan(recipe: Recipe, stage: Literal["heads", "train"] = "train") -> Plan:
    """What a stage of a recipe costs on this machine.

    Raises:
        CaftuneError: the stage itself would refuse the data or options, or the model cannot be planned without its weights.
        UnsupportedModelError: the model has no decoder layers that can be found or copied.
    """
    base, folder, missing = BaseModel.of(recipe.model), Path(recipe.output, "plan"), ""
    if stage == "heads":
        args = stage_one_config(recipe, base, folder)
        if not recipe.heads.text and not Path(recipe.head_source).is_file():
            missing = f"{recipe.head_source} does not exist yet"
    else:
        args = stage_two_config(recipe, base, folder, heads=None, aux_weight=0.0)
        missing = "" if recipe.data.train else "data.train names no data"
    if missing:
        rows = _assumed_rows(missing, args.max_length, recipe.data.max_length)
    elif stage == "heads":
        rows = measure_rows(head_rows(recipe, base, args).train, args.max_length, args.per_device_train_batch_size)
    else:
        limit = min(recipe.data.limit or _EXAMPLES_READ, _EXAMPLES_READ)
        read = task_rows(recipe.data, "train", base, base.tokenizer(), args, limit=limit)
        assert read is not None
        rows = measure_rows(read.rows, args.max_length, args.per_device_train_batch_size)
    planned = _Planned.of(recipe, base, args)
    evaluates = stage == "heads" or recipe.data.eval is not None
    setup = _setup(recipe, stage, args, rows, planned.config, evaluates=evaluates)
    device, available, libraries = _device()
    found = planned.estimate(setup)
    remedies = []
    if found.memory.peak > available:
        kinds = [_evaluated_in_smaller_batches, _recomputed, _in_smaller_batches, _with_frozen_heads]
        kinds += [_in_smaller_batches, _with_adapters, _in_smaller_batches]
        kinds += [_shorter] if stage == "train" or recipe.cuts_stage_one else []
        kinds += [_with_fewer_heads] if recipe.heads.path is None else []
        remedies = _remedies(planned, setup, kinds, found.memory.peak, available)
    return Plan(base.name, setup, rows, found, device, available, libraries, remedies)


def plan_of_run(recipe: Recipe, base: BaseModel, args: CAFTConfig, rows: Dataset) -> dict[str, float]:
    """What `plan` says of stage 2 and a run can measure, from the options and the `task_rows` of the run."""
    planned = _Planned.of(recipe, base, args)
    measured = measure_rows(rows, args.max_length, args.per_device_train_batch_size)
    evaluates = args.eval_strategy != "no"  # the evaluation after the training is not part of its costs
    setup = _setup(recipe, "train", args, measured, planned.config, evaluates=evaluates)
    found = planned.estimate(setup)
    return {
        "flops_per_token": found.flops.total,
        "overhead": found.overhead_here,
        "peak_memory_bytes": found.memory.peak,
    }


def _assumed_rows(why: str, *lengths: Any) -> Rows:
    """Rows of the first length that is given."""
    length = next((length for length in lengths if isinstance(length, int)), _ASSUMED_LENGTH)
    text = f"{why}, so examples of {length} tokens are assumed, with {_ASSUMED_LABELLED:.0%} of the tokens labelled"
    return Rows(0, float(length), length, _ASSUMED_LABELLED, float(length), text)


def measure_rows(rows: Dataset, longest: int | None, batch_size: int) -> Rows:
    """Lengths and labels of the first thousand tokenized examples. Tokens beyond `longest` are cut, as in training."""
    labels = [row[:longest] for row in rows.select(range(min(len(rows), _EXAMPLES_READ)))["labels"]]
    lengths = [len(row) for row in labels]
    return Rows(
        read=len(labels),
        mean_length=sum(lengths) / len(labels),
        longest=max(lengths),
        labelled=sum(label != IGNORED for row in labels for label in row[1:]) / sum(lengths),
        padded_length=_mean_longest(lengths, batch_size),
    )


def _mean_longest(lengths: list[int], count: int) -> float:
    """Mean of the longest of `count` examples drawn at random.

    In order of length, example i is the longest in C(i, count - 1) of C(n, count) draws.
    """
    count = min(count, len(lengths))
    draws = sum(length * comb(i, count - 1) for i, length in enumerate(sorted(lengths)))
    return draws / comb(len(lengths), count)


def _setup(
    recipe: Recipe, stage: Literal["heads", "train"], args: CAFTConfig, rows: Rows, config: Any, *, evaluates: bool
) -> Setup:
    heads, loss = recipe.heads, recipe.loss
    dtype = dict(args.model_init_kwargs or {}).get("dtype", "float32")  # type: ignore[arg-type]
    dtype = getattr(config.get_text_config(), "dtype", None) or "float32" if dtype == "auto" else dtype
    has_heads, source = stage == "heads" or loss.weight > 0, args.heads or heads.path
    described = describe_heads(source) if has_heads and source else {"kind": heads.kind}
    count = len(described["horizons"]) if "horizons" in described else heads.count
    return Setup(
        stage=stage,
        tuning=recipe.model.tuning if stage == "train" else "full",
        freezes_unembedding=bool(args.freeze_unembedding),
        heads=count if has_heads else 0,
        head_kind=described["kind"],
        trains_heads=heads.train,
        heads_lora_rank=heads.lora_rank,
        target_share=args.aux_target_share if stage == "heads" else loss.target_share,
        leaves_out_heads=stage == "train" and loss.min_weight > 0,
        batch_size=args.per_device_train_batch_size,
        eval_batch_size=args.per_device_eval_batch_size * evaluates,
        accumulation=args.gradient_accumulation_steps,
        length=args.max_length if args.packing and args.max_length else rows.longest,
        mean_length=rows.mean_length,  # also where examples are packed: they do not see each other
        labelled=rows.labelled,
        is_packed=bool(args.packing),
        is_padded=not args.packing and rows.mean_length < rows.longest,
        padding=1.0 if args.packing or args.padding_free else rows.padded_length / rows.mean_length,
        checkpointing=bool(args.gradient_checkpointing),
        optimizer=str(getattr(args.optim, "value", args.optim)),
        dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
        half=bool(args.bf16 or args.fp16),
        on_gpu=torch.cuda.is_available() and not args.use_cpu,
    )


def _device() -> tuple[str, int, int]:
    """The device's name, its free bytes, and on a CPU the bytes that this process holds."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0], 0
    return "CPU", psutil.virtual_memory().available, memory_bytes() or 0


# A kind of remedy: changes, each with the setup after it and those before.
_Kind = Callable[[Setup], Iterator[tuple[str, Setup]]]


def _remedies(planned: _Planned, setup: Setup, kinds: Sequence[_Kind], peak: int, available: int) -> list[Remedy]:
    """Changes that lower the peak, each on top of those before it, until it fits.

    Changes without an effect on results come first. A smaller batch can raise the peak, because gradients are kept over its
    several passes; it is tried again next to frozen heads and to adapters, whose gradients are fewer.
    """
    found: list[Remedy] = []
    for changes in kinds:
        for change, smaller in changes(setup):
            with suppress(CaftuneError):  # the model does not support the change
                less = planned.estimate(smaller).memory.peak
                if less < peak:
                    found.append(Remedy(change, less))
                    setup, peak = smaller, less
            if peak <= available:
                return found
    return found


def _recomputed(setup: Setup) -> Iterator[tuple[str, Setup]]:
    if not setup.checkpointing and setup.stage == "train":
        change = "trainer.gradient_checkpointing=true (the same results, one more forward pass)"
        yield change, replace(setup, checkpointing=True)


def _evaluated_in_smaller_batches(setup: Setup) -> Iterator[tuple[str, Setup]]:
    while setup.eval_batch_size > setup.batch_size:
        setup = replace(setup, eval_batch_size=max(setup.eval_batch_size // 2, setup.batch_size))
        yield f"{_section(setup)}.per_device_eval_batch_size={setup.eval_batch_size}", setup


def _in_smaller_batches(setup: Setup) -> Iterator[tuple[str, Setup]]:
    section = _section(setup)
    while setup.batch_size > 1:
        size = setup.batch_size // 2
        steps = -(-setup.batch_size * setup.accumulation // size)
        name = f"{section}.per_device_train_batch_size={size} {section}.gradient_accumulation_steps={steps}"
        if setup.eval_batch_size > size:
            name += f" {section}.per_device_eval_batch_size={size}"
        evaluated = min(setup.eval_batch_size, size)
        setup = replace(setup, batch_size=size, eval_batch_size=evaluated, accumulation=steps)
        yield f"{name} (the same results)", setup


def _section(setup: Setup) -> str:
    return "pretrain" if setup.stage == "heads" else "trainer"


def _with_frozen_heads(setup: Setup) -> Iterator[tuple[str, Setup]]:
    if setup.stage == "train" and setup.heads > 0 and setup.trains_heads:
        own = " heads.lora_rank=null" if setup.heads_lora_rank is not None else ""
        yield f"heads.train=false{own}", replace(setup, trains_heads=False, heads_lora_rank=None)


def _with_adapters(setup: Setup) -> Iterator[tuple[str, Setup]]:
    if setup.stage == "train" and setup.tuning == "full":
        thaw = " model.freeze_unembedding=false" if setup.freezes_unembedding else ""
        setup = replace(setup, tuning="lora", freezes_unembedding=False)
        yield f"model.tuning=lora{thaw}", setup
    if setup.stage == "train" and setup.tuning == "lora" and setup.on_gpu:
        yield "model.tuning=qlora", replace(setup, tuning="qlora", dtype=torch.bfloat16)


def _shorter(setup: Setup) -> Iterator[tuple[str, Setup]]:
    while setup.length // 2 >= _SHORTEST:
        length = setup.length // 2
        setup = replace(setup, length=length, mean_length=min(setup.mean_length, float(length)))
        yield f"data.max_length={length}", setup


def _with_fewer_heads(setup: Setup) -> Iterator[tuple[str, Setup]]:
    while setup.heads > 1:
        setup = replace(setup, heads=setup.heads // 2)
        made_with = " (with heads that `caftune pretrain-heads` made with it)" if setup.stage == "train" else ""
        yield f"heads.count={setup.heads}{made_with}", setup


def print_plan(console: Console, found: Plan) -> None:
    """Show a plan to a person."""
    console.print(found.model, style="bold", soft_wrap=True)
    for title, lines in _sections(found).items():
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for name, value in lines.items():
            table.add_row(name, value)
        console.print(table)
    if found.rows.assumed:
        console.print(f"Assumed: {found.rows.assumed}.", soft_wrap=True)
    if not found.estimate.memory.optimizer_is_known:
        unknown = f"Not known: the size of {found.setup.optimizer}'s state. AdamW's is assumed."
        console.print(unknown, soft_wrap=True)
    verdict = "fits" if found.fits else "does not fit"
    needed, available = _size(found.needed), _size(found.available + found.libraries)
    console.print(f"It {verdict}: {needed} needed, {available} free on {found.device}.", soft_wrap=True)
    for remedy in found.remedies:
        console.print(f"  {remedy.change}: {_size(remedy.peak + found.libraries)}", soft_wrap=True)
    if not found.fits and not (found.remedies and found.remedies[-1].peak <= found.available):
        what = "All of these together are not enough" if found.remedies else "No change of the recipe lowers it"
        console.print(f"{what}. Use a larger device or a smaller model.", soft_wrap=True)


def _sections(found: Plan) -> dict[str, dict[str, str]]:
    """The tables: name and value of each line."""
    sizes, memory, flops = found.estimate.parameters, found.estimate.memory, found.estimate.flops
    rows, setup = found.rows, found.setup
    trained = f" {'trained along' if setup.trains_heads else 'frozen'}" if setup.heads else ""
    ways = "stage 1: heads alone" if setup.stage == "heads" else f"{setup.tuning}, {setup.heads} heads{trained}"
    parts = {name: _size(value) for name, value in asdict(memory).items() if name not in ("peak", "optimizer_is_known")}
    return {
        f"Parameters ({ways})": {name.replace("_", " "): _number(value) for name, value in asdict(sizes).items()},
        "Rows": {
            "read": str(rows.read),
            "tokens, mean (longest)": f"{rows.mean_length:.0f} ({rows.longest})",
            "positions of a batch for each token": f"{setup.padding:.2f}",
            "labelled": f"{rows.labelled:.0%}",
        },
        f"Memory, {setup.batch_size} rows of {setup.length} tokens": {
            **{name.replace("_", " "): value for name, value in parts.items()},
            **({"libraries, tokenizer, rows": _size(found.libraries)} if found.libraries else {}),
            "peak (not all at once)": _size(found.needed),
        },
        "Operations per token": {
            "forward": f"{_number(flops.forward)}FLOP",
            "step": f"{_number(flops.total)}FLOP",
            "over plain fine-tuning": f"x {found.estimate.overhead:.2f}",
            "the same with TRL's loss on this device": f"x {found.estimate.overhead_here:.2f}",
        },
    }


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _number(count: float) -> str:
    """In billions, millions or thousands."""
    for unit, letter in ((1e9, "G"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:,.2f} {letter}"
    return f"{count / 1e3:,.1f} k"
