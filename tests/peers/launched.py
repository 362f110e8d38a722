"""Run by accelerate launch: `caftune train` of each recipe, and again from its checkpoint at step 5.

    accelerate launch ... launched.py RECIPE.yaml ...

RECIPE.yaml writes RECIPE-whole/ and RECIPE-resumed/ next to it. Accelerate takes its FSDP2 path for accelerators only; where
it is configured, accelerate is told that these gloo ranks are some.
"""

import os
import shutil
import sys
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from caftune.cli import app

HALF = 5


def as_accelerators() -> None:
    """Let accelerate take processes on CPUs for processes on GPUs."""
    begin = PartialState.__init__

    def wrapped(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = wrapped


def whole_and_resumed(recipe: Path) -> None:
    """A run, and one that begins with the first half of its checkpoints."""
    whole, resumed = (recipe.with_name(f"{recipe.stem}-{attempt}") for attempt in ("whole", "resumed"))
    app(["train", str(recipe), f"output={whole}"], standalone_mode=False)
    if int(os.environ.get("RANK", "0")) == 0:
        kept = [whole / "train" / name for name in ("recipe.yaml", "provenance.json", f"checkpoint-{HALF}")]
        for path in kept:
            copy = shutil.copytree if path.is_dir() else shutil.copy
            (resumed / "train").mkdir(parents=True, exist_ok=True)
            copy(path, resumed / "train" / path.name)
    PartialState().wait_for_everyone()
    app(["train", str(recipe), f"output={resumed}"], standalone_mode=False)


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        as_accelerators()
    for name in sys.argv[1:]:
        whole_and_resumed(Path(name))
