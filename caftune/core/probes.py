"""Trying calls that a model's code may not support, without hiding errors of the machine."""

from collections.abc import Callable
from typing import TypeVar

import torch

_Found = TypeVar("_Found")
# What code raises for arguments or shapes that it does not support.
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
    """What `compute` returns; None where the code does not support the call.

    Errors of the machine (`is_machine_error`) say nothing about the code, and are raised.
    """
    try:
        return compute()
    except _UNSUPPORTED as error:
        if is_machine_error(error):
            raise
        return None


def is_machine_error(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, is about memory or a device.

    torch.OutOfMemoryError and torch.AcceleratorError are RuntimeErrors, as is whatever a layer raises for a wrong shape.
    """
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError | torch.AcceleratorError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _MACHINE_MESSAGES):
            return True
        error = error.__cause__ or error.__context__
    return False
