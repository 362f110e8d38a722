"""Trying calls that a model's code may not support, without hiding errors about memory or devices."""

from collections.abc import Callable
from typing import TypeVar

import torch

_Found = TypeVar("_Found")
# Errors of code that does not support the given arguments or shapes.
_UNSUPPORTED = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, ImportError, StopIteration)
# Parts of messages of plain RuntimeErrors: CPU memory, Apple's GPUs, CUDA and its libraries.
_MACHINE_MESSAGES = (
    "can't allocate memory",
    "out of memory",
    "CUDA error",
    "HIP error",
    "CUBLAS_STATUS",
    "CUDNN_STATUS_INTERNAL",
)


def try_call(compute: Callable[[], _Found]) -> _Found | None:
    """The result of `compute`; None if the code does not support the call. Machine errors (`is_machine_error`) are raised."""
    try:
        return compute()
    except _UNSUPPORTED as error:
        if is_machine_error(error):
            raise
        return None


def is_machine_error(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, is about memory or a device."""
    # torch's own classes for these are RuntimeErrors, as is what a layer raises for a wrong shape.
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError | torch.AcceleratorError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _MACHINE_MESSAGES):
            return True
        error = error.__cause__ or error.__context__
    return False
