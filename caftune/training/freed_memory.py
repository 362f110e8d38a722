"""Memory that was freed, and that the C library keeps for later use."""

import ctypes
from contextlib import suppress


def return_freed_memory() -> None:
    """Return it to the system. Only glibc has the call, and only it keeps freed memory."""
    with suppress(AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
