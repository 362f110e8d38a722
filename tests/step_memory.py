"""Memory of a few training steps in a process of its own, as a run measures it, and as it is planned: two numbers."""

import sys
from pathlib import Path

from test_plan import adapter, planned, small, trainer_of

from caftune.training.measured_cost import Costs, memory_bytes


def main(folder: str, vocabulary: str, tuning: str) -> None:
    """Print the peak above what was held before the model was built, and the plan's, in bytes."""
    held = memory_bytes()
    config, shape = small("llama", vocabulary=int(vocabulary), width=256), {"batch": 4, "length": 256}
    shape |= {"attention": "sdpa", "lora": adapter("llama") if tuning == "lora" else None}
    trainer = trainer_of(config, Path(folder), max_steps=3, **shape)
    with Costs(trainer) as costs:
        trainer.train()
    peak = costs.total()["peak_memory_bytes"]
    _, found = planned(config, trainer, **shape)
    sys.stdout.write(f"{peak - held} {found.memory.peak}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
