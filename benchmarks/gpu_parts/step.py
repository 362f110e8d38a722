"""Time and peak memory of training steps of SFTTrainer and CAFTTrainer, in runs of `train()`, next to what the plan says.

Each row differs from its shape's first in one thing. `compile` rows, and rows that do not fit, run at two smaller depths: time
and peak are linear in the number of layers, so those of all layers follow. The runs at each depth are kept.
"""

import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from caftune import CAFTConfig, CAFTTrainer
from caftune.core import cross_entropy
from gpu_parts.shapes import RANK, Shape, options_of, rows_of, shapes, tokenizer, train, untrained_heads, vocabularies

TITLE = "Time and memory of a step"
WARM, TIMED = 2, 4  # steps; one more counts how often the host waits for the device
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """A run. Without heads it is SFTTrainer's."""

    shape: str
    vocabulary: str = "150k"
    labelled: float = 0.5
    heads: int = 4
    target_share: float = 1.0
    trains_heads: bool = False
    checkpointing: bool = False
    compiled: bool = False
    compiled_loss: bool = False  # the element-wise part of the heads' loss alone

    @property
    def name(self) -> str:
        """The row's name."""
        what = [self.shape, self.vocabulary, f"{self.labelled:.0%} labelled"]
        what += ["checkpointing"] if self.checkpointing else []
        what += ["compile"] if self.compiled else []
        kind = "trained along" if self.trains_heads else "frozen"
        kind += ", loss compiled" if self.compiled_loss else ""
        share = "exact" if self.target_share == 1 else f"{self.target_share:.0%} of the targets"
        return ", ".join([*what, *([f"K={self.heads}", kind, share] if self.heads else ["SFTTrainer"])])

    @property
    def plain(self) -> "Case":
        """The run of SFTTrainer that this one is compared with."""
        return replace(self, heads=0, target_share=1.0, trains_heads=False, compiled_loss=False)


def cases() -> list[Case]:
    """All runs, most telling first, each SFTTrainer's before those that are compared with it."""
    wanted = [Case(shape, **change) for change in ({}, {"trains_heads": True}) for shape in ("8B", "1.7B")]
    changes: list[dict[str, Any]] = [
        {"target_share": 0.25},
        {"compiled_loss": True},
        {"labelled": 1.0},
        {"vocabulary": "32k"},
        {"checkpointing": True},
        {"heads": 8},
        {"heads": 1},
    ]
    wanted += [Case(shape, **change) for change in changes for shape in ("8B", "1.7B")]
    wanted += [Case("0.6B"), Case("0.6B", target_share=0.25), Case("1.7B", compiled=True)]
    return list(dict.fromkeys(run for case in wanted for run in (case.plain, case)))


class Meter(TrainerCallback):
    """Seconds of each timed step, the peak since the first began, and the waits of the last."""

    def __init__(self, device: str) -> None:
        self.is_gpu = device == "cuda"
        self.before = torch.cuda.memory_allocated() if self.is_gpu else 0
        self.seconds: list[float] = []
        self.peak: int | None = None
        self.waits: int | None = None
        self._catching: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step begins."""
        self._wait()
        if self.is_gpu and state.global_step == 0:
            torch.cuda.reset_peak_memory_stats()
        if self.is_gpu and state.global_step == WARM + TIMED:
            self._catching = warnings.catch_warnings(record=True, action="always")
            self._caught = self._catching.__enter__()
            torch.cuda.set_sync_debug_mode("warn")
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step has ended."""
        if self._catching is not None:
            torch.cuda.set_sync_debug_mode("default")
            self._catching.__exit__(None, None, None)
            self.waits = sum("synchroniz" in str(warning.message) for warning in self._caught)
        self._wait()
        if WARM < state.global_step <= WARM + TIMED:
            self.seconds.append(time.perf_counter() - self._began)
        if self.is_gpu and state.global_step == WARM + TIMED:
            self.peak = torch.cuda.max_memory_allocated() - self.before

    def _wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def found(self) -> dict[str, Any]:
        """What was measured."""
        spread = {"fastest_s": min(self.seconds), "slowest_s": max(self.seconds), "waits": self.waits}
        peak = None if self.peak is None else self.peak / GIB
        return {"step_s": statistics.median(self.seconds), "peak_gib": peak, **spread}


