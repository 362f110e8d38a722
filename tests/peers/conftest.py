"""The environments of the peers: `make peers` creates them. Without them their tests are skipped."""

import os
from pathlib import Path

import pytest

PEERS = Path(os.environ.get("CAFTUNE_PEERS") or Path(__file__).parents[2] / ".peers")


@pytest.fixture(scope="session")
def peer():
    """The folder of a peer's environment by its name; its interpreter is `bin/python` there."""

    def environment(name):
        folder = PEERS / name
        if not (folder / "ready").is_file():
            pytest.skip(f"{folder} is absent: `make peers PEERS={name}` creates it")
        return folder

    return environment
