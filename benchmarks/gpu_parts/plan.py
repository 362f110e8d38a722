"""What `caftune plan` says of the runs of the parts `step` and `stage_one` on a GPU. It needs none, and can be made before."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from caftune.training.estimate import estimate
from caftune.training.run_setup import Setup
from gpu_parts import stage_one, step
from gpu_parts.shapes import RANK, Shape, shapes, vocabularies

_GPU: dict[str, Any] = {"half": True, "on_gpu": True}


def planned(shape: Shape, vocabulary: int, setup: Setup) -> dict[str, float]:
    """Operations next to SFTTrainer's, and the peak."""
    adapter = shape.lora() if setup.stage == "train" else None
    found = estimate(shape.config(vocabulary, shape.num_hidden_layers), setup, adapter)
    ratio = found.overhead_here if setup.heads and setup.stage == "train" else 1.0
    return {"flops_ratio": ratio, "peak_gib": found.memory.peak / step.GIB}


def of_step(case: step.Case, *, small: bool) -> dict[str, float]:
    """The plan of a row of `step`."""
    shape = shapes(small)[case.shape]
    is_lora = shape.tuning == "lora"
    setup = Setup(
        tuning=shape.tuning,
        heads=case.heads,
        trains_heads=case.trains_heads,
        heads_lora_rank=RANK if case.trains_heads and is_lora else None,
        target_share=case.target_share,
        batch_size=shape.batch,
        length=shape.length,
        mean_length=shape.length,
        labelled=case.labelled,
        checkpointing=case.checkpointing,
        dtype=shape.dtype,
        **_GPU,
    )
    return planned(shape, vocabularies(small)[case.vocabulary], setup)


def of_stage_one(options: dict[str, Any], *, small: bool) -> dict[str, float]:
    """The plan of a row of `stage_one`."""
    shape = shapes(small)[stage_one.SHAPE]
    length = 2 * shape.length if small else stage_one.LENGTH
    setup = Setup(
        stage="heads",
        target_share=options.get("aux_target_share", 1.0),
        batch_size=shape.batch if small else stage_one.BATCH,
        length=length,
        mean_length=length,
        labelled=options["labelled"],
        checkpointing=False,
        dtype=shape.dtype,
        **_GPU,
    )
    return planned(shape, vocabularies(small)["150k"], setup)


def rows(small: bool, device: str) -> Iterator[tuple[str, Callable[[], Any]]]:  # noqa: ARG001
    """The rows by the names that they have in the other parts."""
    for case in step.cases():
        yield case.name, partial(of_step, case, small=small)
    for name, options in stage_one.ROWS.items():
        if "soft_targets" in options:  # not in the plan's model
            continue
        yield name, partial(of_stage_one, options, small=small)
