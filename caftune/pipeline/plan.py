"""`caftune plan`: what a run will cost and whether it fits, from its configuration, tokenizer and rows. No weight is loaded."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
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
from caftune.pipeline.folder import RunFolder
from caftune.pipeline.schema import HeadsSection, LossSection, ModelSection, Recipe
from caftune.pipeline.stage_config import lora_config, stage_one_config, stage_two_config
from caftune.pipeline.stage_rows import head_rows, task_rows
from caftune.training.config import CAFTConfig
from caftune.training.estimate import Estimate, Setup, estimate

# Rows that are read to learn their length and labelled share.
_ROWS_READ = 1000
_ASSUMED_LABELLED, _ASSUMED_LENGTH = 0.5, 1024
_SHORTEST = 128  # tokens, below which no remedy cuts rows
_Kind = Callable[[Setup], Iterator[tuple[str, Setup]]]  # of remedies, each for the setup before it


@dataclass(frozen=True)
class Rows:
    """The rows a run trains on, as they are tokenized. `assumed` says so where there are none to read."""

    read: int
    mean_length: float
    longest: int
    labelled: float
    padded_length: float  # of a batch, on average: its longest row
    assumed: str | None = None


@dataclass(frozen=True)
class Remedy:
    """A change that makes a run smaller, and the peak with it and those before it."""

    change: str
    peak: int


@dataclass(frozen=True)
class Plan:
    """What a run will cost. Bytes, operations per token, parameters."""

    model: str
    setup: Setup
    rows: Rows
    estimate: Estimate
    device: str
    available: int  # bytes
    remedies: list[Remedy] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether the peak is within what the device has."""
        return self.estimate.memory.peak <= self.available

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        setup = {**asdict(self.setup), "dtype": str(self.setup.dtype).removeprefix("torch.")}
        flops = {**asdict(self.estimate.flops), "total": self.estimate.flops.total}
        return {
            **asdict(self),
            "setup": setup,
            "estimate": {**asdict(self.estimate), "flops": flops},
            "fits": self.fits,
        }


def plan(recipe: Recipe, stage: Literal["heads", "train"] = "train") -> Plan:
    """What a stage of a recipe will cost on this machine.

    Raises:
        CaftuneError: as the stage itself would, for the data and options it would refuse; and CaftuneError for a
            model that cannot be planned without its weights.
        UnsupportedModelError: the model has no decoder layers that can be found or copied.
    """
    base, folder = BaseModel.of(recipe.model), Path(recipe.output, "plan")
    if stage == "heads":
        args = stage_one_config(recipe, base, folder)
    else:
        args = stage_two_config(recipe, base, folder, heads=None, aux_weight=0.0, aux_min_weight=0.0)
    rows = _rows(recipe, base, stage, args)
    config = _config(base, args)
    setup = _setup(recipe.model, recipe.heads, recipe.loss, stage, args, rows, config)
    device, available = _device()
    found = _estimate(recipe.model, config, setup)
    peak, is_cut = found.memory.peak, stage == "train" or recipe.cuts_stage_one
    kinds = [*_KINDS, *([_shorter] if is_cut else []), *([_with_fewer_heads] if recipe.heads.path is None else [])]
    remedies = [] if peak <= available else _remedies(recipe.model, config, setup, kinds, peak, available)
    return Plan(recipe.model.name, setup, rows, found, device, available, remedies)


def plan_of_run(
    model: ModelSection, heads: HeadsSection, loss: LossSection, base: BaseModel, args: CAFTConfig, rows: Dataset
) -> dict[str, float]:
    """What `plan` says of stage 2 and a run can measure, from the options and the `task_rows` that the run has."""
    config = _config(base, args)
    measured = measure_rows(rows, args.max_length, args.per_device_train_batch_size)
    setup = _setup(model, heads, loss, "train", args, measured, config)
    found = _estimate(model, config, setup)
    return {
        "flops_per_token": found.flops.total,
        "overhead": found.overhead_here,
        "peak_memory_bytes": found.memory.peak,
    }


