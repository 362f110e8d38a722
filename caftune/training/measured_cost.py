"""The cost of a training: seconds, tokens, FLOPs, peak memory. A resumed run continues to count."""

import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import Trainer, TrainerCallback

from caftune.training.freed_memory import return_freed_memory

_KEY = "caftune_costs"  # in the state that a checkpoint keeps
_aten = torch.ops.aten
# torch 2.13 has no formulas for in-place products (TRL's loss) and the CPU's attention, which take the same arguments. Ends
# when it has them.
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
    """Counts FLOPs by torch's formulas; half of them for causal attention, whose kernels skip later positions.

    Not torch's own counter, which decomposes operations and so changes the last bits of results.
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
    """Measures a training: `with Costs(trainer) as costs: trainer.train()`, then `costs.total()`.

    - `seconds`: of the optimizer steps only, without evaluations, checkpoints and reading data.
    - `tokens`: read, without padding. None without `include_num_input_tokens_seen`.
    - `flops`: matrix products and attention of the first step, forward and backward, divided by its tokens, times all tokens.
      Without kernels that torch does not know. None with several processes.
    - `peak_memory_bytes`: of the GPU's allocator; on a CPU of the whole process, with Python and its libraries (Linux only,
      otherwise None). Subtract `memory_bytes` before the model is loaded to get the training's share.
    """

    def __init__(self, trainer: Trainer) -> None:
        names = ("tokens", "peak_memory_bytes", "flops_per_token")
        self._counted: dict[str, Any] = {"seconds": 0.0, **dict.fromkeys(names)}
        self._counter: FlopCount | None = None
        self._began = 0.0
        self._tokens_before = 0
        trainer.add_callback(self)

    def __enter__(self) -> "Costs":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_counter()  # where the first step failed

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._counted |= state.stateful_callbacks.get(_KEY, {}) if state.global_step > 0 else {}
        state.stateful_callbacks[_KEY] = self._counted
        _reset_peak_memory()
        # A resumed run has counted its first step before.
        if args.world_size == 1 and self._counted["flops_per_token"] is None:
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
    """The name of the GPU that trainings run on, or `cpu`."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def memory_bytes() -> int | None:
    """The current value of what `peak_memory_bytes` is the maximum of, after freed memory is returned to the system."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return_freed_memory()
    return _of_process("VmRSS")


def _peak_memory_bytes() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _of_process("VmHWM")


def _of_process(name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE) if _STATUS.is_file() else None
    return int(found[1]) * 1024 if found else None


def _reset_peak_memory() -> None:
    """Reset the peak, as far as the system allows: on Linux a process may reset its own."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        _RESET.write_text("5")
