"""What a training cost: seconds, tokens, FLOPs, peak memory. A run that was stopped goes on counting."""

import ctypes
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import Trainer, TrainerCallback

_KEY = "caftune_costs"  # in the state that a checkpoint keeps
_aten = torch.ops.aten
# torch (2.13) has no formulas for products in place (TRL's loss) and the CPU's attention, which take the same arguments.
_FORMULAS = {
    **flop_registry,
    _aten.addmm_: flop_registry[_aten.addmm],
    _aten.baddbmm_: flop_registry[_aten.baddbmm],
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class FlopCount(TorchDispatchMode):
    """Counts with torch's formulas, and half of what they say of causal attention, whose kernels skip what lies ahead.

    (torch's own counter takes operations apart, which changes the last bits of results.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            names = (argument.name for argument in func._schema.arguments)
            is_causal = {**dict(zip(names, args, strict=False)), **kwargs}.get("is_causal", False)
            self.total += formula(*args, **kwargs, out_val=out) // (2 if is_causal else 1)
        return out


class Costs(TrainerCallback):
    """Counts while a trainer trains: `with Costs(trainer) as costs: trainer.train()`, then `costs.total()`.

    - `seconds`: of the optimizer steps alone, without evaluations, checkpoints and the reading of data.
    - `tokens`: read, padding left out. None without `include_num_input_tokens_seen`.
    - `flops`: matrix products and attention of the first step, forward and backward, counted by torch as it ran, by that
      step's tokens, times all tokens. Kernels that torch does not know are not in it. None with several processes.
    - `peak_memory_bytes`: of the GPU's allocator; on a CPU of the whole process with Python and its libraries (Linux; else
      None). `memory_bytes` before a model is loaded says how much of that is not the training's.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._counted: dict[str, Any] = {
            "seconds": 0.0,
            "tokens": None,
            "peak_memory_bytes": None,
            "flops_per_token": None,
        }
        self._counter: FlopCount | None = None
        self._began = 0.0
        self._tokens_before = 0
        trainer.add_callback(self)

    def __enter__(self) -> "Costs":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_counter()  # where the first step failed

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        kept = state.stateful_callbacks.get(_KEY, {}) if state.global_step > 0 else {}
        self._counted |= kept
        state.stateful_callbacks[_KEY] = self._counted
        _reset_peak_memory()
        if (
            args.world_size == 1 and self._counted["flops_per_token"] is None
        ):  # a resumed run has counted its first step
            self._counter = FlopCount()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._counter is not None:
            self._tokens_before = state.num_input_tokens_seen
            self._counter.__enter__()
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._counted["seconds"] += time.perf_counter() - self._began
        if args.include_num_input_tokens_seen != "no":
            self._counted["tokens"] = state.num_input_tokens_seen
        if self._counter is not None:
            tokens = state.num_input_tokens_seen - self._tokens_before
            self._counted["flops_per_token"] = self._counter.total / tokens if tokens else None
            self._stop_counter()
        peaks = (self._counted["peak_memory_bytes"], _peak_memory_bytes())
        self._counted["peak_memory_bytes"] = max((peak for peak in peaks if peak is not None), default=None)

    def _stop_counter(self) -> None:
        counter, self._counter = self._counter, None
        if counter is not None and self._began:
            counter.__exit__(None, None, None)

    def total(self) -> dict[str, Any]:
        """`seconds`, `tokens`, `flops` and `peak_memory_bytes` of the whole training, and the `device` at its end."""
        counted = {**self._counted, "device": device_name()}
        per_token = counted.pop("flops_per_token")
        return {**counted, "flops": per_token * counted["tokens"] if per_token and counted["tokens"] else None}


def device_name() -> str:
    """The GPU that trainings run on, or `cpu`."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def memory_bytes() -> int | None:
    """What is held now of that which `peak_memory_bytes` is the highest of, all that is free given back."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    with suppress(AttributeError, TypeError):  # glibc alone has it, and keeps what an earlier model took
        ctypes.CDLL(None).malloc_trim(0)
    return _of_process("VmRSS")


def _peak_memory_bytes() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _of_process("VmHWM")


def _of_process(name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE) if _STATUS.is_file() else None
    return int(found[1]) * 1024 if found else None


def _reset_peak_memory() -> None:
    """Start anew, as far as the system lets us: a process of Linux may reset its own peak."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        _RESET.write_text("5")