def _config(base: BaseModel, args: CAFTConfig) -> Any:
    """The base's configuration. Of attention's implementations eager alone keeps more than what is planned for the others."""
    config = copy.deepcopy(base.config)
    if dict(args.model_init_kwargs or {}).get("attn_implementation") == "eager":  # type: ignore[arg-type]
        config._attn_implementation = "eager"
    return config


def _estimate(model: ModelSection, config: Any, setup: Setup) -> Estimate:
    try:
        return estimate(config, setup, _adapter(model, setup))
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever a model's own code or PEFT brings up
        if is_machine_error(error):
            raise
        why = " ".join(str(error).split())
        raise CaftuneError(
            "model.name must be a model that runs with the recipe's options and without its numbers, got "
            f"{model.name} ({type(error).__name__}: {why}). Change an option that this names, or measure a short run."
        ) from error


def _rows(recipe: Recipe, base: BaseModel, stage: str, args: CAFTConfig) -> Rows:
    """Length and labelled share of the rows; assumed where the recipe names none, or the labels are still to be made."""
    wanted = recipe.data.max_length
    longest = args.max_length or (wanted if isinstance(wanted, int) else None) or _ASSUMED_LENGTH
    if stage == "heads":
        labels = RunFolder(recipe.output).labels
        if not recipe.heads.text and not labels.is_file():
            return _assumed(longest, f"{labels} is still to be made")
        return measure_rows(head_rows(recipe, base, args).train, args.max_length, args.per_device_train_batch_size)
    if recipe.data.train is None:
        return _assumed(longest, "data.train names no data")
    limit = min(recipe.data.limit or _ROWS_READ, _ROWS_READ)
    found = task_rows(recipe.data, "train", base, base.tokenizer(), args, limit=limit)
    assert found is not None
    return measure_rows(found.rows, args.max_length, args.per_device_train_batch_size)


def _assumed(length: int, why: str) -> Rows:
    text = f"{why}: rows of {length} tokens are assumed, {_ASSUMED_LABELLED:.0%} of them labelled"
    return Rows(0, float(length), length, _ASSUMED_LABELLED, float(length), text)


def measure_rows(rows: Dataset, longest: int | None, batch_size: int) -> Rows:
    """Lengths and labels of tokenized rows, of the first thousand. What is beyond `longest` is cut, as in training."""
    labels = [row[:longest] for row in rows.select(range(min(len(rows), _ROWS_READ)))["labels"]]
    lengths = [len(row) for row in labels]
    tokens = sum(lengths)
    marks = [[label != IGNORED for label in row[1:]] for row in labels]
    return Rows(
        read=len(labels),
        mean_length=tokens / len(labels),
        longest=max(lengths),
        labelled=sum(sum(row) for row in marks) / tokens,
        padded_length=_mean_longest(lengths, batch_size),
    )


def _mean_longest(lengths: list[int], count: int) -> float:
    """The longest of so many rows drawn at random, on average: row i by length is it in C(i, count - 1) of C(n, count)."""
    count = min(count, len(lengths))
    draws = sum(length * comb(i, count - 1) for i, length in enumerate(sorted(lengths)))
    return draws / comb(len(lengths), count)


