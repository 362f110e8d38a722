"""Packages of the extra `eval`, which tasks import where they need them."""

from collections.abc import Iterator
from contextlib import contextmanager

from caftune.errors import CaftuneError


@contextmanager
def required(package: str, purpose: str) -> Iterator[None]:
    """Within this block, an import that fails is a CaftuneError that says how to install the package."""
    try:
        yield
    except ImportError as absent:
        raise CaftuneError(
            f"{package} must be installed for {purpose}, got an import error ({absent}). Run pip install 'caftune[eval]'."
        ) from absent
