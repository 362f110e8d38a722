"""The environments of the peers: `make peers` creates them. Without them their tests are skipped."""

import os
from pathlib import Path

import pytest
from trainers import config, lora, trained

from caftune import CAFTTrainer

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


@pytest.fixture(scope="session")
def export(rows):
    """Fine-tune a base with heads in full and with an adapter. Returns the folders of three exports by name."""

    def trainer(base, folder, **options):
        peft_config = lora() if folder.name == "lora" else None
        args = config(folder, learning_rate=1e-2, max_steps=3, **options)
        return trained(CAFTTrainer(str(base), args, train_dataset=rows, peft_config=peft_config))

    def exports(base, folder):
        trainer(base, folder / "stage1", pretrain_heads=True, num_heads=1).export(folder / "heads")
        trainer(base, folder / "tuned", heads=str(folder / "heads")).export(folder / "full")
        adapted = trainer(base, folder / "lora", heads=str(folder / "heads"))
        adapted.export(folder / "merged")
        adapted.export(folder / "adapter", merged=False)
        return {name: folder / name for name in ("full", "merged", "adapter")}

    return exports