def _setup(
    model: ModelSection,
    heads: HeadsSection,
    loss: LossSection,
    stage: Literal["heads", "train"],
    args: CAFTConfig,
    rows: Rows,
    config: Any,
) -> Setup:
    given = dict(args.model_init_kwargs or {}).get("dtype", "float32")  # type: ignore[arg-type]
    given = getattr(config.get_text_config(), "dtype", None) or "float32" if given == "auto" else given
    has_heads = stage == "heads" or loss.weight > 0
    source = args.heads or heads.path
    described = describe_heads(source) if has_heads and source else None
    length = args.max_length if args.packing and args.max_length else rows.longest
    return Setup(
        stage=stage,
        tuning=model.tuning if stage == "train" else "full",
        heads=0 if not has_heads else len(described["horizons"]) if described else heads.count,
        head_kind=described["kind"] if described else heads.kind,
        trains_heads=heads.train,
        heads_lora_rank=heads.lora_rank,
        rows=args.aux_target_share if stage == "heads" else loss.target_share,
        leaves_out_heads=stage == "train" and loss.min_weight > 0,
        batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        length=length,
        # Documents of a packed row do not see each other.
        mean_length=rows.mean_length,
        labelled=rows.labelled,
        is_packed=bool(args.packing),
        is_padded=not args.packing and rows.mean_length < rows.longest,
        padding=1.0 if args.packing or args.padding_free else rows.padded_length / rows.mean_length,
        checkpointing=bool(args.gradient_checkpointing),
        optimizer=str(getattr(args.optim, "value", args.optim)),
        dtype=getattr(torch, given) if isinstance(given, str) else given,
        half=bool(args.bf16 or args.fp16),
        on_gpu=torch.cuda.is_available() and not args.use_cpu,
    )


def _adapter(model: ModelSection, setup: Setup) -> Any:
    """The LoraConfig of a setup, which may be one of a remedy."""
    if setup.stage == "heads" or setup.tuning == "full":
        return None
    return lora_config(model.model_copy(update={"tuning": setup.tuning}))


def _device() -> tuple[str, int]:
    """The device's name, and the bytes that are free on it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0]
    return "CPU", psutil.virtual_memory().available


def _remedies(
    model: ModelSection, config: Any, setup: Setup, kinds: Sequence[_Kind], peak: int, available: int
) -> list[Remedy]:
    """Changes that lower the peak, each on top of those before it, until it fits.

    First comes what changes no result, last what does most. A smaller batch can do the opposite, for gradients are kept over
    its several passes, and is tried again when adapters have made them small.
    """
    found: list[Remedy] = []
    for changes in kinds:
        for change, smaller in changes(setup):
            with suppress(CaftuneError):  # what the model cannot take is no remedy
                less = _estimate(model, config, smaller).memory.peak
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


def _in_smaller_batches(setup: Setup) -> Iterator[tuple[str, Setup]]:
    section = "pretrain" if setup.stage == "heads" else "trainer"
    while setup.batch_size > 1:
        size = setup.batch_size // 2
        steps = -(-setup.batch_size * setup.accumulation // size)
        setup = replace(setup, batch_size=size, accumulation=steps)
        name = f"{section}.per_device_train_batch_size={size} {section}.gradient_accumulation_steps={steps}"
        yield f"{name} (the same results)", setup


def _with_adapters(setup: Setup) -> Iterator[tuple[str, Setup]]:
    if setup.stage == "train" and setup.tuning == "full":
        setup = replace(setup, tuning="lora")
        yield "model.tuning=lora", setup
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


_KINDS = (_recomputed, _in_smaller_batches, _with_adapters, _in_smaller_batches)


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
        console.print(
            f"Not known: the state of {found.setup.optimizer}, taken to be as large as AdamW's.", soft_wrap=True
        )
    verdict = "fits" if found.fits else "does not fit"
    peak, available = _size(found.estimate.memory.peak), _size(found.available)
    console.print(f"It {verdict}: {peak} of the {available} that are free on {found.device}.", soft_wrap=True)
    for remedy in found.remedies:
        console.print(f"  {remedy.change}: {_size(remedy.peak)}", soft_wrap=True)
    if not found.fits and not (found.remedies and found.remedies[-1].peak <= found.available):
        what = "All of these together are not enough" if found.remedies else "No change of the recipe makes it less"
        console.print(f"{what}: take a larger device or a smaller model.", soft_wrap=True)


def _sections(found: Plan) -> dict[str, dict[str, str]]:
    """The tables: name and value of each line."""
    sizes, memory, flops = found.estimate.parameters, found.estimate.memory, found.estimate.flops
    rows, setup = found.rows, found.setup
    ways = "stage 1: heads alone" if setup.stage == "heads" else f"{setup.tuning}, {setup.heads} heads"
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
            "peak (not all at once)": _size(memory.peak),
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
