"""Calls of a model's own code that it may not have been written for, and what their failure says."""

from collections.abc import Callable
from typing import TypeVar

import torch

_Found = TypeVar("_Found")
# Code that is given other arguments or shapes than it was written for raises any of these.
_REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, ImportError, StopIteration)
# What torch says in a plain RuntimeError: of a CPU's memory, of Apple's GPUs, of CUDA and its libraries.
_FAILURES = (
    "can't allocate memory",
    "out of memory",
    "CUDA error",
    "HIP error",
    "CUBLAS_STATUS",
    "CUDNN_STATUS_INTERNAL",
)


def try_call(compute: Callable[[], _Found]) -> _Found | None:
    """What `compute` returns, None where the code that it calls does not take the call.

    Errors of the machine (`is_machine_error`) say nothing about that code and are raised.
    """
    try:
        return compute()
    except _REFUSALS as error:
        if is_machine_error(error):
            raise
        return None


def is_machine_error(error: BaseException | None) -> bool:
    """Whether it came of memory or of a device, itself or through what it was raised from.

    torch.OutOfMemoryError and torch.AcceleratorError are RuntimeErrors, as is whatever a layer raises for a wrong shape.
    """
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError | torch.AcceleratorError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _FAILURES):
            return True
        error = error.__cause__ or error.__context__
    return False
