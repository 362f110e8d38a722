"""What `caftune plan` says of a step next to one fake step, the alternative that decision 12 weighs.

    python benchmarks/fake_step.py             a small Llama: a real step, the plan, the fake step (ten minutes)
    python benchmarks/fake_step.py --public    Llama-3.1-8B: seconds and results of plan and fake step (five minutes)

A fake step runs the model's own forward and backward pass, heads and losses included, on tensors without values. Storages are
added up while they live, operations counted by torch's formulas. Memory is without weights and optimizer states, on a CPU.
"""

import argparse
import contextlib
import tempfile
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from step_worker import TRUNK, Case, _trainer, batches, model_of, write_heads
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer, LlamaConfig, TrainerCallback, masking_utils
from trl.trainer.utils import add_fused_lm_head

from caftune.core.attach import attach_heads
from caftune.core.backbone import _watch
from caftune.core.objective import Sample
from caftune.core.replay import Mixer
from caftune.demo.run import BASE
from caftune.training.estimate import estimate, meta_model
from caftune.training.measured_cost import FlopCount
from caftune.training.run_setup import Setup

SHAPE = {"vocabulary": 32768, "heads": 4, "batch": 2, "length": 128}
CASES = {
    "full": ("exact", Case("full", labelled=0.5, **SHAPE)),
    "full, all labelled": ("exact", Case("full", labelled=1.0, **SHAPE)),
    "full, heads trained": ("exact", Case("full-heads", labelled=0.5, **SHAPE)),
    "LoRA": ("exact", Case("lora", labelled=0.5, **SHAPE)),
    "LoRA, a quarter of the targets": ("sampled", Case("lora", labelled=0.5, **SHAPE)),
    "stage 1": ("exact", Case("stage1", labelled=0.5, **SHAPE)),
    "plain": ("sft", Case("full", labelled=0.5, **SHAPE)),
}
PUBLIC = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
PUBLIC.num_attention_heads, PUBLIC.num_key_value_heads, PUBLIC.head_dim = 32, 8, 128
MIB = 2**20


class Numberless(TorchDispatchMode):
    """Within the block, searches find as many positions as are labelled, and every number is 1."""

    def __init__(self, labelled: float) -> None:
        super().__init__()
        self.labelled = labelled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty(round(self.labelled * args[0].numel()), args[0].dim(), dtype=torch.long)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        return func(*args, **(kwargs or {}))


class Live(TorchDispatchMode):
    """Within the block, adds up the storages that live, `known` ones left out."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.kept = [tensor.untyped_storage() for tensor in known]
        self.seen: dict[int, Any] = {storage._cdata: None for storage in self.kept}
        self.now = self.peak = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.seen:
                size = storage.nbytes()
                self.seen[storage._cdata] = weakref.finalize(storage, self._free, storage._cdata, size)
                self.now += size
                self.peak = max(self.peak, self.now)
        return out

    def _free(self, number: int, size: int) -> None:
        self.seen.pop(number, None)
        self.now -= size


@contextlib.contextmanager
def masks_as_of_real_tensors() -> Iterator[None]:
    """Within the block, transformers (5.23) leaves out causal masks, as it does for real batches without padding."""
    before, masking_utils.is_tracing = masking_utils.is_tracing, lambda *_: False
    try:
        yield
    finally:
        masking_utils.is_tracing = before


def fake_step(config: Any, setup: Setup, adapter: Any = None) -> dict[str, float]:
    """Peak bytes, operations and torch's calls of one micro-batch, and the seconds to find them."""
    started = time.process_time()
    backbone, heads = meta_model(config, setup, adapter)
    model = backbone.model
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        masks_as_of_real_tensors(),
        Numberless(setup.labelled_positions),
    ):
        model.to_empty(device="cpu").tie_weights()
        with torch.no_grad(), _watch(backbone) as closing:
            model(input_ids=torch.zeros(1, 8, dtype=torch.long), use_cache=False)
        mixer = Mixer("self_attn", "input_layernorm", "self_attn.o_proj")
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        if heads is not None:
            heads.to_empty(device="cpu")
            attach_heads(replace(backbone, closing_names=tuple(closing), mixer=mixer), heads)
        inputs = {
            name: torch.zeros(setup.batch_size, setup.length, dtype=torch.long) for name in ("input_ids", "labels")
        }
        live, counter = Live([*model.parameters(), *model.buffers()]), FlopCount()
        with live, counter, torch.autocast("cpu", torch.bfloat16, enabled=setup.half):
            loss = _loss(model, inputs, setup)
            with torch.autocast("cpu", enabled=False):
                loss.backward()
    found = {"peak": live.peak, "flops": counter.total, "operations": live.operations}
    return {**found, "seconds": time.process_time() - started}


