"""The record of how a run was made."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from caftune.files import file_sha256

_PACKAGES = ("caftune", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors")


def provenance(data_files: Mapping[str, str | os.PathLike[str]] | None = None) -> dict[str, Any]:
    """Command, time, versions, git commit of the working folder, device, and the hashes of the data files read."""
    return {
        "command": shlex.join(sys.argv),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {name: package_version(name) for name in _PACKAGES},
        "git": _git_commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "data": {name: file_sha256(path) for name, path in (data_files or {}).items() if Path(path).is_file()},
    }


def package_version(name: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