def measured(case: Case, shape: Shape, layers: int, device: str, vocabulary: int) -> dict[str, Any]:
    """One run at one depth."""
    free_memory(device)
    meter, steps = Meter(device), WARM + TIMED + 1
    options = {**options_of(device, steps, shape.batch), "gradient_checkpointing": case.checkpointing}
    if case.compiled:
        options |= {"torch_compile": True, "torch_compile_backend": "inductor" if device == "cuda" else "eager"}
    kind, args = (SFTTrainer, SFTConfig) if case.heads == 0 else (CAFTTrainer, CAFTConfig)
    if case.heads:
        rank = RANK if case.trains_heads and shape.tuning == "lora" else None
        options |= {"heads": "untrained", "train_heads": case.trains_heads, "heads_lora_rank": rank}
        options |= {"aux_target_share": case.target_share}
    rows = rows_of(vocabulary, shape.batch, shape.length, case.labelled, steps)
    loss = compiled_loss(device) if case.compiled_loss else nullcontext()
    with tempfile.TemporaryDirectory() as folder, untrained_heads(case.heads), loss:
        model = shape.model(vocabulary, layers, device)
        trainer = kind(
            model, args(folder, **options), train_dataset=rows, processing_class=tokenizer(), peft_config=shape.lora()
        )
        train(trainer, meter)
    return {"layers": layers, **meter.found()}


@contextmanager
def compiled_loss(device: str) -> Iterator[None]:
    """Within the block torch.compile fuses the element-wise part of the heads' loss."""
    plain, backend = cross_entropy._loss_and_slope, "inductor" if device == "cuda" else "eager"
    cross_entropy._loss_and_slope = torch.compile(plain, dynamic=True, backend=backend)
    try:
        yield
    finally:
        cross_entropy._loss_and_slope = plain


def free_memory(device: str) -> None:
    """Forget earlier runs."""
    gc.collect()
    torch._dynamo.reset()
    if device == "cuda":
        torch.cuda.empty_cache()


def row(case: Case, *, small: bool, device: str) -> dict[str, Any]:
    """The run at all layers, or at two depths."""
    shape, vocabulary = shapes(small)[case.shape], vocabularies(small)[case.vocabulary]
    run = partial(measured, case, shape, device=device, vocabulary=vocabulary)
    return at_depths(run, shape, few=case.compiled)


def at_depths(run: Callable[..., dict[str, Any]], shape: Shape, *, few: bool = False) -> dict[str, Any]:
    """A run at all layers; where these do not fit, or with `few`, runs at two depths, and what follows for all layers."""
    runs: list[dict[str, Any]] = []
    if not few:
        with suppress(torch.OutOfMemoryError):
            runs = [run(layers=shape.num_hidden_layers)]
    runs = runs or [run(layers=layers) for layers in shape.few]
    return {**(runs[0] if len(runs) == 1 else scaled(*runs, shape.num_hidden_layers)), "runs": runs}


def scaled(one: Mapping[str, Any], other: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Time and peak of all layers on the line through two depths."""
    share = (layers - one["layers"]) / (other["layers"] - one["layers"])

    def at_all(name: str) -> float | None:
        return None if one[name] is None else one[name] + share * (other[name] - one[name])

    how = f"the line through {one['layers']} and {other['layers']} layers, at {layers}"
    return {"step_s": at_all("step_s"), "peak_gib": at_all("peak_gib"), "waits": other["waits"], "scaled": how}


def rows(small: bool, device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The rows by name."""
    for case in cases():
        yield case.name, partial(row, case, small=small, device=device)


def lines(found: Mapping[str, Any], plans: Mapping[str, Any]) -> list[str]:
    """A row a run."""
    head = "run | step, s | to SFTTrainer | plan (FLOPs) | to the plan | peak, GiB | plan, GiB | to the plan | waits a step"
    table = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    for case in cases():
        values = found.get(case.name, "not measured")
        cells = cells_of(values, found.get(case.plain.name), plans.get(case.name))
        table.append(f"| {case.name} | {' | '.join(cells)} |")
    return table


def cells_of(values: Any, plain: Any, plan: Any) -> list[str]:
    """What a run measured, next to SFTTrainer's run and to the plan, where these are known."""
    is_known = isinstance(values, dict)
    seconds, peak = (values["step_s"], values["peak_gib"]) if is_known else (None, None)
    ratio = _over(seconds, plain["step_s"] if isinstance(plain, dict) else None)
    flops, room = (plan["flops_ratio"], plan["peak_gib"]) if isinstance(plan, dict) else (None, None)
    numbers = [ratio, flops, _over(ratio, flops), peak, room, _over(peak, room)]
    layers = f" ({values['scaled']})" if is_known and "scaled" in values else ""
    first = f"{seconds:.3f}{layers}" if is_known else str(values)
    return [first, *("" if x is None else f"{x:.2f}" for x in numbers), str(values["waits"] or "") if is_known else ""]


def _over(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other