def _loss(model: Any, inputs: dict[str, Any], setup: Setup) -> Any:
    """The step's loss, in sums: divisors change no shape."""
    scoring: dict[str, Any] = {}
    if setup.heads > 0:
        sample = Sample(setup.target_share, (0,)) if setup.target_share < 1 else None
        scoring = {"auxiliary_weights": torch.ones(setup.heads), "auxiliary_sample": sample}
    if setup.stage == "heads":
        return model(**inputs, auxiliary="only", **scoring)["auxiliary"]["loss"]
    if setup.heads > 0:
        scoring |= {"auxiliary": "add", "auxiliary_labels": inputs["labels"]}
    outputs = model(**inputs, fused_lm_head=True, use_cache=False, **scoring)
    main = -outputs.log_probs.sum()
    return main + outputs.auxiliary["loss"] if setup.heads > 0 else main


class Watch(TrainerCallback):
    """Operations of the first step, and the most that torch's allocator handed out in the second."""

    flops = peak = 0

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """A step begins."""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        self.watching = torch.profiler.profile(activities=kinds, profile_memory=True) if self.flops else FlopCount()
        self.watching.__enter__()

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        """A step has ended."""
        self.watching.__exit__(None, None, None)
        if not self.flops:
            self.flops = self.watching.total
            return
        events = [event for event in self.watching.profiler.kineto_results.events() if event.name() == "[memory]"]
        sizes = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
        self.peak = int(sizes.cumsum(0).max())


def real_step(case: Case, arm: str) -> Watch:
    """Two steps of the trainer itself."""
    from datasets import Dataset

    columns, watch = batches(case, 2), Watch()
    rows = Dataset.from_dict({name: [row for b in columns for row in b[name]] for name in ("input_ids", "labels")})
    with tempfile.TemporaryDirectory() as folder:
        heads = Path(folder, "heads")
        write_heads(case, heads)
        kind, args, lora = _trainer(case, arm, heads, 1, "cpu")
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        trainer = kind(model_of(case), args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
        trainer.add_callback(watch)
        trainer.train()
    return watch


def compare(name: str, config: Any, setup: Setup, adapter: Any, real: Watch | None = None) -> None:
    """Print a line of Markdown."""
    started = time.process_time()
    plan = estimate(config, setup, adapter)
    seconds = time.process_time() - started
    memory = plan.memory
    peak = memory.peak - memory.weights - memory.heads - memory.optimizer - memory.process
    fake = fake_step(config, setup, adapter)
    flops = plan.flops.total * setup.batch_size * setup.length
    of_peak, of_flops = (real.peak, real.flops) if real is not None else (fake["peak"], fake["flops"])
    cells = [name, f"{of_peak / MIB:.0f} MiB", f"{peak / of_peak - 1:+.1%}", f"{fake['peak'] / of_peak - 1:+.1%}"]
    cells += [f"{of_flops:.3g}", f"{flops / of_flops - 1:+.1%}", f"{fake['flops'] / of_flops - 1:+.1%}"]
    cells += [f"{seconds:.1f} s", f"{fake['seconds']:.1f} s", str(fake["operations"])]
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the table."""
    from peft import LoraConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", action="store_true", help="Llama-3.1-8B, of which no real step is run")
    is_public = parser.parse_args().public
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    head = [
        "case",
        "peak: real",
        "plan",
        "fake",
        "FLOPs: real",
        "plan",
        "fake",
        "CPU time: plan",
        "fake",
        "fake operations",
    ]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|", flush=True)
    if is_public:
        shape = {"labelled": 0.5, "batch_size": 8}
        for name, more in {"full": {}, "LoRA": {"tuning": "lora"}, "stage 1": {"stage": "heads"}}.items():
            compare(f"8B, {name}", PUBLIC, Setup(**shape, **more), lora if name == "LoRA" else None)
        large = Setup(labelled=0.5, batch_size=32, length=4096, mean_length=4096.0)
        compare("8B, full, 32 x 4096", PUBLIC, large, None)
        return
    for name, (arm, case) in CASES.items():
        setup = Setup(
            stage="heads" if case.tuning == "stage1" else "train",
            tuning="lora" if case.tuning == "lora" else "full",
            heads=0 if arm == "sft" else case.heads,
            trains_heads=case.tuning == "full-heads",
            target_share=0.25 if arm == "sampled" else 1.0,
            batch_size=case.batch,
            length=case.length,
            mean_length=case.length,
            labelled=case.labelled,
            checkpointing=False,
        )
        config = LlamaConfig(vocab_size=case.vocabulary, **TRUNK)
        compare(name, config, setup, lora if case.tuning == "lora" else None, real_step(case, arm))


if __name__ == "__main__":
    main()
